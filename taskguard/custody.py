"""What a store answers when a worker asks for custody of a message, and the tickets it hands out."""

from __future__ import annotations

from dataclasses import dataclass, field

from taskguard.envelope import Envelope
from taskguard.permits import Answer
from taskguard.record import Attempt, Failure


@dataclass(frozen=True, slots=True)
class Claimed:
    """The run is yours: show ``token`` with all that follows. ``crashes`` earlier runs ended without an outcome.

    ``repeated``: this holder had claimed it before, and is told again.
    """

    token: int
    crashes: int = 0
    history: str = ""
    repeated: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Poisoned:
    """Claimed, but only to be buried: ``crashes`` runs ended without an outcome."""

    token: int
    crashes: int
    history: str = ""


@dataclass(frozen=True, slots=True)
class Completed:
    """The key was completed; this is its stored result."""

    result: bytes


@dataclass(frozen=True, slots=True)
class InProgress:
    """The key is queued or running. ``same_message``: by another delivery of this very message, which settles it.

    ``holder_task_id`` is the task id of the message in custody, ``retry_after`` seconds until its lease ends.
    """

    same_message: bool
    holder_task_id: str
    retry_after: float


@dataclass(frozen=True, slots=True)
class Superseded:
    """A newer attempt of this message exists; this delivery is an old copy."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """The key belongs to a message with another payload."""

    holder_task_id: str


@dataclass(frozen=True, slots=True)
class Buried:
    """This very message is a dead letter already; show its failure again."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Dropped:
    """This very message was discarded already, or revoked; show that again."""

    reason: str


Claim = Claimed | Poisoned | Completed | InProgress | Superseded | Conflict | Buried | Dropped


@dataclass(frozen=True, slots=True)
class Resting:
    """What a run becomes at once where its permits are refused: the next delivery, due at the slot it was given."""

    following: Envelope
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Entered:
    """A claim that asked for permits too. ``answer`` is None where custody was not given, or given before, or where the
    permits failed: they are asked for by themselves then.

    ``due_at``: the message rests until then, the run is over. None: it does not.
    """

    claim: Claim
    answer: Answer | None = None
    due_at: float | None = None


@dataclass(frozen=True, slots=True)
class Hold:
    """A run as the worker's parent process knows it: the record, and the holder it handed to the child."""

    id: str
    holder: str


@dataclass(frozen=True, slots=True)
class Leased:
    """A due message a relay has leased: publish ``wire``, then `remove` it by showing ``lease``.

    ``rescued``: a run of it ended without an outcome; it has stood in its queue before.
    """

    id: str
    lease: str
    wire: bytes
    rescued: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Unique:
    """Hold ``name`` for ``seconds`` so that no second message with it is queued."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class ResultEntry:
    """A result as a result backend on the store's own server keeps it: written with the completion, in one step.

    ``expires`` in seconds, 0 for never; who waits for the result is told on the channel ``key``.
    """

    database: int
    key: bytes
    payload: bytes
    expires: int


@dataclass(frozen=True, slots=True)
class Depth:
    """How many records are in a state, and the instant the oldest entered it (epoch seconds, None when empty)."""

    count: int
    oldest_at: float | None
