"""Rows that a producer writes in its own transaction: one statement, in the words of the producer's driver.

Instants are the database server's, because producers' clocks differ: a row is due when it is written, or when it is to
be. ``ordinal`` is the order in which rows were written: thousandths of a microsecond of the same clock, of which the
thousandths are the row's place in its statement. So what is written by the next statement comes after it, however many
rows that had. On PostgreSQL the statement also tells the relays, who hear it when the transaction commits, and not when
it is rolled back. A message that is sent again under the same task id takes the place of what rests under it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from operator import itemgetter
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Dialect,
    LargeBinary,
    String,
    bindparam,
    cast,
    false,
    func,
    literal_column,
    null,
)
from sqlalchemy import true as sql_true
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.sql.dml import Insert

from taskguard.envelope import Envelope, record_id
from taskguard.record import State
from taskguard.stores.sql.schema import AnyText, messages

_c = messages.c
FAMILIES = ("postgresql", "mysql", "mariadb", "sqlite")

ROWS = 1000
"""The most rows of one statement: MySQL has one instant for all of them, and a microsecond so many places."""

_REPLACED = (
    "state", "sequence", "fingerprint", "queue", "due_at", "expires_at", "wire", "updated_at", "lease", "crashes",
    "failure", "history", "outbox", "ordering", "ordinal", "deadline_at",
)  # fmt: skip
_EMPTY = ("holder", "lease", "waits_on", "failure", "history")
_SERVER_US = {
    "postgresql": "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)",
    # NOW() would be a local time, and an hour of those comes twice a year.
    "mysql": "CAST(UNIX_TIMESTAMP() * 1000000 + MICROSECOND(NOW(6)) AS SIGNED)",
}
_SERVER_MS = {
    "postgresql": "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)",
    "mysql": "CAST(UNIX_TIMESTAMP() * 1000 + FLOOR(MICROSECOND(NOW(6)) / 1000) AS SIGNED)",
}


@lru_cache(maxsize=256)
def channel(namespace: str) -> str:
    """The channel on which relays of *namespace* listen."""
    return f"taskguard_{record_id(namespace)}"


def family(dialect_name: str) -> str:
    """The kind of database: a MariaDB is a MySQL here."""
    return "mysql" if dialect_name == "mariadb" else dialect_name


def _text(name: str) -> ColumnElement[str]:
    return bindparam(f"o_{name}", type_=AnyText())


def _now(kind: str, words: Mapping[str, str], name: str) -> ColumnElement[int]:
    known = words.get(kind)
    return bindparam(name, type_=BigInteger()) if known is None else literal_column(known, BigInteger())


@cache
def insertion(kind: str, *, tells: bool) -> Insert:
    """The statement, for a kind of database. With *tells*, it notifies relays where the database can."""
    now = _now(kind, _SERVER_MS, "o_now")
    row: dict[str, Any] = {
        "namespace": bindparam("o_namespace", type_=String()),
        "id": bindparam("o_id", type_=String()),
        **{name: _text(name) for name in ("task", "task_id", "key", "fingerprint", "queue")},
        "state": literal_column(f"'{State.PENDING.value}'"),
        "primary": false(),
        "sequence": bindparam("o_sequence", type_=BigInteger()),
        **{name: literal_column("''") for name in _EMPTY},
        **{name: literal_column("0") for name in ("token", "crashes")},
        "kept": false(),
        "awaited": false(),
        "due_at": func.coalesce(cast(bindparam("o_due_at", type_=BigInteger()), BigInteger()), now),
        "expires_at": null(),
        "wire": bindparam("o_wire", type_=LargeBinary()),
        "result": null(),
        "created_at": now,
        "updated_at": now,
        "outbox": sql_true(),
        "ordering": bindparam("o_ordering", type_=String()),
        "ordinal": _now(kind, _SERVER_US, "o_now_us") * literal_column(str(ROWS))
        + bindparam("o_step", type_=BigInteger()),
        "deadline_at": bindparam("o_deadline_at", type_=BigInteger()),
    }
    match kind:
        case "postgresql":
            if tells:
                # It says nothing, which is what this column is given. Returned, it would be a row to be read.
                told = func.pg_notify(bindparam("o_channel", type_=String()), literal_column("''"))
                row["holder"] = cast(told, String())
            insert = postgresql.insert(messages).values(row)
            replaced = {_c[name]: insert.excluded[name] for name in _REPLACED}
            return insert.on_conflict_do_update(index_elements=[_c.namespace, _c.id], set_=replaced)
        case "sqlite":
            other = sqlite.insert(messages).values(row)
            replaced = {_c[name]: other.excluded[name] for name in _REPLACED}
            return other.on_conflict_do_update(index_elements=[_c.namespace, _c.id], set_=replaced)
        case _:
            third = mysql.insert(messages).values(row)
            return third.on_duplicate_key_update({name: third.inserted[name] for name in _REPLACED})


class Spelling:
    """The statement of one row as a driver takes it: SQLAlchemy would take as long to spell it as to execute it."""

    def __init__(self, kind: str, dialect: Dialect, *, tells: bool) -> None:
        compiled = insertion(kind, tells=tells).compile(dialect=dialect)
        self.text = str(compiled)
        self._names = compiled.positiontup if compiled.positional else None
        binds = compiled.binds.items()
        made = ((name, bound.type.dialect_impl(dialect).bind_processor(dialect)) for name, bound in binds)
        self._made = [(name, make) for name, make in made if make is not None]
        self._texts = itemgetter(*(name for name, bound in binds if isinstance(bound.type, AnyText)))

    def arguments(self, given: dict[str, Any]) -> Any:
        """What `parameters` made, in the driver's order; *given* is changed."""
        texts = "".join(self._texts(given))
        storable = texts.isprintable() and "\\" not in texts  # as they are: see `AnyText`
        for name, make in self._made:
            if not storable or type(given[name]) is not str:
                given[name] = make(given[name])
        return given if self._names is None else tuple(given[name] for name in self._names)


