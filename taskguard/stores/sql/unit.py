"""One unit of work in one transaction: what it read is locked, what it changed is written at the end.

Only changed columns are written, and records that change alike (a batch renewed, removed, leased out) in one statement.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property

from sqlalchemy import ColumnElement, Connection, and_, delete, insert, literal, or_, select, update

from taskguard.clock import to_ms
from taskguard.envelope import record_id
from taskguard.record import Record, State
from taskguard.stores.sql.database import Database
from taskguard.stores.sql.schema import RECORD, messages, revocations, to_record, to_row, uniques

_c = messages.c
_WHOLE = tuple(RECORD)
_LIGHT = tuple(
    literal(b"", column.type).label(column.key) if column is _c.wire or column is _c.result else column
    for column in RECORD
)


class SQLUnit:
    """A `Unit` on a connection that is inside a transaction. `flush` writes what was put."""

    def __init__(self, connection: Connection, database: Database, namespace: str) -> None:
        self._connection = connection
        self._database = database
        self._namespace = namespace
        self._read: dict[str, Record | None] = {}
        self._written: dict[str, Record | None] = {}
        self._names: dict[str, bool] = {}

    @cached_property
    def now(self) -> float:
        """Read when it is first needed: after the wait for a lock, not before."""
        return self._database.now(self._connection)

    def lock(self, ids: Iterable[str]) -> None:
        self._load(sorted({id for id in ids if id not in self._read}), _LIGHT)

    def get(self, id: str) -> Record | None:
        if id not in self._read:
            self._load([id], _WHOLE)
        record = self._written[id] if id in self._written else self._read[id]
        if record is not None and record.expires_at is not None and record.expires_at <= self.now:
            return None
        return record

    def watch(self, id: str) -> Record | None:
        self.lock([id])
        record = self.get(id)
        if record is not None:
            # A change of the row, not only its lock: whoever waits for the row then looks at it again.
            self._connection.execute(update(messages).where(self._is([id])).values(awaited=True))
        return record

    def put(self, record: Record) -> None:
        self.lock([record.id])
        self._written[record.id] = record

    def delete(self, id: str) -> None:
        self._written[id] = None

    def wake(self, id: str) -> None:
        waits = and_(_c.waits_on == id, _c.waits_on != literal("", literal_execute=True))
        waiting = and_(_c.namespace == self._namespace, waits, _c.state == State.PENDING.value)
        self._connection.execute(update(messages).where(waiting).values(waits_on="", due_at=to_ms(self.now)))

    def due(self, limit: int) -> list[Record]:
        # What is in the outbox is handed over as it is, unless it is late.
        late = and_(_c.outbox, _c.deadline_at <= to_ms(self.now))
        query = (
            select(*_WHOLE)
            .where(_c.namespace == self._namespace, _c.due_at <= to_ms(self.now), or_(~_c.outbox, late))
            .order_by(_c.due_at, _c.id)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        found = [to_record(row) for row in self._connection.execute(query)]
        self._read.update((record.id, record) for record in found)
        return found

    def revoked(self, task_id: str) -> bool:
        query = select(revocations.c.until_at).where(
            revocations.c.namespace == self._namespace, revocations.c.id == record_id(task_id)
        )
        until = self._connection.execute(query).scalar()
        return until is not None and until > to_ms(self.now)

    def unique_holder(self, name: str) -> str | None:
        row = self._connection.execute(
            select(uniques.c.task_id, uniques.c.until_at).where(self._named(name)).with_for_update()
        ).one_or_none()
        self._names[name] = row is not None
        return row.task_id if row is not None and row.until_at > to_ms(self.now) else None

    def hold_unique(self, name: str, task_id: str, *, until: float) -> None:
        held = {"task_id": task_id, "until_at": to_ms(until)}
        if self._names[name]:
            self._connection.execute(update(uniques).where(self._named(name)).values(held))
        else:  # Whoever inserted it since we looked holds it: the error has the unit run again.
            row = {"namespace": self._namespace, "id": record_id(name), "name": name, **held}
            self._connection.execute(insert(uniques), row)

    def drop_unique(self, name: str) -> None:
        self._connection.execute(delete(uniques).where(self._named(name)))

    def flush(self) -> None:
        """Write what was put and deleted.

        A record that was not there is inserted: if another transaction was faster, the error has the unit run again.
        """
        gone, new = [], []
        changed: defaultdict[tuple[tuple[str, object], ...], list[str]] = defaultdict(list)
        for id, after in self._written.items():
            before = self._read.get(id)
            if after is None:
                gone.append(id)
            elif before is None:
                new.append({"namespace": self._namespace, "awaited": False, **to_row(after)})
            else:
                was = to_row(before)
                changes = tuple((name, value) for name, value in to_row(after).items() if value != was[name])
                changed[changes].append(id)
        if gone:
            self._connection.execute(delete(messages).where(self._is(gone)))
        if new:
            self._connection.execute(insert(messages), new)
        for changes, ids in changed.items():
            if changes:
                self._connection.execute(update(messages).where(self._is(ids)).values(dict(changes)))

    def _load(self, ids: Sequence[str], columns: Sequence[ColumnElement[object]]) -> None:
        if not ids:
            return
        query = select(*columns).where(self._is(ids)).order_by(_c.id).with_for_update()
        self._read.update(dict.fromkeys(ids))
        self._read.update((record.id, record) for record in map(to_record, self._connection.execute(query)))

    def _is(self, ids: Sequence[str]) -> ColumnElement[bool]:
        which = _c.id == ids[0] if len(ids) == 1 else _c.id.in_(ids)
        return and_(_c.namespace == self._namespace, which)

    def _named(self, name: str) -> ColumnElement[bool]:
        return and_(uniques.c.namespace == self._namespace, uniques.c.id == record_id(name))
