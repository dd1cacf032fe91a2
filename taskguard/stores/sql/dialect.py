"""What differs between the databases: how to connect, what time it is there, and what their errors mean.

Connections are in autocommit mode, so that the operations of one statement cost one round trip; a transaction is begun
and ended in words. All of them read committed rows: MySQL's default would lock the gaps between them, and deadlock.
"""

from __future__ import annotations

import re
import sqlite3
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from enum import Enum, auto
from math import ceil
from pathlib import Path
from typing import Any
from weakref import WeakSet

from sqlalchemy import URL, Engine, Table, TextClause, create_engine, event, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.sql.dml import Insert

from taskguard.errors import ConfigurationError
from taskguard.forks import undisturbed


class Fault(Enum):
    """What an error of the database asks for."""

    BUSY = auto()  # deadlock, lock wait, two inserts of one row: undone, and may be done again
    LOST = auto()  # the connection is gone, or there was none: once more, over a new one
    MUTE = auto()  # no answer in time
    NO_TABLE = auto()  # or one of an older version, which lacks a column
    BROKEN = auto()  # waiting will not mend it


class Dialect(ABC):
    """One kind of database, behind one URL."""

    begin: tuple[str, ...] = ("BEGIN",)
    commit: tuple[str, ...] = ("COMMIT",)
    now: str | None = None
    """A query for the server's epoch milliseconds. None: the database runs in this process, and its clock is ours."""
    unhurried: tuple[TextClause, ...] = ()
    """Conditions that are always true, and have the commit of their statement reach the disk with the next."""
    creates = True
    """Whether what is missing in the database is made."""
    keeps = True
    """Whether a connection may stay out of the pool while nobody uses it."""
    in_use: AbstractContextManager[object] = nullcontext()
    """Held while a connection is opened, used and given back."""

    def __init__(self, url: URL) -> None:
        self.url = url

    @abstractmethod
    def engine(self, timeout: float) -> Engine:
        """A new engine whose every wait is bounded by *timeout* seconds."""

    @abstractmethod
    def insert_new(self, table: Table) -> Insert:
        """An insert of one row that does nothing where the row exists; it may answer that with an IntegrityError."""

    @abstractmethod
    def fault(self, exc: DBAPIError) -> Fault:
        """What this error of the driver means."""

    def is_there(self) -> bool:
        """Whether there is a database to connect to, where connecting would make one."""
        return True

    def advice(self) -> str:
        """The way out when the database cannot be used."""
        return "check that the server is up and that the URL names the right host, database and user"

    def diagnose(self, exc: Exception) -> Fault:
        """What this error of SQLAlchemy means."""
        if isinstance(exc, PoolTimeout):
            return Fault.MUTE
        if not isinstance(exc, DBAPIError):
            return Fault.BROKEN
        return self.fault(exc)

    def _create(self, url: URL, timeout: float, **options: Any) -> Engine:
        return create_engine(
            url, isolation_level="AUTOCOMMIT", skip_autocommit_rollback=True, pool_timeout=timeout, **options
        )


class PostgreSQL(Dialect):
    """PostgreSQL 13 and newer, over psycopg 3.

    Transactions are on the disk when they end, but for a first claim, whose message the broker still has: that gets
    there with whatever is next, the run's completion at the latest. A server that crashes in between forgets that the
    run began, and the way out claims its key anew (`Gate`).
    """

    now = "SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)"
    unhurried = (text("set_config('synchronous_commit', 'off', true) = 'off'"),)
    _REFUSED = re.compile(r"authentication failed|does not exist|no pg_hba\.conf entry|no password supplied|permission")

    def engine(self, timeout: float) -> Engine:
        from taskguard.stores.sql.postgresql import BoundedConnection

        milliseconds = ceil(timeout * 1000)
        bounds = f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds}"
        given = self.url.query.get("options", "")
        connect = {
            "connect_timeout": max(2, ceil(timeout)),
            "application_name": "taskguard",
            "tcp_user_timeout": milliseconds,
            # A database without an encoding (SQL_ASCII) would otherwise answer in bytes, which nobody here can read.
            "client_encoding": "utf8",
            "options": f"{bounds} {given if isinstance(given, str) else ' '.join(given)}".strip(),
        }
        url = self.url.difference_update_query(["options"])
        engine = self._create(url, timeout, connect_args=connect, use_native_hstore=False)

        @event.listens_for(engine, "do_connect")
        def connect_bounded(_dialect: PGDialect, _record: Any, args: Any, options: Any) -> BoundedConnection:
            connection = BoundedConnection.connect(*args, **options)
            connection.patience = timeout
            return connection

        return engine

    def insert_new(self, table: Table) -> Insert:
        return postgresql.insert(table).on_conflict_do_nothing()

    def fault(self, exc: DBAPIError) -> Fault:
        state = getattr(exc.orig, "sqlstate", None)
        match state:
            case "40001" | "40P01" | "55P03" | "23505":
                return Fault.BUSY
            case "57014":
                return Fault.MUTE
            case "42P01" | "42703":
                return Fault.NO_TABLE
            case None if type(exc.orig).__name__ not in {"OperationalError", "ConnectionTimeout"}:
                return Fault.BROKEN
            case None:
                text = str(exc.orig)
                return Fault.BROKEN if "FATAL" in text and self._REFUSED.search(text) else Fault.LOST
        lost = state[:2] in {"08", "53"} or state in {"57P01", "57P02", "57P03", "57P05", "25P03", "25006"}
        return Fault.LOST if lost or exc.connection_invalidated else Fault.BROKEN