def parameters(
    envelope: Envelope,
    *,
    namespace: str,
    wire: bytes,
    due_at_ms: int | None,
    ordering: str,
    step: int,
    kind: str,
    tells: bool,
) -> dict[str, object]:
    """What the statement is given for one message. *due_at_ms* None: at once. *ordering*: the ordering key or "".

    *step*: its number among those that are sent together.
    """
    deadline = envelope.deadline_at
    given: dict[str, object] = {
        "o_namespace": namespace,
        "o_id": envelope.copy_id,
        "o_task": envelope.task,
        "o_task_id": envelope.task_id,
        "o_key": envelope.key,
        "o_fingerprint": envelope.fingerprint,
        "o_queue": envelope.queue,
        "o_sequence": envelope.sequence,
        "o_due_at": due_at_ms,
        "o_wire": wire,
        "o_ordering": record_id(ordering) if ordering else "",
        "o_step": step % ROWS,
        "o_deadline_at": None if deadline is None else round(deadline * 1000),
    }
    if kind not in _SERVER_MS:
        now_us = _ticker.now_us()
        given |= {"o_now": now_us // 1000, "o_now_us": now_us}
    if tells and kind == "postgresql":
        given["o_channel"] = channel(namespace)
    return given


class _Ticker:
    """This machine's clock in microseconds, which never says the same twice: SQLite's rows are ordered by it."""

    def __init__(self) -> None:
        self._last = 0
        self._lock = threading.Lock()

    def now_us(self) -> int:
        with self._lock:
            self._last = max(time.time_ns() // 1000, self._last + 1)
            return self._last


_ticker = _Ticker()


def is_missing_table(exc: BaseException) -> bool:
    """Whether an error of any driver says that the table is not there, or lacks the outbox's columns."""
    text = str(exc).lower()
    named = messages.name in text or any(name in text for name in ("ordering", "ordinal", "outbox"))
    signs: Sequence[str] = ("no such table", "does not exist", "doesn't exist", "no column named", "unknown column")
    return named and any(sign in text for sign in signs)
