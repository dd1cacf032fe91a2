"""Payments: money moves once, whatever happens to the workers.

The execution key goes to the bank as its idempotency key: a run that died between the bank's answer and its own end is
run again under the same key, and the bank then answers with the charge it made the first time.
"""

from __future__ import annotations

from taskguard import ReliableTask, Retry
from workers import bank_client
from workers.app import app

PATIENT = Retry(max_retries=10, first_delay=0.5)


@app.task(bind=True, base=ReliableTask, idempotency_key="charge:{order_id}", deadline=300, retry=PATIENT)
def charge(self: ReliableTask, order_id: str, amount: int) -> str:
    """Charge an order, *amount* in cents. Returns the bank's charge id."""
    answer = bank_client.post(
        "/charges",
        {"order_id": order_id, "amount": amount},
        key=self.custody.key,
        caller=self.request.hostname,
        timeout=self.remaining(),
    )
    return str(answer["charge_id"])


@app.task(bind=True, base=ReliableTask, idempotency_key="refund:{charge_id}", deadline=86400, retry=PATIENT)
def refund(self: ReliableTask, charge_id: str) -> str:
    """Give a charge back, all of it."""
    bank_client.post("/refunds", {"charge_id": charge_id}, key=self.custody.key, timeout=self.remaining())
    return charge_id
