"""The tables. `metadata` is for your own migrations; without any, the store makes its tables when it first needs them.

A record is one row. Instants are integers of epoch milliseconds, NULL for never. Names of any length (task ids, unique
names) are found by their hash, because MySQL indexes no long text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Dialect,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    false,
    literal_column,
)
from sqlalchemy.dialects import mysql

from taskguard.clock import to_ms
from taskguard.record import Record, State

NAMESPACE_LENGTH = 64
_UNSTORABLE = re.compile("[\\\\\0\ud800-\udfff]")
_ESCAPE = re.compile(r"\\u([0-9a-f]{4})")


class AnyText(TypeDecorator[str]):
    """Text of any kind. What databases refuse (NUL, lone surrogates) rests as ``\\uXXXX``, and so does a backslash."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        if value is None or not _UNSTORABLE.search(value):
            return value
        return _UNSTORABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        if value is None or "\\" not in value:
            return value
        return _ESCAPE.sub(lambda match: chr(int(match[1], 16)), value)


_Long = AnyText().with_variant(mysql.MEDIUMTEXT(), "mysql", "mariadb")
_Bytes = LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
# Names differ by case, which MySQL's default collations deny.
_MYSQL: Mapping[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}

metadata = MetaData()

messages = Table(
    "taskguard_messages",
    metadata,
    Column("namespace", String(NAMESPACE_LENGTH), primary_key=True),
    Column("id", String(40), primary_key=True),
    Column("task", AnyText, nullable=False),
    Column("task_id", AnyText, nullable=False),
    Column("message_key", AnyText, key="key", nullable=False),
    Column("state", String(16), nullable=False),
    Column("is_primary", Boolean, key="primary", nullable=False),
    Column("sequence", Integer, nullable=False),
    Column("fingerprint", AnyText, nullable=False),
    Column("queue", AnyText, nullable=False),
    Column("token", BigInteger, nullable=False),
    Column("holder", AnyText, nullable=False),
    Column("crashes", Integer, nullable=False),
    Column("lease", AnyText, nullable=False),
    Column("kept", Boolean, nullable=False),
    Column("due_at", BigInteger),
    Column("expires_at", BigInteger),
    Column("waits_on", String(40), nullable=False),
    Column("wire", _Bytes),
    Column("result", _Bytes),
    Column("failure", _Long, nullable=False),
    Column("history", _Long, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    # Set under the row's lock by a message that begins to wait on it; `complete` may skip the waiters where it is not.
    Column("awaited", Boolean, nullable=False, default=False, server_default=false()),
    # Of rows that a producer's transaction wrote, see `stores.sql.outgoing`; elsewhere they keep their defaults.
    Column("outbox", Boolean, nullable=False, server_default=false()),
    Column("ordering", String(40), nullable=False, server_default=""),
    Column("ordinal", BigInteger, nullable=False, server_default="0"),
    Column("deadline_at", BigInteger),
    **_MYSQL,
)
_c = messages.c
OUTBOX_COLUMNS = frozenset({"outbox", "ordering", "ordinal", "deadline_at"})
_KEYED = _c.ordering != ""
LISTED = _c.updated_at > literal_column("0")  # no parameter: a plan for any value could not use the index
"""True of every record. Only who lists a state asks for it, so that no planner looks for a run in that index, where
every run since the last vacuum has left an entry, instead of by its key."""


def _partial(name: str, condition: ColumnElement[bool], *columns: Column[Any]) -> Index:
    """An index of the rows it is asked for alone: every run would pay for the others. MySQL indexes them all."""
    return Index(name, *columns, postgresql_where=condition, sqlite_where=condition)


_partial("taskguard_messages_due", _c.due_at.is_not(None), _c.namespace, _c.due_at, _c.id)
_partial("taskguard_messages_listed", LISTED, _c.namespace, _c.state, _c.updated_at, _c.id)
_partial("taskguard_messages_expiry", _c.expires_at.is_not(None), _c.namespace, _c.expires_at)
_partial("taskguard_messages_waiting", _c.waits_on != "", _c.namespace, _c.waits_on)
Index(
    "taskguard_messages_ordering",
    _c.namespace,
    _c.ordering,
    _c.ordinal,
    postgresql_where=_KEYED,
    sqlite_where=_KEYED,
)

versions = Table(
    "taskguard_schema",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("version", Integer, nullable=False),
    **_MYSQL,
)
"""One row, ``messages``: the version of these tables, see `taskguard.stores.sql.migrations`."""

revocations = Table(
    "taskguard_revocations",
    metadata,
    Column("namespace", String(NAMESPACE_LENGTH), primary_key=True),
    Column("id", String(40), primary_key=True),
    Column("task_id", AnyText, nullable=False),
    Column("until_at", BigInteger, nullable=False),
    Index("taskguard_revocations_until", "namespace", "until_at"),
    **_MYSQL,
)

uniques = Table(
    "taskguard_uniques",
    metadata,
    Column("namespace", String(NAMESPACE_LENGTH), primary_key=True),
    Column("id", String(40), primary_key=True),
    Column("name", AnyText, nullable=False),
    Column("task_id", AnyText, nullable=False),
    Column("until_at", BigInteger, nullable=False),
    Index("taskguard_uniques_until", "namespace", "until_at"),
    **_MYSQL,
)

permits = Table(
    "taskguard_permits",
    metadata,
    Column("namespace", String(NAMESPACE_LENGTH), primary_key=True),
    Column("id", String(40), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("name", AnyText, nullable=False),
    Column("state", _Long, nullable=False),
    Column("expires_at", BigInteger),
    Index("taskguard_permits_kind", "namespace", "kind"),
    Index("taskguard_permits_expiry", "namespace", "expires_at"),
    **_MYSQL,
)
"""A limit, a line, the places of a bulkhead or a circuit each: its state as JSON, see `taskguard.limits.admission`."""

rules = Table(
    "taskguard_rules",
    metadata,
    Column("namespace", String(NAMESPACE_LENGTH), primary_key=True),
    Column("id", String(100), primary_key=True),
    Column("rule", _Long, nullable=False),
    **_MYSQL,
)
"""Each rule as JSON, and under an id that no rule can have the tiers that are declared."""

rule_versions = Table(
    "taskguard_rule_versions",
    metadata,
    Column("namespace", String(NAMESPACE_LENGTH), primary_key=True),
    Column("version", BigInteger, nullable=False),
    **_MYSQL,
)
"""One row for each namespace, locked by whoever changes its rules."""

rule_changes = Table(
    "taskguard_rule_changes",
    metadata,
    Column("namespace", String(NAMESPACE_LENGTH), primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("made_at", BigInteger, nullable=False),
    Column("who", AnyText, nullable=False),
    Column("why", AnyText, nullable=False),
    Column("what", _Long, nullable=False),
    **_MYSQL,
)

demand = Table(
    "taskguard_demand",
    metadata,
    Column("namespace", String(NAMESPACE_LENGTH), primary_key=True),
    Column("window_at", BigInteger, primary_key=True, autoincrement=False),
    Column("id", String(40), primary_key=True),
    Column("client", AnyText, nullable=False),
    Column("endpoint", AnyText, nullable=False),
    Column("rule", AnyText, nullable=False),
    Column("accepted", Double, nullable=False),
    Column("refused", Double, nullable=False),
    **_MYSQL,
)

RECORD = [_c[name] for name in Record.__dataclass_fields__]
"""The columns of a record, in its order."""

_INSTANTS = frozenset({"due_at", "expires_at", "created_at", "updated_at"})
_FIELDS = tuple((name, name in _INSTANTS) for name in Record.__dataclass_fields__)


def to_row(record: Record) -> dict[str, object]:
    """The record as the columns rest."""
    row: dict[str, object] = {}
    for name, is_instant in _FIELDS:
        value = getattr(record, name)
        row[name] = to_ms(value) if is_instant and value is not None else value
    row["state"] = record.state.value
    return row


def to_record(row: Sequence[Any]) -> Record:
    """Read the columns of `RECORD`."""
    fields: dict[str, object] = {}
    for (name, is_instant), value in zip(_FIELDS, row, strict=True):
        fields[name] = value / 1000 if is_instant and isinstance(value, int) else value
    fields["state"] = State(str(fields["state"]))
    return Record(**fields)  # type: ignore[arg-type]
