"""What only the SQL store promises: its tables, its connections, and what it says when a database fails.

What it has in common with the other stores is in ``tests/contracts``.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError

from taskguard.custody import Claimed, Completed
from taskguard.envelope import Envelope
from taskguard.errors import ConfigurationError, StoreError, StoreUnavailable
from taskguard.record import Failure, Reason
from taskguard.stores.sql import SQLStore
from taskguard.stores.sql.database import Database
from taskguard.stores.sql.dialect import dialect_of
from tests.clocks import ManualClock

Open = Callable[..., SQLStore]
SERVERS = ("postgresql", "mariadb")


@pytest.fixture(params=["sqlite", *SERVERS])
def url(request: pytest.FixtureRequest) -> str:
    """The URL of each database in turn."""
    found: str = request.getfixturevalue(f"{request.param}_url")
    return found


@pytest.fixture(params=SERVERS)
def server_url(request: pytest.FixtureRequest) -> str:
    """The URL of each database server in turn."""
    found: str = request.getfixturevalue(f"{request.param}_url")
    return found


@pytest.fixture
def open_sql(namespace: str) -> Iterator[Open]:
    """Open stores of one namespace; they are closed afterwards."""
    opened: list[SQLStore] = []

    def open_one(url: str, **options: Any) -> SQLStore:
        opened.append(SQLStore.from_url(url, namespace=namespace, **options))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def message(key: str = "order-1", *, task_id: str = "task-1") -> Envelope:
    return Envelope(task="shop.charge", task_id=task_id, key=key, body=b"[]", fingerprint="same")


def claim(store: SQLStore, envelope: Envelope) -> int:
    answer = store.claim(envelope, holder=f"worker/{envelope.task_id}", lease=15, max_crashes=3)
    assert isinstance(answer, Claimed)
    return answer.token


class Relayed:
    """A TCP relay in front of a server, which can fall silent while it keeps every connection."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listening = threading.Event()
        self._listening.set()
        self._sockets: list[socket.socket] = [self._listener]
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def fall_silent(self) -> None:
        self._listening.clear()

    def close(self) -> None:
        self._listening.set()
        for sock in self._sockets:
            sock.close()

    def _accept(self) -> None:
        try:
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._sockets += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()
        except OSError:
            return

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self._listening.wait()
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return


def test_processes_that_create_the_tables_at_once_all_succeed(tmp_path: Path, namespace: str) -> None:
    """The first workers of a fresh installation start together."""
    url = f"sqlite:///{tmp_path / 'fresh.sqlite3'}"
    stores = [SQLStore.from_url(url, namespace=namespace) for _ in range(6)]
    with ThreadPoolExecutor(len(stores)) as threads:
        list(threads.map(SQLStore.ping, stores))
    claim(stores[0], message())
    for store in stores:
        store.close()


@pytest.fixture
def fresh_database(server_url: str, namespace: str) -> Iterator[str]:
    """A database on each server that has no tables yet."""
    engine = create_engine(server_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {namespace}"))
        yield make_url(server_url).set(database=namespace).render_as_string(hide_password=False)
        connection.execute(text(f"DROP DATABASE {namespace}"))
    engine.dispose()


def test_servers_let_several_create_the_tables_at_once(fresh_database: str, open_sql: Open) -> None:
    """Whoever loses the race uses the tables of the winner."""
    stores = [open_sql(fresh_database) for _ in range(5)]
    with ThreadPoolExecutor(len(stores)) as threads:
        list(threads.map(lambda n: claim(stores[n], message(f"k{n}")), range(5)))
    for store in stores:
        store.close()


def test_a_deadlock_is_run_again(server_url: str, namespace: str, open_sql: Open) -> None:
    """Two transactions that lock the same rows the other way round both end well."""
    store = open_sql(server_url)
    store.ping()
    for key in ("a", "b"):
        claim(store, message(key))
    database = Database(dialect_of(server_url), timeout=5.0, clock=None)
    met = threading.Barrier(2)
    runs = []

    def lock_both(first: str, second: str) -> None:
        def work(connection: Connection) -> None:
            runs.append(first)
            touch(connection, first)
            if len(runs) <= 2:
                met.wait(5)
            touch(connection, second)

        database.run(work, transaction=True)

    def touch(connection: Connection, key: str) -> None:
        row = {"namespace": namespace, "id": message(key).id}
        statement = "UPDATE taskguard_messages SET crashes = crashes + 1 WHERE namespace = :namespace AND id = :id"
        connection.execute(text(statement), row)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lock_both, ("a", "b"), ("b", "a")))
    database.close()
    assert len(runs) > 2, "no deadlock came about"
    crashes = [store.find(message(key).id) for key in ("a", "b")]
    assert [record.crashes for record in crashes if record] == [2, 2]


