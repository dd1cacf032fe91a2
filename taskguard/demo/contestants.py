"""The two that are put to the test: taskguard, and plain Celery. Same tasks, same workers, other guarantees."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar, Protocol

from taskguard.deadletters import DeadLetters
from taskguard.demo.apps import find_here
from taskguard.demo.ledger import Ends
from taskguard.demo.orders import Order
from taskguard.ports import MessageStore, PermitStore
from taskguard.record import State

LEASE = 3.0
VISIBILITY_TIMEOUT = 8.0
RETENTION = 900.0


class Contestant(Protocol):
    """How to run one, and how to ask it what became of the tasks. ``charge`` is its task."""

    title: str
    target: str
    charge: Any

    def environ(self) -> Mapping[str, str]:
        """What its workers are told beside broker, results and bank."""

    def stale(self, at: datetime) -> dict[str, Any]:
        """The options of a message that is stale after *at*."""

    def unsettled(self, placed: Sequence[Order]) -> int:
        """How many messages of the orders placed so far it knows to be unfinished, or knows nothing of."""

    def spares_the_bank(self) -> bool:
        """Whether it has given up calling the bank for now, but for probes."""

    def failures(self, orders: Iterable[Order]) -> Mapping[str, str]:
        """The failures that are visible now: the reason, by task id."""

    def ends(self, orders: Sequence[Order]) -> Ends:
        """What it shows of all tasks."""


class Guarded:
    """Celery with taskguard: what it knows is in the stores."""

    title = "taskguard"
    target = "workers.app"

    def __init__(self, store: MessageStore, permits: PermitStore) -> None:
        find_here()
        from workers.payments import bank, charge

        self.charge: Any = charge
        self._bank = bank.name
        self._store = store
        self._permits = permits

    def environ(self) -> Mapping[str, str]:
        return {"CHAOS_VISIBILITY_TIMEOUT": str(VISIBILITY_TIMEOUT)}

    def stale(self, at: datetime) -> dict[str, Any]:
        return {"deadline": at}

    def unsettled(self, placed: Sequence[Order]) -> int:
        depths = self._store.depths()
        return sum(depths[state].count for state in (State.PENDING, State.PUBLISHED, State.RUNNING))

    def spares_the_bank(self) -> bool:
        return self._permits.circuit(self._bank).state in ("open", "half_open")

    def failures(self, orders: Iterable[Order]) -> Mapping[str, str]:
        return {it.record.task_id: it.failure.reason.value for it in DeadLetters(self._store).select()}

    def ends(self, orders: Sequence[Order]) -> Ends:
        done = list(self._store.scan(State.DONE))
        return Ends(
            failed=self.failures(orders),
            discarded=frozenset(record.task_id for record in self._store.scan(State.DISCARDED)),
            finished=frozenset(record.task_id for record in done),
            crashes={record.task_id: record.crashes for record in done if record.crashes},
            suppresses=True,
        )


class Stock:
    """Plain Celery with late acknowledgement: what it knows is in its result backend."""

    title = "plain Celery"
    target = "workers.stock"
    _REASONS: ClassVar = {
        "WorkerLostError": "poison",
        "NotRegistered": "unknown_task",
        "BankRefused": "permanent_error",
        "BankUnavailable": "max_retries",
    }

    def __init__(self) -> None:
        find_here()
        from workers.stock import charge

        self.charge: Any = charge
        self._seen: dict[str, tuple[str, str]] = {}
        self._looked_at = 0.0

    def environ(self) -> Mapping[str, str]:
        return {}

    def stale(self, at: datetime) -> dict[str, Any]:
        return {"expires": at}

    def unsettled(self, placed: Sequence[Order]) -> int:
        return len({task_id for order in placed for task_id in order.task_ids} - self._seen.keys())

    def spares_the_bank(self) -> bool:
        return False

    def failures(self, orders: Iterable[Order]) -> Mapping[str, str]:
        if time.monotonic() - self._looked_at >= 1.0:
            self._look(orders)
        return {task_id: self._reason(error) for task_id, (state, error) in self._seen.items() if state == "FAILURE"}

    def ends(self, orders: Sequence[Order]) -> Ends:
        self._look(orders)
        return Ends(
            failed=self.failures(orders),
            discarded=frozenset(task_id for task_id, (state, _) in self._seen.items() if state == "REVOKED"),
            finished=frozenset(task_id for task_id, (state, _) in self._seen.items() if state == "SUCCESS"),
        )

    def _reason(self, error: str) -> str:
        return self._REASONS.get(error, "rejected")

    def _look(self, orders: Iterable[Order]) -> None:
        self._looked_at = time.monotonic()
        for task_id in {task_id for order in orders for task_id in order.task_ids} - self._seen.keys():
            meta = self.charge.backend.get_task_meta(task_id)
            if meta["status"] in ("SUCCESS", "FAILURE", "REVOKED"):
                self._seen[task_id] = (meta["status"], type(meta["result"]).__name__)
