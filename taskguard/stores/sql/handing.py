"""Taking rows out of the outbox: the statements of `taskguard.handover.Outbox.hand_over`, for each kind of database.

PostgreSQL deletes the rows and returns them in one statement, and commits when the broker has confirmed; what was not
published is inserted again in the same transaction. MySQL locks, and deletes at the end. Both skip what another relay
has locked, and give everything back when the relay dies. In SQLite a transaction would stop the producers while the
broker is asked, so there the rows are leased.

A row with an ordering key is taken only where it is the first of its key. A relay that has taken the first owns the
key, because the others see that row until the transaction ends; so it may take those that follow as well.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    and_,
    delete,
    exists,
    func,
    insert,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError

from taskguard.clock import to_ms
from taskguard.envelope import Envelope
from taskguard.errors import MessageError
from taskguard.handover import LATER, MAX_TRIES, Dispatch, Handed, Held, Outgoing, backoff, refusal
from taskguard.record import State, append_history
from taskguard.stores.sql.schema import messages

_c = messages.c
_e = messages.alias("earlier")
_PENDING = State.PENDING.value
_TAKEN = (_c.id, _c.wire, _c.ordering, _c.ordinal, _c.crashes, _c.due_at, _c.created_at, _c.history)

Row = Any
"""A row of `_TAKEN`."""


def outgoing(row: Row) -> Outgoing:
    """The row as the dispatcher gets it."""
    return Outgoing(row[0], bytes(row[1]), row[2], row[3], row[4])


def settle(
    rows: Sequence[Row], dispatch: Dispatch, handed: Handed, now: float
) -> tuple[list[str], dict[str, dict[str, object]]]:
    """Dispatch *rows*, oldest first. Returns the ids that are published, and what changes in the others."""
    going = [outgoing(row) for row in rows]
    published: list[str] = []
    changes: dict[str, dict[str, object]] = {}
    for row, each, why in zip(rows, going, dispatch(going), strict=True):
        if why is None:
            published.append(each.id)
            continue
        if isinstance(why, Held):
            handed.away = handed.away or why.away
            handed.later = handed.later or why.later
            due_at = to_ms(now + LATER) if why.later is not None else min(row[5], to_ms(now))
            changes[each.id] = {"lease": "", "due_at": due_at}
            continue
        handed.refused.append((each, why))
        failure, attempt = refusal(why)
        change: dict[str, object] = {
            "lease": "",
            "crashes": each.tries + 1,
            "history": append_history(row[7], attempt),
            "due_at": to_ms(now + backoff(each.tries + 1)),
            "updated_at": to_ms(now),
        }
        if each.tries + 1 >= MAX_TRIES:
            change |= {"state": State.DEAD.value, "failure": failure.to_json(), "due_at": None}
            change |= {"outbox": False, "wire": _plain(each.wire)}
        changes[each.id] = change
    handed.taken, handed.published = len(going), len(published)
    return published, changes


def _plain(wire: bytes) -> bytes:
    """As a dead letter is read by operators."""
    try:
        return Envelope.from_wire(wire).to_wire()
    except MessageError:
        return wire


# -- PostgreSQL --------------------------------------------------------------------------------------------------------

_IN_ORDER = "SET LOCAL enable_sort = off"
"""The statistics of a table that is empty now and full then are never true. With any, the index gives the first rows in
their order; a plan that believes there are few reads and sorts them all, for each batch."""
_UNCOMPILED = "SET LOCAL jit = off"
"""Where there is no way but to sort, that setting makes a plan look so dear that it is compiled first, for seconds."""
_NOW = "CAST(EXTRACT(EPOCH FROM statement_timestamp()) * 1000 AS BIGINT)"
_EARLIER = """SELECT FROM taskguard_messages e WHERE e.namespace = m.namespace AND e.ordering = m.ordering
    AND e.ordering <> '' AND e.state = 'pending'
    AND (e.ordinal < m.ordinal OR (e.ordinal = m.ordinal AND e.id < m.id))"""
_DUE = """m.namespace = %(namespace)s AND m.outbox AND m.due_at <= {now}
    AND (m.deadline_at IS NULL OR m.deadline_at > {now})"""
_OF_ROWS = "RETURNING id, wire, ordering, ordinal, crashes, due_at, created_at, history"
_FIRST = f"""DELETE FROM taskguard_messages WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM taskguard_messages m WHERE {_DUE} AND (m.ordering = '' OR NOT EXISTS ({_EARLIER}))
    ORDER BY m.due_at, m.id LIMIT %(limit)s FOR UPDATE OF m SKIP LOCKED)) {_OF_ROWS}"""
_FOLLOWING = f"""DELETE FROM taskguard_messages WHERE ctid = ANY(ARRAY(
    SELECT found.place FROM unnest(%(keys)s::text[]) AS mine(ordering)
    CROSS JOIN LATERAL (
        SELECT min(e.ordinal) AS ordinal FROM taskguard_messages e
        WHERE e.namespace = %(namespace)s AND e.ordering = mine.ordering AND e.ordering <> '' AND e.state = 'pending'
        AND (e.due_at IS NULL OR e.due_at > {{now}} OR e.deadline_at <= {{now}})) stop
    CROSS JOIN LATERAL (
        SELECT m.ctid AS place, m.ordinal, m.id FROM taskguard_messages m
        WHERE {_DUE} AND m.ordering = mine.ordering AND m.ordering <> ''
        AND (stop.ordinal IS NULL OR m.ordinal < stop.ordinal)
        ORDER BY m.ordinal, m.id LIMIT %(each)s FOR UPDATE OF m) found
    ORDER BY found.ordinal, found.id LIMIT %(limit)s)) {_OF_ROWS}"""
"""Up to where a key is stopped is found once for each key: asked of each row, a backlog would cost its square."""


def take_from_postgresql(
    connection: Connection,
    namespace: str,
    dispatch: Dispatch,
    *,
    limit: int,
    retention: float,
    now: float,
    told: bool,
) -> Handed:
    """In a transaction: delete and return, dispatch, insert what was not published.

    What is due is decided by the server's clock, by which rows are written, unless *told* to go by *now*.
    """
    words = {"now": str(to_ms(now)) if told else _NOW}
    raw = connection.connection.driver_connection
    assert raw is not None
    handed = Handed()
    with _told_by_sqlalchemy(connection), raw.cursor(binary=True) as cursor:
        with raw.pipeline():
            cursor.execute(_IN_ORDER)
            cursor.execute(_UNCOMPILED)
            cursor.execute(_FIRST.format_map(words), {"namespace": namespace, "limit": limit})
        rows: list[Row] = cursor.fetchall()
        keys = list({row[2] for row in rows if row[2]})
        if keys and len(rows) < limit:
            more = limit - len(rows)
            given = {"namespace": namespace, "limit": more, "each": -(-2 * more // len(keys)), "keys": keys}
            cursor.execute(_FOLLOWING.format_map(words), given)
            rows += cursor.fetchall()
        if not rows:
            return handed
        rows.sort(key=_order)
    published, changes = settle(rows, dispatch, handed, now)
    left = set(published) if retention else frozenset()
    back = [_whole(namespace, row, changes[row[0]]) for row in rows if row[0] in changes]
    kept = {"state": State.PUBLISHED.value, "due_at": None, "expires_at": to_ms(now + retention)}
    back += [_whole(namespace, row, kept | {"updated_at": to_ms(now)}) for row in rows if row[0] in left]
    if back:
        names = {name for each in back for name in each}
        connection.execute(insert(messages), [{**dict.fromkeys(names), **each} for each in back])
    return handed


@contextmanager
def _told_by_sqlalchemy(connection: Connection) -> Iterator[None]:
    """The driver's errors as SQLAlchemy's, by which the store knows what they ask for."""
    driver: Any = connection.dialect.loaded_dbapi.Error
    try:
        yield
    except driver as exc:
        raise DBAPIError.instance(
            None,
            None,
            exc,
            driver,
            connection_invalidated=bool(connection.connection.driver_connection.closed),  # type: ignore[union-attr]
        ) from exc


def _order(row: Row) -> tuple[int, str]:
    return row[3], row[0]


def _whole(namespace: str, row: Row, change: Mapping[str, object]) -> dict[str, object]:
    id, wire, ordering, ordinal, crashes, due_at, created_at, history = row
    try:
        envelope = Envelope.from_wire(bytes(wire))
    except MessageError:
        envelope = Envelope(task="", task_id=id, key="", body=b"")
    deadline = envelope.deadline_at
    whole: dict[str, object] = {
        "namespace": namespace,
        "id": id,
        "task": envelope.task,
        "task_id": envelope.task_id,
        "key": envelope.key,
        "state": _PENDING,
        "primary": False,
        "sequence": envelope.sequence,
        "fingerprint": envelope.fingerprint,
        "queue": envelope.queue,
        "token": 0,
        "holder": "",
        "crashes": crashes,
        "lease": "",
        "kept": False,
        "due_at": due_at,
        "expires_at": None,
        "waits_on": "",
        "wire": bytes(wire),
        "failure": "",
        "history": history,
        "created_at": created_at,
        "updated_at": created_at,
        "awaited": False,
        "outbox": True,
        "ordering": ordering,
        "ordinal": ordinal,
        "deadline_at": None if deadline is None else to_ms(deadline),
    }
    return whole | dict(change)


# -- MySQL and SQLite --------------------------------------------------------------------------------------------------


def _due(namespace: str, now_ms: int) -> ColumnElement[bool]:
    in_time = or_(_c.deadline_at.is_(None), _c.deadline_at > now_ms)
    return and_(_c.namespace == namespace, _c.outbox, _c.state == _PENDING, _c.due_at <= now_ms, in_time)


def _first(namespace: str, now_ms: int, limit: int, *columns: Any) -> Select[Any]:
    before = or_(_e.c.ordinal < _c.ordinal, and_(_e.c.ordinal == _c.ordinal, _e.c.id < _c.id))
    same = and_(_e.c.namespace == _c.namespace, _e.c.ordering == _c.ordering, _e.c.ordering != "")
    earlier: Select[Any] = select(literal_column("1")).select_from(_e).where(same, _e.c.state == _PENDING, before)
    # MySQL would read the whole namespace for each row.
    earlier = earlier.with_hint(_e, "USE INDEX (taskguard_messages_ordering)", "mysql").correlate(messages)
    first = or_(_c.ordering == "", ~exists(earlier))
    return select(*columns).where(_due(namespace, now_ms), first).order_by(_c.due_at, _c.id).limit(limit)


def _following(
    connection: Connection, namespace: str, now_ms: int, limit: int, keys: Sequence[str], lease: str, *columns: Any
) -> Select[Any]:
    stopped = or_(_c.due_at.is_(None), _c.due_at > now_ms, _c.deadline_at <= now_ms)
    if lease:
        stopped = and_(stopped, _c.lease != lease)
    pending = and_(_c.namespace == namespace, _c.ordering.in_(keys), _c.ordering != "", _c.state == _PENDING)
    asked = select(_c.ordering, func.min(_c.ordinal)).where(pending, stopped).group_by(_c.ordering)
    stops = {row[0]: row[1] for row in connection.execute(asked)}
    free = _c.ordering.in_([key for key in keys if key not in stops])
    before = [and_(_c.ordering == key, _c.ordinal < stop) for key, stop in stops.items()]
    query = select(*columns).where(_due(namespace, now_ms), or_(free, *before))
    return query.order_by(_c.ordinal, _c.id).limit(limit)


def take_from_mysql(
    connection: Connection, namespace: str, dispatch: Dispatch, *, limit: int, retention: float, now: float
) -> Handed:
    """In a transaction: lock, dispatch, delete what was published."""
    handed, now_ms = Handed(), to_ms(now)
    query = _first(namespace, now_ms, limit, *_TAKEN).with_for_update(skip_locked=True)
    rows = list(connection.execute(query).all())
    keys = list({row.ordering for row in rows if row.ordering})
    if keys and len(rows) < limit:
        mine = {row.id for row in rows}
        more = _following(connection, namespace, now_ms, limit, keys, "", *_TAKEN).with_for_update()
        rows += [row for row in connection.execute(more).all() if row.id not in mine][: limit - len(rows)]
    if rows:
        rows.sort(key=_order)
        published, changes = settle(rows, dispatch, handed, now)
        write(connection, namespace, published, changes, retention=retention, now=now)
    return handed


def lease_from_sqlite(connection: Connection, namespace: str, *, limit: int, lease: float, now: float) -> list[Row]:
    """One transaction: lease rows to the caller. Their order is that in which they were written."""
    now_ms, name = to_ms(now), uuid.uuid4().hex
    rows: list[Row] = []

    def take(query: Select[Any]) -> None:
        taken = update(messages).where(_c.namespace == namespace, _c.id.in_(query))
        taken = taken.values(lease=name, due_at=to_ms(now + lease))
        rows.extend(connection.execute(taken.returning(*_TAKEN)).all())

    take(_first(namespace, now_ms, limit, _c.id))
    keys = list({row.ordering for row in rows if row.ordering})
    if keys and len(rows) < limit:
        take(_following(connection, namespace, now_ms, limit - len(rows), keys, name, _c.id))
    return sorted(rows, key=_order)


def write(
    connection: Connection,
    namespace: str,
    published: Sequence[str],
    changes: Mapping[str, Mapping[str, object]],
    *,
    retention: float,
    now: float,
) -> None:
    """Remove, or keep, what was published, and write what changed in the rest."""
    if published:
        these = and_(_c.namespace == namespace, _c.id.in_(published))
        if retention:
            until = to_ms(now + retention)
            kept = {"state": State.PUBLISHED.value, "lease": "", "due_at": None, "expires_at": until}
            connection.execute(update(messages).where(these).values(updated_at=to_ms(now), **kept))
        else:
            connection.execute(delete(messages).where(these))
    for id, change in changes.items():
        connection.execute(update(messages).where(_c.namespace == namespace, _c.id == id).values(dict(change)))