def test_a_connection_the_server_killed_is_replaced(server_url: str, open_sql: Open) -> None:
    """A restarted server costs the next call nothing but a new connection."""
    store = open_sql(server_url)
    store.ping()
    engine = store._database.engine
    postgresql = engine.dialect.name == "postgresql"
    with engine.connect() as connection:
        query = "SELECT pg_backend_pid()" if postgresql else "SELECT CONNECTION_ID()"
        backend = connection.exec_driver_sql(query).scalar_one()
    killer = create_engine(server_url, isolation_level="AUTOCOMMIT")
    with killer.connect() as connection:
        kill = f"SELECT pg_terminate_backend({backend}, 5000)" if postgresql else f"KILL {backend}"
        connection.exec_driver_sql(kill)
    killer.dispose()
    token = claim(store, message())
    assert store.complete(message().id, token, result=b"1", retention=60)


def test_a_forked_child_has_connections_of_its_own(url: str, open_sql: Open) -> None:
    """The pool of a prefork worker inherits the parent's sockets: it neither uses nor closes them."""
    store = open_sql(url)
    token = claim(store, message("parent"))
    child = os.fork()
    if child == 0:
        try:
            claim(store, message("child"))
            store.close()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store.complete(message("parent").id, token, result=b"1", retention=60)
    assert store.holds(message("child").id, claim_token(store, message("child")))


def claim_token(store: SQLStore, envelope: Envelope) -> int:
    record = store.find(envelope.id)
    assert record is not None
    return record.token


