"""Records in a dictionary under one lock. Promises everything the contract asks for, until the process ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, TypeVar

from taskguard.clock import Clock, wall_clock
from taskguard.custody import Depth
from taskguard.record import Record, State
from taskguard.stores.records import RecordStore, Unit

T = TypeVar("T")


class _Unit:
    """Changes are collected and written when the unit ends, so that an exception leaves nothing behind."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._written: dict[str, Record | None] = {}
        self.now = store.now()

    def lock(self, ids: Iterable[str]) -> None:
        """The store's lock is held already."""

    def get(self, id: str) -> Record | None:
        record = self._written[id] if id in self._written else self._store.records.get(id)
        if record is not None and record.expires_at is not None and record.expires_at <= self.now:
            return None
        return record

    watch = get

    def put(self, record: Record) -> None:
        self._written[record.id] = record

    def delete(self, id: str) -> None:
        self._written[id] = None

    def wake(self, id: str) -> None:
        for record in map(self.get, self._store.waiting.get(id, ())):
            if record is not None and record.waits_on == id and record.state is State.PENDING:
                self.put(replace(record, waits_on="", due_at=self.now))

    def due(self, limit: int) -> list[Record]:
        found = [r for r in self._store.records.values() if r.due_at is not None and r.due_at <= self.now]
        return sorted(found, key=lambda r: (r.due_at or 0.0, r.id))[:limit]

    def revoked(self, task_id: str) -> bool:
        return self._store.revocations.get(task_id, 0.0) > self.now

    def unique_holder(self, name: str) -> str | None:
        task_id, until = self._store.uniques.get(name, ("", 0.0))
        return task_id if until > self.now else None

    def hold_unique(self, name: str, task_id: str, *, until: float) -> None:
        self._store.uniques[name] = (task_id, until)

    def drop_unique(self, name: str) -> None:
        self._store.uniques.pop(name, None)

    def commit(self) -> None:
        for id, record in self._written.items():
            self._store.keep(id, record)


class MemoryStore(RecordStore):
    """A `MessageStore` in process memory. Its clock is the process's unless one is given."""

    _shared: ClassVar[dict[str, MemoryStore]] = {}

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or wall_clock
        self._lock = threading.RLock()
        self.records: dict[str, Record] = {}
        self.waiting: dict[str, set[str]] = {}
        self.revocations: dict[str, float] = {}
        self.uniques: dict[str, tuple[str, float]] = {}

    @classmethod
    def shared(cls, namespace: str, *, clock: Clock | None = None) -> MemoryStore:
        """The process's store of this namespace; with a clock of its own, a new one."""
        if clock is not None:
            return cls(clock)
        return cls._shared.setdefault(namespace, cls())

    def _run(self, work: Callable[[Unit], T]) -> T:
        with self._lock:
            unit = _Unit(self)
            answer = work(unit)
            unit.commit()
            return answer

    def keep(self, id: str, record: Record | None) -> None:
        """Put the record in its place, None to remove it, and know who waits on whom."""
        before = self.records.get(id)
        if before is not None and before.waits_on:
            self.waiting[before.waits_on].discard(id)
            if not self.waiting[before.waits_on]:
                del self.waiting[before.waits_on]
        if record is None:
            self.records.pop(id, None)
            return
        self.records[id] = record
        if record.waits_on:
            self.waiting.setdefault(record.waits_on, set()).add(id)

    def due_in(self) -> float | None:
        with self._lock:
            due_at = min((r.due_at for r in self.records.values() if r.due_at is not None), default=None)
            return None if due_at is None else due_at - self.now()

    def revoke(self, task_ids: Sequence[str], *, retention: float) -> None:
        with self._lock:
            until = self.now() + retention
            self.revocations.update(dict.fromkeys(task_ids, until))

    def scan(self, state: State) -> Iterator[Record]:
        with self._lock:
            found = sorted((r for r in self.records.values() if r.state is state), key=lambda r: (r.updated_at, r.id))
        return iter(found)

    def depths(self) -> Mapping[State, Depth]:
        depths = {}
        for state in State:
            entered = [record.updated_at for record in self.scan(state)]
            depths[state] = Depth(len(entered), min(entered, default=None))
        return depths

    def expire(self, *, limit: int) -> int:
        with self._lock:
            now = self.now()
            over = [r.id for r in self.records.values() if r.expires_at is not None and r.expires_at <= now][:limit]
            for id in over:
                self.keep(id, None)
            for table in (self.revocations, self.uniques):
                for name in [n for n, v in table.items() if (v[1] if isinstance(v, tuple) else v) <= now]:
                    del table[name]
            return len(over)

    def now(self) -> float:
        return self._clock()

    def ping(self) -> None:
        """Process memory always answers."""

    def close(self) -> None:
        """Nothing to give back."""
