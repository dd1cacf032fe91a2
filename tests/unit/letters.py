"""Dead letters as the operator's tests use them."""

from __future__ import annotations

import json
from typing import Any

from taskguard.envelope import Envelope
from taskguard.ports import MessageStore
from taskguard.record import Attempt, Failure, Reason

HOSTILE = "\x1b[2J\x1b]0;owned\x07 [bold]markup[/] \u202eright to left\u2066 \x9b31m \ud800"
EMBED = {"callbacks": None, "errbacks": None, "chain": [{"task": "shop.ship"}], "chord": None}


def message(order: int = 1, **changes: Any) -> Envelope:
    """A message of ``shop.charge`` as a producer sent it, at its third retry."""
    task_id = changes.pop("task_id", f"task-{order}")
    given: dict[str, Any] = {
        "task": "shop.charge",
        "task_id": task_id,
        "key": f"charge:{order}",
        "body": json.dumps([[order], {"amount": 5}, EMBED]).encode(),
        "headers": {"id": task_id, "retries": 3, "eta": None, "redelivered": True, "x-delivery-count": 4},
        "properties": {"delivery_mode": 2},
        "routing_key": "orders",
        "queue": "orders",
        "fingerprint": "before",
        "sequence": 3,
    }
    return Envelope(**{**given, **changes})


def failure(reason: Reason = Reason.MAX_RETRIES, text: str = "bank said 503", kind: str = "BankError") -> Failure:
    """Why it died."""
    return Failure(reason=reason, error_type=kind, message=text, traceback=f"Traceback: …\n{kind}: {text}")


def bury(store: MessageStore, envelope: Envelope, why: Failure | None = None) -> str:
    """A dead letter that was never claimed, after one retry. Returns its id."""
    history = Attempt(at=1_749_999_000.0, worker="celery@one/4f", outcome="retry", error="BankError: 503").to_json()
    return store.bury_message(envelope, failure=why or failure(), history=history)


def bury_run(store: MessageStore, envelope: Envelope, why: Failure | None = None) -> str:
    """A dead letter of a message that was claimed and ran. Returns its id."""
    answer = store.claim(envelope, holder=f"celery@one/{envelope.task_id}", lease=15, max_crashes=3)
    token = getattr(answer, "token", None)
    assert token is not None, answer
    assert store.bury(envelope.id, token, failure=why or failure(), attempt=None)
    return envelope.id
