"""What an administrator does with the tables of a database, by its URL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from sqlalchemy import Connection
from sqlalchemy.dialects import mysql, postgresql, sqlite

from taskguard.errors import ConfigurationError
from taskguard.stores.sql import migrations
from taskguard.stores.sql.database import Database, shown
from taskguard.stores.sql.dialect import dialect_of

T = TypeVar("T")

KINDS = {"postgresql": postgresql.dialect, "mysql": mysql.dialect, "mariadb": mysql.dialect, "sqlite": sqlite.dialect}


def create(url: str) -> list[str]:
    """Create the tables, or bring older ones up to date. Returns what was done, a line each. Raises StoreError."""
    return _in(url, migrations.upgrade, transaction=True)


def check(url: str) -> list[str]:
    """What the database lacks, a line each; empty where it fits. Raises StoreError."""
    dialect = dialect_of(url)
    if not dialect.is_there():
        return [f"{shown(dialect.url)}: there is no such file"]
    return _in(url, migrations.differences, transaction=False)


def ddl(kind: str, *, since: int) -> Iterator[str]:
    """The statements of `create` for a kind of database, from a version on (0: none there). Connects to nothing."""
    dialect = KINDS.get(kind)
    if dialect is None:
        raise ConfigurationError(f"schema: {kind!r} is no database taskguard knows; use one of {', '.join(KINDS)}")
    if not 0 <= since < migrations.CURRENT:
        raise ConfigurationError(f"schema: there is no step from version {since}; the newest is {migrations.CURRENT}")
    return migrations.statements(dialect(), since=since)


def _in(url: str, work: Callable[[Connection], T], *, transaction: bool) -> T:
    database = Database(dialect_of(url), timeout=30.0, clock=None)
    try:
        return database.run(work, transaction=transaction)
    finally:
        database.close()
