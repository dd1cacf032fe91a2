"""Messages, attempts and failures as the contract tests use them."""

from __future__ import annotations

from taskguard.custody import Claim, Claimed, Hold
from taskguard.envelope import Envelope
from taskguard.ports import MessageStore
from taskguard.record import Attempt, Failure, Reason, Record

LEASE = 15.0
DAY = 86400.0


def message(
    key: str = "order-1", *, task_id: str = "task-1", sequence: int = 0, fingerprint: str = "same", body: bytes = b"[]"
) -> Envelope:
    """One delivery of the task ``shop.charge``."""
    return Envelope(
        task="shop.charge",
        task_id=task_id,
        key=key,
        body=body,
        headers={"id": task_id, "retries": sequence},
        properties={"delivery_mode": 2},
        routing_key="orders",
        queue="orders",
        fingerprint=fingerprint,
        sequence=sequence,
    )


def ask(store: MessageStore, envelope: Envelope, holder: str = "worker-1/a", *, max_crashes: int = 3) -> Claim:
    """Ask for custody under a lease of 15 seconds."""
    return store.claim(envelope, holder=holder, lease=LEASE, max_crashes=max_crashes)


def run(store: MessageStore, envelope: Envelope, holder: str = "worker-1/a") -> int:
    """Take custody, which must be granted. Returns the token."""
    answer = ask(store, envelope, holder)
    assert isinstance(answer, Claimed), answer
    return answer.token


def hold(envelope: Envelope, holder: str = "worker-1/a") -> Hold:
    """The run of *envelope* as its worker's parent process knows it."""
    return Hold(envelope.id, holder)


def existing(store: MessageStore, id: str) -> Record:
    """The record, which must be there."""
    record = store.find(id)
    assert record is not None, f"no record {id}"
    return record


def attempt(outcome: str, *, at: float = 1_750_000_000.0, error: str = "") -> Attempt:
    """One line of history, by worker-1."""
    return Attempt(at=at, worker="worker-1", outcome=outcome, error=error)


def failure(reason: Reason = Reason.PERMANENT_ERROR, text: str = "card refused") -> Failure:
    """A failure with its exception."""
    return Failure(reason=reason, error_type="PaymentError", message=text, traceback="Traceback: …\nPaymentError")
