"""What ``claim.lua`` is told, and what it answers."""

from __future__ import annotations

from typing import Any

from taskguard.custody import (
    Buried,
    Claim,
    Claimed,
    Completed,
    Conflict,
    Dropped,
    InProgress,
    Poisoned,
    Superseded,
)
from taskguard.envelope import Envelope
from taskguard.errors import StoreError
from taskguard.lifecycle import PUBLISHED_RETENTION
from taskguard.record import Failure
from taskguard.stores.redis.layout import decoded, encoded, envelope_arguments, ms


def claim_arguments(envelope: Envelope, holder: str, lease: float, max_crashes: int) -> tuple[bytes, ...]:
    """All but the instant, which is the first."""
    return (
        encoded(envelope.id),
        encoded(holder),
        ms(lease),
        b"%d" % max_crashes,
        ms(PUBLISHED_RETENTION),
        *envelope_arguments(envelope),
    )


def claim_of(reply: list[Any]) -> Claim:
    """What ``claim.lua`` answered. Raises StoreError for what another version may say."""
    match reply:
        case [b"claimed", token, crashes, history, *again]:
            return Claimed(int(token), int(crashes), decoded(history), repeated=bool(again))
        case [b"poisoned", token, crashes, history]:
            return Poisoned(int(token), int(crashes), decoded(history))
        case [b"completed", result]:
            return Completed(result)
        case [b"superseded"]:
            return Superseded()
        case [b"in_progress", same, task_id, left]:
            return InProgress(bool(same), decoded(task_id), int(left) / 1000)
        case [b"conflict", task_id]:
            return Conflict(decoded(task_id))
        case [b"buried", failure]:
            return Buried(Failure.from_json(decoded(failure)))
        case [b"dropped", reason]:
            return Dropped(decoded(reason))
    raise StoreError(f"claim: Redis answered {reply!r}; is another version of taskguard using this namespace?")
