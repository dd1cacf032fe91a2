"""The message store on a SQL database: one row per record, one transaction per operation.

The two operations of every run, `claim` of a new key and `complete`, are one statement each, committed by itself; what
they cannot decide falls back to the transaction that all others use. A crash at any point leaves what was committed:
nothing is written in two steps. Rejected: advisory locks (they end with the connection, not with the lease), a ping at
each checkout, and asking for the server's clock in every operation (see `Database.now`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

from sqlalchemy import (
    Connection,
    Engine,
    String,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.orm import Session

from taskguard import lifecycle
from taskguard.clock import Clock, to_ms
from taskguard.custody import Claim, Claimed, Depth, ResultEntry
from taskguard.envelope import Envelope, record_id
from taskguard.errors import ConfigurationError
from taskguard.record import Record, State
from taskguard.stores.records import RecordStore, Unit
from taskguard.stores.sql.database import Database
from taskguard.stores.sql.dialect import dialect_of
from taskguard.stores.sql.outbox import SQLOutbox
from taskguard.stores.sql.schema import (
    LISTED,
    NAMESPACE_LENGTH,
    RECORD,
    messages,
    revocations,
    to_record,
    to_row,
    uniques,
)
from taskguard.stores.sql.transactional import End, RunTransaction, ended, engine_for_runs, factory_of, seen
from taskguard.stores.sql.unit import SQLUnit

T = TypeVar("T")
PAGE = 500
_c = messages.c

# What a first claim writes, read off `lifecycle.claim` itself: only these columns depend on the message and the moment.
_VARYING = frozenset(
    {"id", "task", "task_id", "key", "sequence", "fingerprint", "queue", "token", "holder", "due_at", "wire"}
    | {"created_at", "updated_at"}
)
_SAMPLE = Envelope(task="", task_id="", key="", body=b"")
_FIRST, _ = lifecycle.claim(None, _SAMPLE, holder="", lease=0.0, max_crashes=1, now=0.0)
_SAME = {name: value for name, value in to_row(_FIRST).items() if name not in _VARYING and value is not None}

# One statement sees the revocations that were committed before it began, and inserts or does not.
_NEW = {name: bindparam(f"new_{name}", None, _c[name].type) for name in ("namespace", *sorted(_VARYING))} | {
    name: literal(value, _c[name].type, literal_execute=True) for name, value in {**_SAME, "awaited": False}.items()
}
_NEW_UNLESS_REVOKED = select(*_NEW.values()).where(
    ~exists().where(
        revocations.c.namespace == _NEW["namespace"],
        revocations.c.id == bindparam("revocation", None, String),
        revocations.c.until_at > _NEW["updated_at"],
    )
)

# `lifecycle.complete`, for a run that nothing waits for and whose message the broker still has.
_COMPLETE = (
    update(messages)
    .where(
        _c.namespace == bindparam("in_namespace", None, _c.namespace.type),
        _c.id == bindparam("run", None, _c.id.type),
        _c.token == bindparam("shown", None, _c.token.type),
        _c.state == literal(State.RUNNING.value, literal_execute=True),
        ~_c.awaited,
        ~_c.kept,
    )
    .values(
        state=literal(State.DONE.value, literal_execute=True),
        result=bindparam("answer", None, _c.result.type),
        holder=literal("", literal_execute=True),
        due_at=null(),
        wire=null(),
        expires_at=bindparam("until", None, _c.expires_at.type),
        updated_at=bindparam("now", None, _c.updated_at.type),
    )
)


def first_run(envelope: Envelope, *, holder: str, lease: float, now: float) -> dict[str, Any]:
    """What depends on the message and the moment in the row of `lifecycle.claim` where there is no record, without the
    records in between: they take as long as the statement."""
    moment = to_ms(now)
    return {
        "new_id": envelope.id,
        "new_task": envelope.task,
        "new_task_id": envelope.task_id,
        "new_key": envelope.key,
        "new_sequence": envelope.sequence,
        "new_fingerprint": envelope.fingerprint,
        "new_queue": envelope.queue,
        "new_token": max(1, moment),
        "new_holder": holder,
        "new_due_at": to_ms(now + lease),
        "new_wire": envelope.to_wire(),
        "new_created_at": moment,
        "new_updated_at": moment,
    }


class SQLStore(RecordStore):
    """A `MessageStore` on PostgreSQL, MySQL or MariaDB, or SQLite. It makes its tables when it first needs them.

    Each wait for the database ends after *timeout* seconds, and nothing is tried again after that.
    """

    def __init__(self, database: Database, *, namespace: str) -> None:
        if len(namespace) > NAMESPACE_LENGTH:
            raise ConfigurationError(
                f"namespace: {namespace!r} is too long for a SQL store; use {NAMESPACE_LENGTH} characters or less"
            )
        self._database = database
        self._namespace = namespace
        self.outbox = SQLOutbox(database, namespace)
        new = _NEW_UNLESS_REVOKED.where(*database.dialect.unhurried)
        insert_new = database.dialect.insert_new(messages).from_select(list(_NEW), new)
        self._insert_new = database.prompt(insert_new)
        self._complete = database.prompt(_COMPLETE)
        self._engine_for_runs: Engine | None = None
        self._sessions: Callable[[], Session] | None = None

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        namespace: str = "default",
        timeout: float = 5.0,
        clock: Clock | None = None,
        creates: bool = True,
    ) -> Self:
        """The store in the database at *url*. Nothing is connected yet.

        Raises ConfigurationError for a URL that cannot be one, ModuleNotFoundError when the driver is not installed.
        """
        return cls(Database(dialect_of(url), timeout=timeout, clock=clock, creates=creates), namespace=namespace)

    def _run(self, work: Callable[[Unit], T]) -> T:
        def in_transaction(connection: Connection) -> T:
            unit = SQLUnit(connection, self._database, self._namespace)
            answer = work(unit)
            unit.flush()
            return answer

        return self._database.run(in_transaction, transaction=True)

    def claim(self, envelope: Envelope, *, holder: str, lease: float, max_crashes: int) -> Claim:
        if envelope.sequence == 0 and max_crashes > 0:  # a later attempt has a record already
            token = 0

            def first_claim(now: float) -> dict[str, object]:
                nonlocal token
                values = first_run(envelope, holder=holder, lease=lease, now=now)
                token = values["new_token"]
                return values | {"new_namespace": self._namespace, "revocation": record_id(envelope.task_id)}

            if self._database.run_prompt(self._insert_new, first_claim) == 1:
                return Claimed(token, 0, "")
        return super().claim(envelope, holder=holder, lease=lease, max_crashes=max_crashes)

    def complete(
        self, id: str, token: int, *, result: bytes, retention: float, entry: ResultEntry | None = None
    ) -> bool:
        run = {"in_namespace": self._namespace, "run": id, "shown": token, "answer": result}

        def completion(now: float) -> dict[str, object]:
            return {**run, "now": to_ms(now), "until": to_ms(now + retention)}

        return self._database.run_prompt(self._complete, completion) == 1 or super().complete(
            id, token, result=result, retention=retention
        )

    def end_in(self, connection: Connection, id: str, token: int, end: End) -> bool:
        """End a run on the caller's connection, in its transaction. False, and nothing changed: the token is stale."""
        if end.result is not None:
            now = self._database.now(connection)
            run = {"in_namespace": self._namespace, "run": id, "shown": token, "answer": end.result}
            moments = {"now": to_ms(now), "until": to_ms(now + end.retention)}
            if connection.execute(_COMPLETE, run | moments).rowcount == 1:
                return True
        unit = SQLUnit(connection, self._database, self._namespace)
        done = ended(unit, id, token, end)
        unit.flush()
        return done

    def seen(self, id: str, end: End) -> tuple[Record | None, State | None]:
        """The record, after every transaction that holds it has ended, and the state that *end* would give it."""
        return self._run(lambda unit: seen(unit, id, end))

    def transaction(
        self, id: str, token: int, *, factory: Callable[[], Session] | None, checked: Callable[[Session], None]
    ) -> RunTransaction:
        """The transaction of a run, its session made by *factory* or on the store's database."""
        return RunTransaction(self, id, token, opened=factory or self._own_session, checked=checked)

    def _own_session(self) -> Session:
        if self._sessions is None:
            self._engine_for_runs = engine_for_runs(self._database.dialect, self._database.timeout)
            self._sessions = factory_of(self._engine_for_runs)
        return self._sessions()

    def holds(self, id: str, token: int) -> bool:
        is_mine = and_(_c.namespace == self._namespace, _c.id == id, _c.token == token)
        run = select(_c.id).where(is_mine, _c.state == State.RUNNING.value)
        return self._database.run(lambda connection: connection.execute(run).first() is not None)

    def find(self, id: str) -> Record | None:
        def read(connection: Connection) -> Record | None:
            row = connection.execute(
                select(*RECORD).where(
                    _c.namespace == self._namespace,
                    _c.id == id,
                    or_(_c.expires_at.is_(None), _c.expires_at > to_ms(self._database.now(connection))),
                )
            ).one_or_none()
            return to_record(row) if row is not None else None

        return self._database.run(read)

    def due_in(self) -> float | None:
        earliest = select(func.min(_c.due_at)).where(_c.namespace == self._namespace)

        def ask(connection: Connection) -> float | None:
            due_at = connection.execute(earliest).scalar()
            return None if due_at is None else due_at / 1000 - self._database.now(connection)

        return self._database.run(ask)

    def revoke(self, task_ids: Sequence[str], *, retention: float) -> None:
        names = {record_id(task_id): task_id for task_id in sorted(task_ids)}
        if not names:
            return

        def write(connection: Connection) -> None:
            until = to_ms(self._database.now(connection) + retention)
            row = {"namespace": self._namespace, "until_at": until}
            r = revocations.c
            connection.execute(delete(revocations).where(r.namespace == self._namespace, r.id.in_(names)))
            connection.execute(insert(revocations), [{"id": id, "task_id": name, **row} for id, name in names.items()])

        self._database.run(write, transaction=True)

    def scan(self, state: State) -> Iterator[Record]:
        page = (
            select(*RECORD)
            .where(_c.namespace == self._namespace, _c.state == state.value, LISTED)
            .order_by(_c.updated_at, _c.id)
            .limit(PAGE)
        )
        query = page
        while True:
            rows = self._database.run(lambda connection, query=query: connection.execute(query).all())  # type: ignore[misc]
            yield from map(to_record, rows)
            if len(rows) < PAGE:
                return
            at, id = rows[-1].updated_at, rows[-1].id
            query = page.where(or_(_c.updated_at > at, and_(_c.updated_at == at, _c.id > id)))

    def depths(self) -> Mapping[State, Depth]:
        count = (
            select(_c.state, func.count(), func.min(_c.updated_at))
            .where(_c.namespace == self._namespace, LISTED)
            .group_by(_c.state)
        )
        found = {
            state: Depth(number, oldest / 1000)
            for state, number, oldest in self._database.run(lambda connection: connection.execute(count).all())
        }
        return {state: found.get(state.value, Depth(0, None)) for state in State}

    def expire(self, *, limit: int) -> int:
        def forget(connection: Connection) -> int:
            now = to_ms(self._database.now(connection))
            over = and_(_c.namespace == self._namespace, _c.expires_at <= now)
            query = select(_c.id).where(over).order_by(_c.expires_at).limit(limit).with_for_update(skip_locked=True)
            ids = connection.execute(query).scalars().all()
            if ids:
                connection.execute(delete(messages).where(_c.namespace == self._namespace, _c.id.in_(ids)))
            for table in (revocations, uniques):
                gone = and_(table.c.namespace == self._namespace, table.c.until_at <= now)
                connection.execute(delete(table).where(gone))
            return len(ids)

        return self._database.run(forget, transaction=True)

    def now(self) -> float:
        return self._database.run(self._database.now)

    def ping(self) -> None:
        """Return if the database answers and has the tables, which are made if they are missing."""
        queries = [select(table.c.id).limit(1) for table in (messages, revocations, uniques)]
        self._database.run(lambda connection: [connection.execute(query).first() for query in queries])

    def close(self) -> None:
        self.outbox.close()
        if self._engine_for_runs is not None:
            self._engine_for_runs.dispose()
        self._database.close()
