"""The outbox in a SQL database: what relays and operators do with the rows that producers wrote."""

from __future__ import annotations

import time
from collections.abc import Iterator

from sqlalchemy import Connection, and_, case, delete, func, select, update

from taskguard.clock import to_ms
from taskguard.handover import Dispatch, Handed, OutboxStatus, unless_away
from taskguard.record import Record, State
from taskguard.stores.sql import handing
from taskguard.stores.sql.database import Database
from taskguard.stores.sql.listening import Listener
from taskguard.stores.sql.outgoing import channel
from taskguard.stores.sql.schema import LISTED, RECORD, messages, to_record

_c = messages.c
PAGE = 500


class SQLOutbox:
    """See `taskguard.handover.Outbox`; and what operators need."""

    def __init__(self, database: Database, namespace: str) -> None:
        self._database = database
        self._namespace = namespace
        self._kind = database.dialect.url.get_backend_name()
        self._mine = and_(_c.namespace == namespace, _c.outbox)
        self._listener = Listener(database, channel(namespace)) if self._kind == "postgresql" else None

    # -- for the relay ----------------------------------------------------------------------------------------------

    def hand_over(self, dispatch: Dispatch, *, limit: int, lease: float, retention: float) -> Handed:
        """See `taskguard.handover.Outbox`. Raises StoreUnavailable, or the broker's error where it is away."""
        namespace, database = self._namespace, self._database
        if self._kind == "sqlite":
            return self._from_sqlite(dispatch, limit=limit, lease=lease, retention=retention)
        sending = unless_away(dispatch)

        def work(connection: Connection) -> Handed:
            now = database.now(connection)
            if self._kind == "postgresql":
                told = database.told_time is not None
                return handing.take_from_postgresql(
                    connection, namespace, sending, limit=limit, retention=retention, now=now, told=told
                )
            return handing.take_from_mysql(connection, namespace, sending, limit=limit, retention=retention, now=now)

        return database.run(work, transaction=True)

    def _from_sqlite(self, dispatch: Dispatch, *, limit: int, lease: float, retention: float) -> Handed:
        database, handed = self._database, Handed()

        def take(connection: Connection) -> list[handing.Row]:
            now = database.now(connection)
            return handing.lease_from_sqlite(connection, self._namespace, limit=limit, lease=lease, now=now)

        rows = database.run(take, transaction=True)
        if not rows:
            return handed
        now = database.run(database.now)
        published, changes = handing.settle(rows, dispatch, handed, now)

        def write(connection: Connection) -> None:
            handing.write(connection, self._namespace, published, changes, retention=retention, now=now)

        database.run(write, transaction=True)
        if handed.away is not None and not published and not handed.refused:
            raise handed.away
        return handed

    def wait(self, seconds: float) -> bool:
        """See `taskguard.handover.Outbox`."""
        if self._listener is not None:
            return self._listener.wait(seconds)
        time.sleep(seconds)
        return False

    def close(self) -> None:
        """Stop listening."""
        if self._listener is not None:
            self._listener.close()

    # -- for operators ----------------------------------------------------------------------------------------------

    def status(self) -> OutboxStatus:
        """How the outbox stands."""

        def ask(connection: Connection) -> OutboxStatus:
            now = self._database.now(connection)
            due = and_(_c.due_at <= to_ms(now), _c.state == State.PENDING.value)
            pending = _c.state == State.PENDING.value
            counted = select(
                func.count(case((due, 1))),
                func.min(case((due, _c.due_at))),
                func.count(case((and_(pending, _c.due_at > to_ms(now), _c.crashes == 0), 1))),
                func.count(case((and_(pending, _c.due_at > to_ms(now), _c.crashes > 0), 1))),
                func.count(func.distinct(case((and_(pending, _c.ordering != ""), _c.ordering)))),
            ).where(self._mine)
            waiting, oldest, later, retrying, keys = connection.execute(counted).one()
            lost = select(func.count()).where(_c.namespace == self._namespace, _c.state == State.DEAD.value, LISTED)
            dead = connection.execute(lost).scalar_one()
            return OutboxStatus(
                waiting=waiting,
                lag=0.0 if oldest is None else max(0.0, now - oldest / 1000),
                later=later,
                retrying=retrying,
                dead=dead,
                keys=keys,
            )

        return self._database.run(ask)

    def peek(self, limit: int) -> Iterator[Record]:
        """The next rows, the longest due first."""
        query = (
            select(*RECORD)
            .where(self._mine, _c.state == State.PENDING.value, LISTED)
            .order_by(_c.due_at, _c.ordinal)
            .limit(limit)
        )
        yield from map(to_record, self._database.run(lambda connection: connection.execute(query).all()))

    def requeue(self) -> int:
        """What was refused and waits for its next try is due now, with all its tries. Returns how many."""

        def work(connection: Connection) -> int:
            now = to_ms(self._database.now(connection))
            refused = and_(self._mine, _c.state == State.PENDING.value, LISTED, _c.crashes > 0, _c.lease == "")
            return connection.execute(update(messages).where(refused).values(crashes=0, due_at=now)).rowcount

        return self._database.run(work, transaction=True)

    def purge(self, *, task: str | None = None, older_than: float = 0.0) -> int:
        """Delete rows that are not published, of one task or all; older than so many seconds. Returns how many."""

        def work(connection: Connection) -> int:
            before = to_ms(self._database.now(connection) - older_than)
            these = and_(self._mine, _c.state == State.PENDING.value, LISTED, _c.created_at <= before, _c.lease == "")
            if task is not None:
                these = and_(these, _c.task == task)
            return connection.execute(delete(messages).where(these)).rowcount

        return self._database.run(work, transaction=True)
