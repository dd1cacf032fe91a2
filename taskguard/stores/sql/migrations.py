"""The tables' version, and the way from each version to the next. Pure DDL; Alembic may take `metadata` instead.

A migration only adds columns, tables and indexes, and drops an index at most, so that workers of the old version go on
while it runs. Whatever was made by hand or by Alembic counts: what is there is not made again. Version 1 had no version
row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sqlalchemy import Column, Connection, Dialect, MetaData, Table, insert, inspect, select, update
from sqlalchemy.schema import CreateColumn, CreateIndex, CreateTable, DropIndex, Index

from taskguard.stores.sql.schema import OUTBOX_COLUMNS, messages, metadata, versions

CURRENT = 3
"""The version this code needs. 1: custody and messages at rest. 2: the outbox's columns. 3: a partial index."""

ROW = "messages"

Change = Column[object] | Index


def _outbox() -> list[Change]:
    columns: list[Change] = [column for column in messages.c if column.name in OUTBOX_COLUMNS]
    return columns + [index for index in messages.indexes if index.name == "taskguard_messages_ordering"]


def _listed() -> list[Change]:
    return [index for index in messages.indexes if index.name == "taskguard_messages_listed"]


STEPS: dict[int, Callable[[], list[Change]]] = {2: _outbox, 3: _listed}
"""What each version added to tables that were there before; whole tables are found missing by themselves."""

_STATE = Index("taskguard_messages_state", Table(messages.name, MetaData(), Column("state")).c.state)
DROPPED = {3: [_STATE]}
"""The indexes that each version replaced."""


def version(connection: Connection) -> int:
    """The version of the tables in this database, 0 where there are none."""
    there = inspect(connection)
    if not there.has_table(messages.name):
        return 0
    if not there.has_table(versions.name):
        return 1
    found = connection.execute(select(versions.c.version).where(versions.c.name == ROW)).scalar()
    return 1 if found is None else int(found)


def upgrade(connection: Connection) -> list[str]:
    """Bring the tables to `CURRENT`. Returns what was done, a line each; repeating it does nothing."""
    done = []
    before, there = version(connection), inspect(connection)
    missing = [table for table in metadata.sorted_tables if not there.has_table(table.name)]
    if missing:
        metadata.create_all(connection, tables=missing, checkfirst=False)
        done += [f"created {table.name}" for table in missing]
    if before:
        columns = {found["name"] for found in there.get_columns(messages.name)}
        indexes = {found["name"] for found in there.get_indexes(messages.name)}
        for number in range(before + 1, CURRENT + 1):
            for change in STEPS[number]():
                if change.name in columns | indexes:
                    continue
                if isinstance(change, Index):
                    change.create(connection)
                else:
                    connection.exec_driver_sql(_add_column(messages, change, connection.dialect))
                done.append(f"added {change.name} to {messages.name}")
            for index in DROPPED.get(number, ()):
                if index.name in indexes:
                    connection.execute(DropIndex(index))
                    done.append(f"dropped {index.name}")
    if connection.execute(update(versions).where(versions.c.name == ROW).values(version=CURRENT)).rowcount == 0:
        connection.execute(insert(versions).values(name=ROW, version=CURRENT))
    if done or before != CURRENT:
        done.append(f"version {CURRENT}")
    return done


def statements(dialect: Dialect, *, since: int = 0) -> Iterator[str]:
    """The DDL of an `upgrade` from version *since*, for a database whose user may not create tables."""
    if not since:
        for table in metadata.sorted_tables:
            yield str(CreateTable(table).compile(dialect=dialect)).strip()
            for index in sorted(table.indexes, key=lambda index: str(index.name)):
                yield str(CreateIndex(index).compile(dialect=dialect)).strip()
        yield f"INSERT INTO {versions.name} (name, version) VALUES ('{ROW}', {CURRENT})"
        return
    if since == 1:
        yield str(CreateTable(versions).compile(dialect=dialect)).strip()
    for number in range(since + 1, CURRENT + 1):
        for change in STEPS[number]():
            if isinstance(change, Index):
                yield str(CreateIndex(change).compile(dialect=dialect)).strip()
            else:
                yield _add_column(messages, change, dialect)
        for index in DROPPED.get(number, ()):
            yield str(DropIndex(index).compile(dialect=dialect)).strip()
    if since == 1:
        yield f"INSERT INTO {versions.name} (name, version) VALUES ('{ROW}', {CURRENT})"
    else:
        yield f"UPDATE {versions.name} SET version = {CURRENT} WHERE name = '{ROW}'"


def differences(connection: Connection) -> list[str]:
    """What is missing in this database, a line each; empty where it fits."""
    there = inspect(connection)
    found = []
    for table in metadata.sorted_tables:
        if not there.has_table(table.name):
            found.append(f"table {table.name} is missing")
            continue
        columns = {each["name"] for each in there.get_columns(table.name)}
        indexes = {each["name"] for each in there.get_indexes(table.name)}
        found += [f"column {table.name}.{column.name} is missing" for column in table.c if column.name not in columns]
        found += [f"index {index.name} is missing" for index in table.indexes if index.name not in indexes]
    at = version(connection)
    if at and at != CURRENT:
        newer = "; upgrade taskguard" if at > CURRENT else ""
        found.append(f"the tables are of version {at}, this taskguard needs {CURRENT}{newer}")
    return found


def _add_column(table: Table, column: Column[object], dialect: Dialect) -> str:
    return f"ALTER TABLE {table.name} ADD COLUMN {CreateColumn(column).compile(dialect=dialect)}".strip()
