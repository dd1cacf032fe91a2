"""The same charge on plain Celery, as its documentation recommends: late acknowledgement, retries with backoff.

`taskguard demo --stock` puts the same orders through this. The bank gets the task's id as its idempotency key: the only
name of a piece of work that plain Celery has. Its rate limit is each worker's, so two have half of the bank's each.
"""

from __future__ import annotations

import os

from celery import Celery, Task

from workers import bank_client

app = Celery(
    "workers.stock",
    broker=os.environ.get("CELERY_BROKER_URL", "redis://localhost:6379/0"),
    backend=os.environ.get("CELERY_RESULT_BACKEND", "redis://localhost:6379/0"),
)
app.conf.update(task_acks_late=True, worker_prefetch_multiplier=1, broker_connection_retry_on_startup=True)


@app.task(
    bind=True,
    rate_limit="28/s",
    autoretry_for=(bank_client.BankUnavailable,),
    max_retries=10,
    retry_backoff=True,
    retry_backoff_max=4,
)
def charge(self: Task, order_id: str, amount: int) -> str:
    """Charge an order, *amount* in cents. Returns the bank's charge id."""
    answer = bank_client.post(
        "/charges",
        {"order_id": order_id, "amount": amount},
        key=self.request.id,
        caller=self.request.hostname,
    )
    return str(answer["charge_id"])
