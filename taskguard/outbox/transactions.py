"""The caller's transaction, whatever it was made with: what it is connected to, and how a row is written in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, UnboundExecutionError
from sqlalchemy.orm import Session, scoped_session

from taskguard.celery.composing import Composed
from taskguard.errors import ConfigurationError, StoreError
from taskguard.outbox.place import Place
from taskguard.stores.sql.outgoing import ROWS, Spelling, family, insertion, is_missing_table, parameters

_checked: WeakKeyDictionary[Engine, Place] = WeakKeyDictionary()
_spellings: WeakKeyDictionary[Engine, Spelling] = WeakKeyDictionary()


class Transaction(ABC):
    """A transaction of the caller's."""

    @abstractmethod
    def check(self, place: Place) -> None:
        """Raise ConfigurationError where it is of another database than *place*, or no transaction."""

    @abstractmethod
    def write(self, place: Place, composed: Sequence[Composed]) -> None:
        """Write these messages."""

    async def write_async(self, place: Place, composed: Sequence[Composed]) -> None:
        """As `write`, for a transaction that must be awaited."""
        raise ConfigurationError(f"{type(self).__name__}: not an AsyncSession; use send, not send_async")


def transaction_of(session: Any) -> Transaction:
    """The transaction behind a session, a connection, or what Django has for those."""
    if isinstance(session, (Session, scoped_session)):
        return SessionTransaction(session)
    if isinstance(session, Connection):
        return ConnectionTransaction(session)
    kind = type(session)
    if kind.__module__.startswith("sqlalchemy.") or hasattr(session, "run_sync"):
        return AsyncTransaction(session)
    if getattr(session, "__name__", "") == "django.db.transaction" or hasattr(session, "in_atomic_block"):
        from taskguard.outbox.django import DjangoTransaction

        return DjangoTransaction(session)
    raise ConfigurationError(
        f"session: a {kind.__module__}.{kind.__qualname__} is no transaction; give a SQLAlchemy Session or Connection, "
        "an AsyncSession, django.db.transaction or one of Django's connections"
    )


def rows(place: Place, composed: Sequence[Composed], kind: str) -> list[dict[str, object]]:
    """The parameters of the statement for each message; those of the last one tell the relays."""
    last = len(composed) - 1
    return [
        parameters(
            each.envelope,
            namespace=place.namespace,
            wire=each.wire,
            due_at_ms=each.due_at_ms,
            ordering=each.ordering,
            step=number,
            kind=kind,
            tells=number == last,
        )
        for number, each in enumerate(composed)
    ]


def missing(place: Place, exc: Exception) -> StoreError:
    """The error of a database that has no outbox."""
    secret = place.url.password is not None or place.url.query  # which may hold another
    named = "with its URL in TASKGUARD_STORE" if secret else f"--store {place.url}"
    return StoreError(
        f"outbox {place.shown}: this database has no table for it, or an old one; create it: taskguard schema create "
        f"{named}"
    )


class ConnectionTransaction(Transaction):
    """SQLAlchemy's Connection."""

    def __init__(self, connection: Connection) -> None:
        self._given = connection

    @property
    def _connection(self) -> Connection:
        return self._given

    def check(self, place: Place) -> None:
        """See `Transaction`. What was found of an engine is kept."""
        connection = self._connection
        if _level(connection) == "AUTOCOMMIT":
            raise ConfigurationError(
                "session: it commits each statement by itself (AUTOCOMMIT), so a rollback would not take the message "
                "back; give a connection with a transaction"
            )
        engine = connection.engine
        if _checked.get(engine) is place:
            return
        differs = place.differs(engine.dialect.name, engine.url.database)
        if differs:
            raise ConfigurationError(
                f"session: {differs}, and the outbox is {place.shown}; send with a session of that database, or set "
                "outbox to the session's"
            )
        _checked[engine] = place

    def write(self, place: Place, composed: Sequence[Composed]) -> None:
        """See `Transaction`."""
        connection = self._connection
        kind = family(connection.dialect.name)
        given = rows(place, composed, kind)
        try:
            for first in range(0, len(given) - 1, ROWS):
                connection.execute(insertion(kind, tells=False), given[first : min(first + ROWS, len(given) - 1)])
            if connection.get_execution_options().get("schema_translate_map"):
                connection.execute(insertion(kind, tells=True), given[-1])
            else:
                spelling = _spelling(connection)
                connection.exec_driver_sql(spelling.text, spelling.arguments(given[-1]))
        except DBAPIError as exc:
            if is_missing_table(exc):
                raise missing(place, exc) from exc
            raise


def _spelling(connection: Connection) -> Spelling:
    known = _spellings.get(connection.engine)
    if known is None:
        dialect = connection.dialect
        known = _spellings[connection.engine] = Spelling(family(dialect.name), dialect, tells=True)
    return known


def _level(connection: Connection) -> str | None:
    """The isolation level that was asked for, of the connection or of its engine; None: the database's own.

    SQLAlchemy tells the engine's to nobody, and `Connection.get_isolation_level` may ask the server.
    """
    of_the_engine = getattr(connection.dialect, "_on_connect_isolation_level", None)
    level: str | None = connection.get_execution_options().get("isolation_level", of_the_engine)
    return level


class SessionTransaction(ConnectionTransaction):
    """SQLAlchemy's Session."""

    def __init__(self, session: Any) -> None:
        self._session = session

    @property
    def _connection(self) -> Connection:
        try:
            connection: Connection = self._session.connection()
        except UnboundExecutionError as exc:
            raise ConfigurationError(
                "session: it is bound to no single engine; send with session.connection(bind_arguments={...})"
            ) from exc
        return connection


class AsyncTransaction(Transaction):
    """SQLAlchemy's AsyncSession and AsyncConnection."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def check(self, place: Place) -> None:
        """See `Transaction`."""
        raise ConfigurationError(
            "session: an AsyncSession writes when awaited; use `await Outbox(session).send_async(task.s(...))`, or "
            "`await session.run_sync(lambda sync: task.apply_async(..., session=sync))`"
        )

    def write(self, place: Place, composed: Sequence[Composed]) -> None:
        """See `Transaction`."""
        self.check(place)

    async def write_async(self, place: Place, composed: Sequence[Composed]) -> None:
        """See `Transaction`."""

        def on_its_sync_side(session: Any) -> None:
            transaction = transaction_of(session)
            transaction.check(place)
            if composed:
                transaction.write(place, composed)

        await self._session.run_sync(on_its_sync_side)