@pytest.mark.parametrize("scheme", ["postgresql", "mysql"])
def test_an_unreachable_server_is_one_line_without_the_password(scheme: str, open_sql: Open) -> None:
    """The line names the URL and the way out, and comes in time."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    store = open_sql(f"{scheme}://app:s3cret@127.0.0.1:{port}/shop", timeout=2.0)
    started = time.monotonic()
    with pytest.raises(StoreUnavailable) as caught:
        store.ping()
    assert time.monotonic() - started < 4
    line = str(caught.value)
    assert "\n" not in line
    assert "s3cret" not in line
    assert f"app:***@127.0.0.1:{port}/shop" in line
    assert "check that the server is up" in line


def test_a_server_that_falls_silent_is_given_up_in_time(server_url: str, open_sql: Open) -> None:
    """It keeps the connection and never answers: a hung process, or a network that swallows packets."""
    url = make_url(server_url)
    assert url.host is not None
    assert url.port is not None
    relayed = Relayed(url.host, url.port)
    with closing(relayed):
        store = open_sql(url.set(port=relayed.port).render_as_string(hide_password=False), timeout=2.0)
        token = claim(store, message())
        relayed.fall_silent()
        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            store.complete(message().id, token, result=b"1", retention=60)
        assert time.monotonic() - started < 6


def test_a_locked_row_is_waited_for_no_longer_than_the_timeout(url: str, namespace: str, open_sql: Open) -> None:
    """Then the store is unavailable, and says that others held the rows."""
    store = open_sql(url, timeout=1.0)
    token = claim(store, message())
    holder = Database(dialect_of(url), timeout=5.0, clock=None)

    def settle_meanwhile(connection: Connection) -> None:
        lock = text("UPDATE taskguard_messages SET crashes = 9 WHERE namespace = :namespace")
        connection.execute(lock, {"namespace": namespace})
        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            store.complete(message().id, token, result=b"1", retention=60)
        assert time.monotonic() - started < 4

    holder.run(settle_meanwhile, transaction=True)
    holder.close()
    assert store.complete(message().id, token, result=b"1", retention=60)


def test_a_file_in_a_missing_directory_says_which(tmp_path: Path, open_sql: Open) -> None:
    """The directory is not created: it is more often a typing error than a wish."""
    store = open_sql(f"sqlite:///{tmp_path / 'nowhere' / 'taskguard.sqlite3'}")
    with pytest.raises(StoreError, match=r"the directory .*nowhere does not exist; create it") as caught:
        store.ping()
    assert not isinstance(caught.value, StoreUnavailable)


def test_an_interrupted_call_leaves_no_half_read_answer(url: str, open_sql: Open) -> None:
    """A soft time limit can strike in the middle of a statement; the next call must not read what is left of it."""
    store = open_sql(url)
    store.ping()

    class SoftTimeLimit(Exception):
        pass

    def strike(*_: Any) -> None:
        event.remove(store._database.engine, "after_cursor_execute", strike)
        raise SoftTimeLimit

    event.listen(store._database.engine, "after_cursor_execute", strike)
    with pytest.raises(SoftTimeLimit):
        store.bury_message(message(), failure=Failure(reason=Reason.UNKNOWN_TASK))
    assert store.find(message().copy_id) is None
    claim(store, message())


def test_names_are_kept_whatever_they_hold(url: str, open_sql: Open, clock: ManualClock) -> None:
    """NUL, lone surrogates, backslashes, capitals, trailing blanks and long names come back as they were."""
    store = open_sql(url, clock=clock)
    for name in ("a\0b", "a\ud800b", "a\\u0000b", "A", "a", "a ", "é😀" * 500):
        envelope = message(name, task_id=name)
        token = claim(store, envelope)
        record = store.find(envelope.id)
        assert record is not None
        assert (record.key, record.task_id) == (name, name)
        store.complete(envelope.id, token, result=b"\0\xff", retention=60)
        answer = store.claim(envelope, holder="other", lease=15, max_crashes=3)
        assert answer == Completed(b"\0\xff")
    store.revoke(["A"], retention=60)
    claim(store, message("fresh", task_id="a"))


def test_without_a_clock_the_servers_is_used(url: str, open_sql: Open) -> None:
    """On this machine it is the same clock."""
    store = open_sql(url)
    assert abs(store.now() - time.time()) < 1


def late_answers(store: SQLStore, delays: list[float]) -> list[float]:
    """Have the server's answers about its clock be read so many seconds late, one after the other; returns the delays.

    Each answer takes one away; when none is left they come at once.
    """
    database = store._database

    def delay(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement == database.dialect.now:
            asked.append(delays.pop(0) if delays else 0.0)
            time.sleep(asked[-1])

    asked: list[float] = []
    event.listen(database.engine, "after_cursor_execute", delay)
    return asked


def test_an_answer_that_was_read_late_is_not_carried_on(server_url: str, open_sql: Open) -> None:
    """Its instant is exact to half its way only, a second here; the server is asked again."""
    store = open_sql(server_url)
    asked = late_answers(store, [2.0])
    assert abs(store.now() - time.time()) < 0.5
    assert abs(store.now() - time.time()) < 0.5
    assert asked[0] == 2.0
    assert len(asked) > 1


def test_a_network_that_is_always_slow_is_asked_three_times_a_minute(server_url: str, open_sql: Open) -> None:
    """There is no better answer, and every call would otherwise cost another round trip."""
    store = open_sql(server_url)
    asked = late_answers(store, [0.3, 0.4, 0.3, 0.3])
    for _ in range(5):
        assert abs(store.now() - time.time()) < 1
    assert asked == [0.3, 0.4, 0.3]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql+asyncpg://u:s3cret@host/db", r"driver 'asyncpg' is not supported"),
        ("oracle://u:s3cret@host/db", r"oracle:// is no database"),
        ("postgresql://u:s3cret@host:port/db", r"not a database URL"),
        ("sqlite://", r"use memory:// or sqlite:////path/to/file"),
    ],
)
def test_a_url_that_cannot_work_is_refused_when_it_is_given(url: str, said: str) -> None:
    """With the way out and without the password."""
    with pytest.raises(ConfigurationError, match=said) as caught:
        SQLStore.from_url(url)
    assert "s3cret" not in str(caught.value)


def test_a_namespace_that_no_column_holds_is_refused() -> None:
    """Not cut: two namespaces could become one."""
    with pytest.raises(ConfigurationError, match="64 characters or less"):
        SQLStore.from_url("postgresql://host/db", namespace="n" * 65)


def test_a_wrong_password_is_not_worth_waiting_for(mariadb_url: str, open_sql: Open) -> None:
    """A StoreError, not StoreUnavailable: trying again would not mend it."""
    url = make_url(mariadb_url).set(username="nobody_here", password="s3cret")
    with pytest.raises(StoreError, match="Access denied") as caught:
        open_sql(url.render_as_string(hide_password=False)).ping()
    assert not isinstance(caught.value, StoreUnavailable)
    assert isinstance(caught.value.__cause__, (DBAPIError, OperationalError))