class MySQL(Dialect):
    """MySQL 8, and MariaDB 10.6 and newer, over PyMySQL."""

    now = "SELECT CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)"
    _BUSY = frozenset({1213, 1205, 1020, 1062})
    _LOST = frozenset({1040, 1053, 1152, 1158, 1159, 1160, 1161, 1203, 1290, 1836, 1927, 4031})

    def engine(self, timeout: float) -> Engine:
        connect = {"connect_timeout": timeout, "read_timeout": timeout, "write_timeout": timeout}
        engine = self._create(self.url, timeout, connect_args=connect)

        @event.listens_for(engine, "connect")
        def set_session(connection: Any, _record: Any) -> None:
            with connection.cursor() as cursor:
                cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
                # UTC, because a zone with summer time has an hour that comes twice.
                cursor.execute(
                    f"SET SESSION time_zone = '+00:00', innodb_lock_wait_timeout = {max(1, int(timeout))}, "
                    "sql_mode = CONCAT(@@sql_mode, ',STRICT_TRANS_TABLES')"
                )

        return engine

    def insert_new(self, table: Table) -> Insert:
        # Not INSERT IGNORE, which cuts what is too long without a word.
        return table.insert()

    def fault(self, exc: DBAPIError) -> Fault:
        code = exc.orig.args[0] if exc.orig is not None and exc.orig.args else 0
        if code in self._BUSY:
            return Fault.BUSY
        if code in {1146, 1054}:
            return Fault.NO_TABLE
        if exc.connection_invalidated or code in self._LOST or (isinstance(code, int) and 2000 <= code < 3000):
            return Fault.LOST
        return Fault.BROKEN


_engines: WeakSet[Engine] = WeakSet()


@undisturbed.before_fork
def _close_sqlite() -> None:
    """SQLite forbids a child to use its parent's connections, even to close them."""
    for engine in list(_engines):
        engine.dispose()


class SQLite(Dialect):
    """SQLite 3.35 and newer, in a file on this machine.

    Transactions are on the disk when they end. The two single statements of every run, a first claim and a completion,
    get there with the next of those: should the power fail before, the broker still has the message of the one, and the
    other's run is repeated. A process that dies loses neither.
    """

    begin = ("PRAGMA synchronous = FULL", "BEGIN IMMEDIATE")
    commit = ("COMMIT", "PRAGMA synchronous = NORMAL")
    keeps = False  # before a fork those in the pool are closed
    in_use = undisturbed

    def engine(self, timeout: float) -> Engine:
        engine = self._create(self.url, timeout, connect_args={"timeout": timeout})

        @event.listens_for(engine, "connect")
        def set_up(connection: Any, _record: Any) -> None:
            if self.creates:  # who only looks changes nothing in somebody's file
                connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")

        _engines.add(engine)
        return engine

    def insert_new(self, table: Table) -> Insert:
        return sqlite.insert(table).on_conflict_do_nothing()

    def fault(self, exc: DBAPIError) -> Fault:
        code = getattr(exc.orig, "sqlite_errorcode", 0)
        if code & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            return Fault.BUSY
        if code in {sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY, sqlite3.SQLITE_CONSTRAINT_UNIQUE}:
            return Fault.BUSY
        missing = re.search("no such (table|column)|has no column", str(exc.orig))
        return Fault.NO_TABLE if missing else Fault.BROKEN

    def is_there(self) -> bool:
        name = self.url.database or ""
        return name.startswith("file:") or Path(name).exists()

    def advice(self) -> str:
        folder = Path(self.url.database or "").absolute().parent
        if not folder.is_dir():
            return f"the directory {folder} does not exist; create it"
        return f"check that {self.url.database} is a SQLite file and that this process may write to it and to {folder}"


_DRIVERS: dict[str, tuple[str, type[Dialect]]] = {
    "postgres": ("postgresql+psycopg", PostgreSQL),
    "postgresql": ("postgresql+psycopg", PostgreSQL),
    "mysql": ("mysql+pymysql", MySQL),
    "mariadb": ("mysql+pymysql", MySQL),
    "sqlite": ("sqlite+pysqlite", SQLite),
}


def dialect_of(text: str) -> Dialect:
    """The database behind this URL. Raises ConfigurationError, without showing the URL, for one that cannot be used."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            "store: not a database URL (not shown, it may hold a password); write it as "
            "postgresql+psycopg://user:password@host:5432/database"
        ) from None
    name, _, driver = url.drivername.partition("+")
    if name not in _DRIVERS:
        raise ConfigurationError(f"store: {name}:// is no database taskguard knows; use one of {', '.join(_DRIVERS)}")
    known, dialect = _DRIVERS[name]
    if driver and driver != known.partition("+")[2]:
        raise ConfigurationError(f"store: the driver {driver!r} is not supported for {name}; write {known}://")
    if dialect is SQLite and url.database in {None, "", ":memory:"}:
        raise ConfigurationError(
            "store: SQLite in memory is another database for every connection; use memory:// or sqlite:////path/to/file"
        )
    return dialect(url.set(drivername=known))
