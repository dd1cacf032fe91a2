"""Permits on a SQL database: one row per cell. The pure functions decide between reading rows and writing them.

A refusal changes nothing, and is one query without a lock. Where one cell changes, its row is written if it still says
what was read: a state says all there is to say, so whoever finds it unchanged has decided as if nobody had been there.
Else, and where several cells change, it is decided again in a transaction, with the rows locked in the order of their
ids. A row that was not there is inserted: if another was faster, the operation runs again, so that two first calls
cannot both have the last permit. A crash at any point leaves what was committed. The instant is the server's clock's
(`Database.now`), read after the rows; what two processes disagree about it is within `limits.SKEW`.

On PostgreSQL nobody waits for the disk: a server that loses its power may forget the permits of its last half second.
MySQL can be told so only for all (``innodb_flush_log_at_trx_commit = 2``).

Rows that say nothing any more are deleted in small batches, by the thread that tends the process: one statement for all
of them would outlast the timeout as soon as they are many, be undone, and so never end.

A circuit's changes are found by asking every 50 ms. Rejected: LISTEN/NOTIFY, which MySQL and SQLite do not have, and
which a connection pooler in front of PostgreSQL swallows.
"""

from __future__ import annotations

import json
import math
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Self, TypeVar

from sqlalchemy import ColumnElement, Connection, Executable, Select, and_, delete, insert, select, update

from taskguard.clock import Clock, from_us, to_ms, to_us
from taskguard.downstream.tending import begins_anew, tending
from taskguard.envelope import record_id
from taskguard.errors import ConfigurationError, StoreError
from taskguard.limits.admission import Cell, CellKind, Change, State
from taskguard.stores.cells import POLL, CellStore, Changes, Work
from taskguard.stores.sql.database import Database
from taskguard.stores.sql.dialect import PostgreSQL, dialect_of
from taskguard.stores.sql.schema import NAMESPACE_LENGTH, permits

T = TypeVar("T")

SWEPT_EVERY = 60.0
"""Seconds between two removals, by this process, of rows that say nothing any more."""
SWEPT_AGAIN = 0.05
"""Seconds until the next batch, where one was full."""
BATCH = 500
"""Rows that are deleted at once."""
_MARGIN_MS = 60_000
"""For which such a row stays: another process's clock may be behind ours."""
_c = permits.c


