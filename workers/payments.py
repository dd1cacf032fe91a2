"""Payments: money moves once, whatever happens to the workers.

The execution key goes to the bank as its idempotency key: a run that died between the bank's answer and its own end is
run again under the same key, and the bank then answers with the charge it made the first time.

The bank takes 60 charges a second from all of us together. While it is down a probe a second finds out whether it is
back; everything else rests in the store, spends no attempt, and comes back slowly at first.
"""

from __future__ import annotations

from taskguard import CircuitBreaker, Concurrency, Downstream, ReliableTask, Retry, Timeout, TokenBucket
from taskguard.downstream.timeouts import remaining
from workers import bank_client
from workers.app import app

PATIENT = Retry(max_retries=10, first_delay=0.5)

bank = Downstream(
    "bank",
    # In any second at most 52 + 4, and one call of each process that was under way: 60 for four of them.
    rate=TokenBucket(52, burst=4),
    # Leases are short: a place, or a probe, is another's soon after its process was killed.
    concurrency=Concurrency(20, lease=3),
    circuit=CircuitBreaker(
        window="count", window_size=10, minimum_calls=5, wait_in_open=1, backoff=1, probes_in_half_open=2,
        probe_lease=3, slow_start=2, expected=(bank_client.BankUnavailable,),
    ),
    timeout=Timeout(total=10),
)  # fmt: skip


@app.task(
    bind=True, base=ReliableTask, idempotency_key="charge:{order_id}", deadline=300, downstream=bank, retry=PATIENT
)  # fmt: skip
def charge(self: ReliableTask, order_id: str, amount: int) -> str:
    """Charge an order, *amount* in cents. Returns the bank's charge id."""
    answer = bank_client.post(
        "/charges",
        {"order_id": order_id, "amount": amount},
        key=self.custody.key,
        caller=self.request.hostname,
        timeout=remaining(),
    )
    return str(answer["charge_id"])


@app.task(
    bind=True, base=ReliableTask, idempotency_key="refund:{charge_id}", deadline=86400, downstream=bank, retry=PATIENT
)  # fmt: skip
def refund(self: ReliableTask, charge_id: str) -> str:
    """Give a charge back, all of it."""
    bank_client.post("/refunds", {"charge_id": charge_id}, key=self.custody.key, timeout=remaining())
    return charge_id
