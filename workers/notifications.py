"""Notifications: once for every order, not at all when they would come too late, and twice where a crash falls between
the sending and its completion, because a mail server knows no key."""

from __future__ import annotations

from celery.utils.log import get_task_logger

from taskguard import ReliableTask
from workers.app import app

log = get_task_logger(__name__)


@app.task(base=ReliableTask, idempotency_key="receipt:{order_id}", on_duplicate="drop", deadline=3600)
def receipt(charge_id: str, *, order_id: str, email: str) -> None:
    """Tell the customer that the order was charged.

    The charge id comes first, so that it can be the next step of a chain:
    ``payments.charge.s(order_id, 1999) | receipt.s(order_id=order_id, email="ann@example.com")``.
    """
    log.info("to %s: order %s is paid, charge %s", email, order_id, charge_id)