class SQLPermits(CellStore):
    """A `PermitStore` on PostgreSQL, MySQL or MariaDB, or SQLite. It makes its tables when it first needs them.

    Each wait for the database ends after *timeout* seconds, and nothing is tried again after that.
    """

    askers = 4
    """Threads of one process that ask at once, where a limiter asks for coroutines. More would wait for each other at
    the row of a busy limit, and for connections, until their timeouts say that the database is down."""

    def __init__(self, database: Database, *, namespace: str) -> None:
        if len(namespace) > NAMESPACE_LENGTH:
            raise ConfigurationError(
                f"namespace: {namespace!r} is too long for a SQL store; use {NAMESPACE_LENGTH} characters or less"
            )
        self._database = database
        self._namespace = namespace
        self._insert_new = database.dialect.insert_new(permits).execution_options(preserve_rowcount=True)
        self.after_fork()
        begins_anew(self)

    def after_fork(self) -> None:
        """A child sweeps by itself."""
        self._sweeps = _Sweeps(self)

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        namespace: str = "default",
        timeout: float = 0.1,
        clock: Clock | None = None,
        creates: bool = True,
    ) -> Self:
        """The permits in the database at *url*. Nothing is connected yet.

        Raises ConfigurationError for a URL that cannot be one, ModuleNotFoundError when the driver is not installed.
        """
        dialect = dialect_of(url)
        if isinstance(dialect, PostgreSQL):
            given = dialect.url.query.get("options", "")
            options = f"{given if isinstance(given, str) else ' '.join(given)} -c synchronous_commit=off".strip()
            dialect = PostgreSQL(dialect.url.update_query_dict({"options": options}))
        return cls(Database(dialect, timeout=timeout, clock=clock, creates=creates), namespace=namespace)

    def _run(self, cells: Sequence[Cell], work: Work[T]) -> T:
        if not cells:
            return work({}, to_us(self.now()))[0]
        ids = {record_id(*cell): cell for cell in cells}
        attempt = None if any(kind == "log" for kind, _ in cells) else self._database.run(partial(self._try, ids, work))
        answer = attempt[0] if attempt else self._database.run(partial(self._locked, ids, work), transaction=True)
        self._sweeps.arm()
        return answer

    def _try(self, ids: Mapping[str, Cell], work: Work[T], connection: Connection) -> tuple[T] | None:
        """The answer, where at most one cell changes and nobody else changed it meanwhile; else None, and nothing."""
        texts = {ids[id]: text for id, text in connection.execute(self._query(ids))}
        found = {cell: _state(text) for cell, text in texts.items()}
        answer, changes = work(found, to_us(self._database.now(connection)))
        if not changes:
            return (answer,)
        (cell, change), *others = changes.items()
        if others or change is None:
            return None
        write: Executable
        if cell in texts:
            where = and_(self._is([record_id(*cell)]), _c.state == texts[cell])
            write = update(permits).where(where).values(_row(change))
        else:
            write = self._insert_new.values(self._new(cell, change))
        return (answer,) if connection.execute(write).rowcount == 1 else None

    def _locked(self, ids: Mapping[str, Cell], work: Work[T], connection: Connection) -> T:
        rows = connection.execute(self._query(ids).with_for_update())
        found = {ids[id]: _state(text) for id, text in rows}
        answer, changes = work(found, to_us(self._database.now(connection)))
        self._write(connection, found, changes)
        return answer

    def _all(self, kind: CellKind) -> tuple[dict[str, State], float]:
        query = select(_c.name, _c.state).where(_c.namespace == self._namespace, _c.kind == kind)

        def read(connection: Connection) -> tuple[dict[str, State], float]:
            rows = connection.execute(query).all()
            return {name: _state(text) for name, text in sorted(rows)}, to_us(self._database.now(connection))

        return self._database.run(read)

    def _rest(self) -> None:
        self._sweeps.arm()
        time.sleep(POLL)

    def now(self) -> float:
        return from_us(to_us(self._database.run(self._database.now)))

    def close(self) -> None:
        self._sweeps.due_at = math.inf
        self._database.close()

    def _query(self, ids: Mapping[str, Cell]) -> Select[str, str]:
        return select(_c.id, _c.state).where(self._is(list(ids))).order_by(_c.id)

    def _write(self, connection: Connection, found: Mapping[Cell, State], changes: Changes) -> None:
        new = []
        for id, (cell, change) in sorted((record_id(*cell), (cell, change)) for cell, change in changes.items()):
            if change is None:
                connection.execute(delete(permits).where(self._is([id])))
            elif cell in found:
                connection.execute(update(permits).where(self._is([id])).values(_row(change)))
            else:
                new.append(self._new(cell, change))
        if new:
            connection.execute(insert(permits), new)

    def _new(self, cell: Cell, change: Change) -> dict[str, object]:
        kind, name = cell
        return {"namespace": self._namespace, "id": record_id(*cell), "kind": kind, "name": name, **_row(change)}

    def sweep(self) -> int:
        """Delete up to `BATCH` rows that say nothing any more. Returns how many were found. Raises StoreError."""

        def sweep(connection: Connection) -> int:
            over = to_ms(self._database.now(connection)) - _MARGIN_MS
            ended = and_(_c.namespace == self._namespace, _c.expires_at <= over)
            ids = connection.execute(select(_c.id).where(ended).order_by(_c.expires_at).limit(BATCH)).scalars().all()
            if ids:  # in one order, so that two processes do not deadlock; and not what has begun anew meanwhile
                connection.execute(delete(permits).where(ended, _c.id.in_(sorted(ids))))
            return len(ids)

        return self._database.run(sweep)

    def _is(self, ids: Sequence[str]) -> ColumnElement[bool]:
        return and_(_c.namespace == self._namespace, _c.id == ids[0] if len(ids) == 1 else _c.id.in_(ids))


class _Sweeps:
    """The chore that deletes rows, while the permits are used."""

    def __init__(self, permits: SQLPermits) -> None:
        self._permits = weakref.ref(permits)
        self.due_at = math.inf
        self._known = False

    def arm(self) -> None:
        if self.due_at == math.inf:
            self.due_at = time.monotonic() + SWEPT_EVERY
            if not self._known:
                self._known = True
                tending.add(self)
            else:
                tending.wake()

    def tend(self) -> None:
        permits = self._permits()
        if permits is None:
            self.due_at = math.inf
        elif time.monotonic() >= self.due_at:  # else the process ends, and has better to do
            self.due_at = math.inf
            with suppress(StoreError):  # the rows are only in the way; the next one in a minute finds them
                if permits.sweep() >= BATCH:
                    self.due_at = time.monotonic() + SWEPT_AGAIN


def _state(text: str) -> State:
    return tuple(json.loads(text))


def _row(change: Change) -> dict[str, object]:
    return {
        "state": json.dumps(change.state, separators=(",", ":")),
        "expires_at": None if change.until is None else to_ms(from_us(change.until)) + 1,
    }
