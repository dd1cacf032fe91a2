"""The Celery application: ``celery -A workers.app worker``.

The broker comes from ``CELERY_BROKER_URL`` or ``TASKGUARD_BROKER``, the message store from ``TASKGUARD_STORE``, results
from ``CELERY_RESULT_BACKEND``; all three are one local Redis unless told otherwise.
"""

from __future__ import annotations

import os

from celery import Celery

import taskguard

LOCAL_REDIS = "redis://localhost:6379/0"
BROKER = os.environ.get("CELERY_BROKER_URL") or os.environ.get("TASKGUARD_BROKER") or LOCAL_REDIS
STORE = os.environ.get("TASKGUARD_STORE") or (BROKER if BROKER.startswith("redis") else LOCAL_REDIS)

app = Celery(
    "workers",
    broker=BROKER,
    backend=os.environ.get("CELERY_RESULT_BACKEND") or (STORE if STORE.startswith("redis") else LOCAL_REDIS),
    include=["workers.payments", "workers.notifications", "workers.reports", "workers.shipping"],
)
taskguard.install(app, store=STORE)
