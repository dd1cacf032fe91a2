"""From the outbox to the broker: the two ports between which the relay moves rows, a batch at a time.

The rows of an outbox are taken, published and removed in one step of the store: in a transaction that holds their locks
while the broker confirms, so that a relay which dies gives them back at once; or, where a lock would stop the writers
(SQLite), under a lease. The wire form goes through unread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from taskguard.clock import wall_clock
from taskguard.record import Attempt, Failure, Reason, brief

MAX_TRIES = 8
"""How often the broker may refuse a message before it is a dead letter; a broker that is away refuses nothing."""

FIRST_BACKOFF, LONGEST_BACKOFF = 1.0, 300.0
"""Seconds between a message's first refusal and its next try, doubled with each; and their bound."""

LATER = 5.0
"""Seconds that a message waits, untried, while something other than the broker keeps it from being published."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A row of the outbox that is due. ``ordering``: rows that share it (not "") are published one after the other."""

    id: str
    wire: bytes
    ordering: str = ""
    ordinal: int = 0
    tries: int = 0


@dataclass(frozen=True, slots=True)
class OutboxStatus:
    """How the outbox stands. Ages are seconds, 0 where there is none.

    waiting: due and not published. lag: age of the oldest of these. later: not due yet. retrying: refused before, due
    again later. dead: dead letters in this database. keys: ordering keys that have rows.
    """

    waiting: int
    lag: float
    later: int
    retrying: int
    dead: int
    keys: int


class Held(Exception):
    """Not published, and not at fault: an earlier message of its ordering key was not, or the broker is ``away``.

    later: why this one alone has to wait while the broker takes the others, as where a chord's result backend is away.
    """

    def __init__(self, away: Exception | None = None, *, later: Exception | None = None) -> None:
        super().__init__(away or later)
        self.away = away
        self.later = later


@dataclass(slots=True)
class Handed:
    """What became of a batch: how many were published, and of the others, which and why."""

    taken: int = 0
    published: int = 0
    refused: list[tuple[Outgoing, Exception]] = field(default_factory=list)
    away: Exception | None = None
    """The broker's error, where it ended the batch: what was left waits where it was."""
    later: Exception | None = None
    """Why some wait by themselves for `LATER` seconds, where some do."""


Dispatch = Callable[[Sequence[Outgoing]], Sequence[Exception | None]]
"""Publishes rows in order and confirmed. For each None, why it was refused, or `Held`."""


class Outbox(Protocol):
    """The rows that producers' transactions left in a database."""

    def hand_over(self, dispatch: Dispatch, *, limit: int, lease: float, retention: float) -> Handed:
        """Take up to *limit* rows that are due, *dispatch* them, and remove what was published.

        Removed, or kept for *retention* seconds. What was refused waits, longer each time, and becomes a dead letter
        after `MAX_TRIES`. Rows past their deadline are left to `take_due`. No row is taken before the earlier ones of
        its ordering key are published, or dead.
        """
        ...

    def wait(self, seconds: float) -> bool:
        """Return when rows may have come, or after so many seconds; True where the database told of some."""
        ...


class Dispatcher(Protocol):
    """Hands rows to the broker as they are."""

    def dispatch(self, rows: Sequence[Outgoing]) -> Sequence[Exception | None]:
        """See `Dispatch`."""
        ...


def backoff(tries: int) -> float:
    """Seconds that a message waits after it was refused *tries* times."""
    return min(FIRST_BACKOFF * 2.0 ** (tries - 1), LONGEST_BACKOFF)


def refusal(refused: Exception) -> tuple[Failure, Attempt]:
    """What is kept about a message that the broker refused."""
    kind = type(refused)
    text = f"{kind.__name__}: {brief(refused)}"
    failure = Failure(
        reason=Reason.UNPUBLISHABLE, error_type=kind.__name__, error_module=kind.__module__, message=brief(refused)
    )
    return failure, Attempt(at=wall_clock(), worker="relay", outcome="refused", error=text)


def unless_away(dispatch: Dispatch) -> Dispatch:
    """*dispatch* that raises the broker's error where it is away and nothing was done."""

    def dispatched(rows: Sequence[Outgoing]) -> Sequence[Exception | None]:
        outcomes = dispatch(rows)
        away = [outcome.away for outcome in outcomes if isinstance(outcome, Held)]
        if len(away) == len(rows) and away and away[0] is not None:
            raise away[0]
        return outcomes

    return dispatched
