"""How a delivery ends: one of five settlements, matched in one place (`taskguard.celery.settle`)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from taskguard.errors import TaskOutcome
from taskguard.record import Failure


@dataclass(frozen=True, slots=True)
class Completed:
    """The work is done. ``value`` is what the body returned."""

    value: Any


@dataclass(frozen=True, slots=True)
class Replayed:
    """Completed before: ``result`` is the stored result, still encoded."""

    result: bytes


@dataclass(frozen=True, slots=True)
class Retried:
    """The run failed and its next attempt rests until ``due_at``."""

    due_at: float
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class Deferred:
    """Nothing ran; the message rests until ``due_at``, no attempt spent."""

    due_at: float
    why: str


@dataclass(frozen=True, slots=True)
class DeadLettered:
    """The message is a dead letter. ``error`` is the exception behind it, where this process has it."""

    failure: Failure
    error: BaseException | None = None


class Drop(StrEnum):
    """Why a delivery was discarded; the first four are shown in the result backend, the others are no one's outcome."""

    REVOKED = "revoked"
    EXPIRED = "expired"
    DUPLICATE = "duplicate"
    PURGED = "purged"
    IN_CUSTODY = "in_custody"
    SUPERSEDED = "superseded"
    CUSTODY_LOST = "custody_lost"
    IGNORED = "ignored"
    REPLACED = "replaced"


@dataclass(frozen=True, slots=True)
class Discarded:
    """The delivery is dropped on purpose. ``error``: what the caller is told, where the task asked to be told."""

    why: Drop
    error: TaskOutcome | None = None

    @property
    def visible(self) -> bool:
        """Whether this is the end of its task id, to be shown, and not just one delivery too many."""
        return self.why in (Drop.REVOKED, Drop.EXPIRED, Drop.DUPLICATE, Drop.PURGED)


Settlement = Completed | Replayed | Retried | Deferred | DeadLettered | Discarded
