"""The reckoning: every order against the bank's own books and against what the queue shows of it.

An order has a good end in exactly one place: charged once, or visible as a failure, or visibly discarded. Whatever is
in none is lost, whatever is charged more than once is charged twice, and whatever is in two places is a contradiction.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from taskguard.demo.orders import Order

SLOW_CALL = 0.4
"""Seconds after which an unanswered call is one the bank has taken the money for."""


@dataclass(frozen=True, slots=True)
class Bankings:
    """What the bank's books say of one order: its charges, and its calls by answer, 0 where none was given yet."""

    charges: int = 0
    answers: Counter[int] = field(default_factory=Counter)


NEVER_ASKED = Bankings()


class BankBooks:
    """Reads the bank's SQLite file, beside the bank."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(f"{self._path.as_uri()}?mode=ro", uri=True, timeout=5)) as db:
            yield db

    def charged(self) -> int:
        """How many orders have been charged."""
        with self._open() as db:
            return int(db.execute("SELECT count(DISTINCT order_id) FROM charges").fetchone()[0])

    def by_order(self) -> dict[str, Bankings]:
        """Everything, order by order."""
        with self._open() as db:
            calls = db.execute("SELECT order_id, coalesce(status, 0), count(*) FROM calls GROUP BY 1, 2").fetchall()
            charges = dict(db.execute("SELECT order_id, count(*) FROM charges GROUP BY 1").fetchall())
        answers: dict[str, Counter[int]] = {}
        for order_id, status, count in calls:
            answers.setdefault(order_id, Counter())[status] = count
        return {
            order_id: Bankings(charges.get(order_id, 0), answers.get(order_id, Counter()))
            for order_id in answers.keys() | charges.keys()
        }

    def turned_away(self, *, since: float) -> int:
        """How many calls since that instant were answered 503."""
        with self._open() as db:
            counted = db.execute("SELECT count(*) FROM calls WHERE status = 503 AND at >= ?", (since,))
            return int(counted.fetchone()[0])

    def in_hand(self, caller: str = "", *, within: float = 3600.0) -> list[tuple[str, str]]:
        """Orders whose money is taken and whose caller has no answer yet, each with its caller.

        Those that were asked for no more than *within* seconds ago.
        """
        with self._open() as db:
            found = db.execute(
                "SELECT DISTINCT calls.order_id, caller FROM calls JOIN charges USING (order_id)"
                " WHERE status IS NULL AND calls.at BETWEEN ? AND ? AND caller LIKE ? || '%'",
                ((now := time.time()) - within, now - SLOW_CALL, caller),
            )
            return [(str(order_id), str(who)) for order_id, who in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """What the queue shows of its tasks, by task id. ``failed`` maps to a reason, ``crashes`` to how many.

    suppresses: whether it suppresses duplicates at all; where it does not, one that never ran was not suppressed.
    """

    failed: Mapping[str, str] = field(default_factory=dict)
    discarded: frozenset[str] = frozenset()
    finished: frozenset[str] = frozenset()
    crashes: Mapping[str, int] = field(default_factory=dict)
    suppresses: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Reckoning:
    """One column of the final table. Counts, but for ``seconds``.

    sent counts messages, delivered how often one was handed to a worker. unavailable, limited, refused and repeated are
    calls: answered 503, 429 and 403, and those whose key the bank had charged before. probes are those of the
    unavailable that were made after the circuit had opened. suppressed are duplicates that never reached the bank. held
    are orders in the hands of the worker that was killed, rescued those of them that were finished by another. hidden
    are lost orders whose message the broker still keeps in a dead worker's name.
    """

    orders: int
    sent: int
    duplicates: int
    delivered: int
    calls: int
    unavailable: int
    probes: int
    limited: int
    refused: int
    repeated: int
    charges: int
    suppressed: int
    held: int
    rescued: int
    dead: Mapping[str, int]
    discarded: int
    lost: int
    hidden: int
    charged_twice: int
    contradictions: int
    seconds: float

    @property
    def good(self) -> bool:
        """Nothing lost, nothing done twice, nothing in two places."""
        return not (self.lost or self.charged_twice or self.contradictions)


def outcome(order: Order, bank: Bankings, ends: Ends) -> str:
    """Where the order ended: charged, twice, dead, discarded, both, or lost."""
    failed = any(task_id in ends.failed for task_id in order.task_ids)
    discarded = all(task_id in ends.discarded for task_id in order.task_ids)
    match bank.charges, failed, discarded:
        case 0, True, _:
            return "dead"
        case 0, _, True:
            return "discarded"
        case 0, _, _:
            return "lost"
        case 1, False, False:
            return "charged"
        case 1, _, _:
            return "both"
        case _:
            return "twice"


def reckon(
    orders: Sequence[Order],
    books: Mapping[str, Bankings],
    ends: Ends,
    *,
    deliveries: Counter[str],
    held: Sequence[str],
    hidden: Set[str],
    probes: int,
    seconds: float,
) -> Reckoning:
    """Account for every order. *held* are ids of orders, *hidden* of tasks, *deliveries* counts by task id."""
    outcomes = {order.id: outcome(order, books.get(order.id, NEVER_ASKED), ends) for order in orders}
    tally = Counter(outcomes.values())
    answers: Counter[int] = Counter()
    for bank in books.values():
        answers += bank.answers
    dead = Counter(
        next(ends.failed[task_id] for task_id in order.task_ids if task_id in ends.failed)
        for order in orders
        if outcomes[order.id] == "dead"
    )
    rescued = [order for order in orders if order.id in held and any(t in ends.finished for t in order.task_ids)]
    sent = sum(len(order.task_ids) for order in orders)
    return Reckoning(
        orders=len(orders),
        sent=sent,
        duplicates=sent - len(orders),
        delivered=deliveries.total(),
        calls=answers.total(),
        unavailable=answers[503],
        probes=probes,
        limited=answers[429],
        refused=answers[403],
        repeated=answers[200],
        charges=sum(bank.charges for bank in books.values()),
        suppressed=sum(_suppressed(order, books.get(order.id, NEVER_ASKED), ends) for order in orders),
        held=len(held),
        rescued=len(rescued),
        dead=dict(dead.most_common()),
        discarded=tally["discarded"],
        lost=tally["lost"],
        hidden=sum(outcomes[order.id] == "lost" and not hidden.isdisjoint(order.task_ids) for order in orders),
        charged_twice=tally["twice"],
        contradictions=tally["both"],
        seconds=round(seconds, 1),
    )


def _suppressed(order: Order, bank: Bankings, ends: Ends) -> int:
    """Duplicates of a charged order that did not reach the bank. A rescued run may reach it once more by right."""
    extra = len(order.task_ids) - 1
    if not ends.suppresses or not bank.charges:
        return 0
    reached = bank.answers[201] + bank.answers[200] + bank.answers[0]
    by_right = 1 + sum(ends.crashes.get(task_id, 0) for task_id in set(order.task_ids))
    return extra - min(extra, max(0, reached - by_right))
