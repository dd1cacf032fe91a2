"""Demand on a SQL database: a row for each window, client, endpoint and rule."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from operator import itemgetter
from typing import Self

from sqlalchemy import ColumnElement, Connection, and_, delete, func, insert, select, update

from taskguard.clock import Clock
from taskguard.errors import ConfigurationError
from taskguard.stores.sql.database import Database
from taskguard.stores.sql.dialect import dialect_of
from taskguard.stores.sql.schema import NAMESPACE_LENGTH, demand
from taskguard.traffic import KEPT, MOST, OTHER, WINDOW, Asked, Counted

_c = demand.c
_OTHER = Asked(client=OTHER, endpoint=OTHER, rule=OTHER)


class SQLDemand:
    """A `DemandStore` on PostgreSQL, MySQL or MariaDB, or SQLite."""

    def __init__(self, database: Database, *, namespace: str) -> None:
        if len(namespace) > NAMESPACE_LENGTH:
            raise ConfigurationError(
                f"namespace: {namespace!r} is too long for a SQL store; use {NAMESPACE_LENGTH} characters or less"
            )
        self._database = database
        self._namespace = namespace
        self._swept_at = 0.0

    @classmethod
    def from_url(
        cls, url: str, *, namespace: str, timeout: float = 5.0, clock: Clock | None = None, creates: bool = True
    ) -> Self:
        """The demand in the database at *url*. Raises ConfigurationError for a URL that cannot be one."""
        return cls(Database(dialect_of(url), timeout=timeout, clock=clock, creates=creates), namespace=namespace)

    def add(self, asked: Sequence[Asked]) -> list[Counted]:
        if not asked:
            return []

        def count(connection: Connection) -> list[Counted]:
            now = self._database.now(connection)
            at = now - now % WINDOW
            swept = at if at == self._swept_at else self._sweep(connection, now, at)
            # In one order, so that two processes wait for each other and do not deadlock.
            for id, each in sorted(((_id(each), each) for each in asked), key=itemgetter(0)):
                self._count(connection, int(at), id, each)
            names = [_id(each) for each in asked]
            query = select(_c.id, *_COLUMNS).where(self._in(int(at)), _c.id.in_(names))
            found = {row[0]: _counted(row[1:]) for row in connection.execute(query)}
            self._swept_at = swept
            return [found[name] for name in dict.fromkeys(names) if name in found]

        return self._database.run(count, transaction=True)

    def _sweep(self, connection: Connection, now: float, at: float) -> float:
        """Delete the oldest window that is over, no more: after a long pause all of them would outlast the timeout.

        Returns *at* where none is left, else what asks for another at the next call.
        """
        oldest = select(func.min(_c.window_at)).where(_c.namespace == self._namespace)
        window = connection.execute(oldest).scalar()
        if window is None or window > int(now - KEPT):
            return at
        connection.execute(delete(demand).where(_c.namespace == self._namespace, _c.window_at == window))
        return self._swept_at

    def _count(self, connection: Connection, at: int, id: str, asked: Asked) -> None:
        sums = {"accepted": _c.accepted + asked.accepted, "refused": _c.refused + asked.refused}
        if connection.execute(update(demand).where(self._in(at), _c.id == id).values(sums)).rowcount:
            return
        many = connection.execute(select(func.count()).select_from(demand).where(self._in(at))).scalar_one()
        if many >= MOST and id != _id(_OTHER):
            other = Asked(client=OTHER, endpoint=OTHER, rule=OTHER, accepted=asked.accepted, refused=asked.refused)
            self._count(connection, at, _id(other), other)
            return
        row = {"client": asked.client, "endpoint": asked.endpoint, "rule": asked.rule}
        row |= {"namespace": self._namespace, "id": id}
        connection.execute(
            insert(demand), {**row, "window_at": at, "accepted": asked.accepted, "refused": asked.refused}
        )

    def read(self, *, since: float) -> list[Counted]:
        later = and_(_c.namespace == self._namespace, _c.window_at > int(since - WINDOW))
        query = select(*_COLUMNS).where(later).order_by(_c.window_at, _c.id)
        return self._database.run(lambda connection: [_counted(row) for row in connection.execute(query)])

    def now(self) -> float:
        return self._database.run(self._database.now)

    def close(self) -> None:
        self._database.close()

    def _in(self, at: int) -> ColumnElement[bool]:
        return and_(_c.namespace == self._namespace, _c.window_at == at)


_COLUMNS = (_c.window_at, _c.client, _c.endpoint, _c.rule, _c.accepted, _c.refused)


def _counted(row: Sequence[object]) -> Counted:
    at, client, endpoint, rule, accepted, refused = row
    return Counted(
        window_at=float(str(at)),
        client=str(client),
        endpoint=str(endpoint),
        rule=str(rule),
        accepted=float(str(accepted)),
        refused=float(str(refused)),
    )


def _id(asked: Asked) -> str:
    name = json.dumps([asked.client, asked.endpoint, asked.rule])
    return hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
