"""What only the permits in a SQL database have to promise: how long a call may take, and what becomes of old rows."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, func, insert, select
from sqlalchemy.exc import SQLAlchemyError

from taskguard.errors import ConfigurationError, StoreUnavailable
from taskguard.policies.rates import TokenBucket
from taskguard.stores import open_permits
from taskguard.stores.sql import permits as sql_permits
from taskguard.stores.sql.dialect import Fault
from taskguard.stores.sql.schema import permits as table
from tests.contracts.permits import MicroClock, admitted, take


@pytest.fixture
def mute_port() -> Iterator[int]:
    """A port where connections are accepted and nothing is ever said."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield listener.getsockname()[1]


@pytest.mark.parametrize("url", ["postgresql://nobody@127.0.0.1:{}/none", "mysql://nobody@127.0.0.1:{}/none"])
def test_a_server_that_says_nothing_costs_its_timeout(url: str, mute_port: int) -> None:
    """A tenth of a second, not the two that libpq waits at least: one such wait, and one more on a new connection."""
    permits = open_permits(url.format(mute_port), timeout=0.1)
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            take(permits, TokenBucket(1))
        assert time.monotonic() - began < 1.0


def test_a_connection_that_comes_too_late_is_closed(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it any more, and the server has only so many."""
    import psycopg

    from taskguard.stores.sql.postgresql import BoundedConnection

    may_connect, closed = threading.Event(), threading.Event()

    class Late:
        def close(self) -> None:
            closed.set()

    def connect_late(*_: object, **__: object) -> Late:
        assert may_connect.wait(30)
        return Late()

    monkeypatch.setattr(psycopg.Connection, "connect", connect_late)
    with pytest.raises(psycopg.OperationalError, match=r"no connection in 0\.01 s"):
        BoundedConnection.connect("", tcp_user_timeout=10)
    assert not closed.is_set()
    may_connect.set()
    assert closed.wait(30)


def test_a_refused_connection_is_told_as_it_was(mute_port: int) -> None:
    """An error of the attempt is not hidden by the thread it is made in."""
    permits = open_permits("postgresql://nobody@127.0.0.1:1/none", timeout=0.5)
    with pytest.raises(StoreUnavailable, match="refused"):
        take(permits, TokenBucket(1))


def test_rows_that_say_nothing_any_more_are_deleted(
    tmp_path: Path, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute after their end; rows that are live, or never end, stay."""
    monkeypatch.setattr(sql_permits, "SWEPT_EVERY", 3600.0)
    clock, url = MicroClock(), f"sqlite:///{tmp_path / 'permits.sqlite3'}"
    permits = open_permits(url, namespace=namespace, timeout=30, clock=clock)
    permits.pause("mail", until=None, who="", why="")
    take(permits, TokenBucket(1, per=3600), name="long")
    for n in range(20):
        take(permits, TokenBucket(1), name=f"client-{n}")

    def rows() -> int:
        with create_engine(url).connect() as connection:
            return connection.execute(select(func.count()).select_from(table)).scalar_one()

    assert isinstance(permits, sql_permits.SQLPermits)
    clock.advance(60)
    assert permits.sweep() == 0
    assert rows() == 22
    clock.advance(2)
    assert permits.sweep() == 20
    assert rows() == 2
    assert not admitted(take(permits, TokenBucket(1, per=3600), name="long"))
    permits.close()


def test_many_old_rows_are_deleted_in_batches_and_not_by_a_call(
    tmp_path: Path, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One statement for all of them would outlast the timeout, be undone, and so never end."""
    monkeypatch.setattr(sql_permits, "SWEPT_EVERY", 0.0)
    permits = open_permits(f"sqlite:///{tmp_path / 'permits.sqlite3'}", namespace=namespace, timeout=30)
    assert isinstance(permits, sql_permits.SQLPermits)
    engine = permits._database.engine
    permits.circuits()  # makes the tables
    old = {"namespace": namespace, "kind": "rate", "name": "n", "state": "[]", "expires_at": 1}
    with engine.connect() as connection:
        connection.execute(insert(table), [{**old, "id": f"old-{n}"} for n in range(2 * sql_permits.BATCH + 200)])
    deleted: list[tuple[int, str]] = []
    all_gone = threading.Event()

    @event.listens_for(engine, "after_cursor_execute")
    def count(_connection: object, cursor: Any, statement: str, *_: object) -> None:
        if statement.startswith("DELETE"):
            deleted.append((cursor.rowcount, threading.current_thread().name))
            if sum(many for many, _ in deleted) >= 2 * sql_permits.BATCH + 200:
                all_gone.set()

    take(permits, TokenBucket(1))
    assert all_gone.wait(30)
    assert deleted == [(many, "taskguard-tending") for many in (sql_permits.BATCH, sql_permits.BATCH, 200)]
    permits.close()


@pytest.mark.parametrize(("lost_after", "tries"), [(0.0, 2), (0.06, 1)])
def test_a_lost_connection_is_tried_again_only_while_half_of_the_timeout_is_left(
    tmp_path: Path, lost_after: float, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that says nothing would else take the timeout twice."""
    permits = open_permits(f"sqlite:///{tmp_path / 'permits.sqlite3'}", timeout=0.1)
    assert isinstance(permits, sql_permits.SQLPermits)
    database, now, tried = permits._database, [0.0], []
    monkeypatch.setattr(database.dialect, "diagnose", lambda _: Fault.LOST)
    monkeypatch.setattr("taskguard.stores.sql.database.time.monotonic", lambda: now[0])

    def fail(_: object) -> None:
        tried.append(True)
        now[0] += lost_after
        raise SQLAlchemyError("lost")

    with pytest.raises(StoreUnavailable):
        database.run(fail)
    monkeypatch.undo()
    assert len(tried) == tries


def test_a_namespace_that_is_too_long_is_refused() -> None:
    """Its column would cut it, and two namespaces would share their permits."""
    with pytest.raises(ConfigurationError, match="use 64 characters or less"):
        open_permits("sqlite:////tmp/none.sqlite3", namespace="n" * 65)
