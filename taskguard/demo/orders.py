"""The orders of the demo: most are plain, the others are what a queue meets in a bad year.

The same seed makes the same orders.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

FEWEST = 20


class Kind(StrEnum):
    """What is special about an order. It is the first word of its id, which is how the bank and the chaos know it."""

    PLAIN = "plain"
    TWICE = "twice"  # published again with the same arguments under a new task id, as by a second click
    COPIED = "copied"  # the same message twice, as by a producer whose reply was lost
    SLOW = "slow"  # the bank takes the money at once and answers seconds later
    FROZEN = "frozen"  # the bank refuses the account
    STALE = "stale"  # its deadline has passed when it is sent
    HURRIED = "hurried"  # its deadline passes a moment after
    POISON = "poison"  # kills the process that runs it
    UNKNOWN = "unknown"  # a task name that no worker knows
    UNDECODABLE = "undecodable"  # a body that is not JSON
    MISSHAPEN = "misshapen"  # a body that is JSON, but not arguments


SHARES = {
    Kind.TWICE: 0.05,
    Kind.COPIED: 0.05,
    Kind.SLOW: 0.016,
    Kind.FROZEN: 0.02,
    Kind.STALE: 0.01,
    Kind.HURRIED: 0.01,
    Kind.POISON: 0.01,
    Kind.UNKNOWN: 0.01,
    Kind.UNDECODABLE: 0.01,
    Kind.MISSHAPEN: 0.01,
}
LEAST = {Kind.SLOW: 2}
CALM_FROM = 0.9
"""The share of the orders after which nothing breaks down any more."""
_PLACED = {Kind.HURRIED: (0.25, 0.3), Kind.SLOW: (0.5, 0.75)}
_LAST = (Kind.TWICE, Kind.MISSHAPEN)
CHEAPEST, DEAREST = 199, 49999


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One order; ``amount`` is in cents. It is published once for each of ``task_ids``."""

    id: str
    kind: Kind
    amount: int
    task_ids: tuple[str, ...]


def make_orders(count: int, *, seed: int) -> list[Order]:
    """*count* orders in the sequence in which they are placed. Task ids are new each time.

    The hurried ones lie where the bank is down, so that their deadline passes before it answers. The slow ones lie in
    the third quarter, where a worker is killed over one of them. A second click lies in the calm at the end: elsewhere
    a worker that is killed may take one of its two messages along, and plain Celery charges such an order once, by
    luck. The misshapen ones come last, out of fairness: the first of them stops stock workers for good.
    """
    rng = random.Random(seed)
    special = {kind: max(LEAST.get(kind, 1), round(share * count)) for kind, share in SHARES.items()}
    late = [kind for kind in _LAST for _ in range(special[kind] if kind is Kind.MISSHAPEN else 1)]
    anywhere = {kind: number - late.count(kind) for kind, number in special.items() if kind not in _PLACED}
    kinds = [kind for kind, number in anywhere.items() for _ in range(number)]
    kinds += [Kind.PLAIN] * (count - sum(special.values()))
    rng.shuffle(kinds)
    for kind, (begin, end) in _PLACED.items():
        for number in range(special[kind]):
            kinds.insert(round(count * (begin + (end - begin) * number / special[kind])), kind)
    kinds += late
    return [
        Order(
            id=f"{kind}-{number:04d}",
            kind=kind,
            amount=rng.randint(CHEAPEST, DEAREST),
            task_ids=_task_ids(kind),
        )
        for number, kind in enumerate(kinds, 1)
    ]


def parts(orders: Sequence[Order]) -> tuple[int, int]:
    """How many orders are placed while things break down, and how many before the first misshapen one."""
    misshapen = [number for number, order in enumerate(orders) if order.kind is Kind.MISSHAPEN]
    return int(CALM_FROM * len(orders)), min(misshapen, default=len(orders))


def _task_ids(kind: Kind) -> tuple[str, ...]:
    first = str(uuid.uuid4())
    match kind:
        case Kind.TWICE:
            return first, str(uuid.uuid4())
        case Kind.COPIED:
            return first, first
        case _:
            return (first,)
