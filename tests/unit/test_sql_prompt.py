"""The two statements of every run on a SQL database, which are compiled beforehand and sent past SQLAlchemy."""

from __future__ import annotations

import signal
import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from sqlalchemy import Connection, NullPool, create_engine, event, insert, text

from taskguard import lifecycle
from taskguard.custody import Claimed
from taskguard.envelope import Envelope
from taskguard.errors import StoreUnavailable
from taskguard.record import State
from taskguard.stores.sql import SQLStore
from taskguard.stores.sql.database import Database
from taskguard.stores.sql.dialect import dialect_of
from taskguard.stores.sql.messages import _COMPLETE
from taskguard.stores.sql.schema import messages, metadata, to_row
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
def open_store(namespace: str) -> Iterator[Open]:
    """Open stores of one namespace; they are closed afterwards."""
    opened: list[SQLStore] = []

    def open_one(url: str, **options: Any) -> SQLStore:
        opened.append(SQLStore.from_url(url, namespace=namespace, **options))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def message(key: str = "order-1") -> Envelope:
    """A charge of an order."""
    return Envelope(task="shop.charge", task_id=f"task-{key}", key=key, body=b"[[], {}, {}]")


def claim(store: SQLStore, envelope: Envelope) -> int:
    """Take custody; the token."""
    answer = store.claim(envelope, holder="worker/1", lease=15, max_crashes=3)
    assert isinstance(answer, Claimed)
    return answer.token


def test_a_first_claim_writes_what_the_lifecycle_says(url: str, open_store: Open, clock: ManualClock) -> None:
    """Its statement is compiled beforehand, and most of its columns are constants in it."""
    store = open_store(url, clock=clock)
    first = message().replace(headers={"id": "task-1"}, queue="shop", fingerprint="f1", deadline_at=clock() + 60)
    expected, answer = lifecycle.claim(None, first, holder="worker/1", lease=15, max_crashes=3, now=clock())
    assert store.claim(first, holder="worker/1", lease=15, max_crashes=3) == answer
    assert store.find(first.id) == expected


@pytest.mark.parametrize("scheme", ["postgresql", "mysql"])
def test_a_claim_at_an_unreachable_server_may_be_repeated(scheme: str, open_store: Open) -> None:
    """It is told as of any other operation: the store is unavailable, and nothing is wrong with the message."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    store = open_store(f"{scheme}://app@127.0.0.1:{port}/shop", timeout=2.0, clock=ManualClock())
    with pytest.raises(StoreUnavailable):
        claim(store, message())


def test_a_completion_that_is_interrupted_leaves_no_half_read_answer(
    server_url: str, namespace: str, open_store: Open
) -> None:
    """A soft time limit can strike while it waits for the row: it may be repeated, and what follows is not misled."""
    store = open_store(server_url)
    token = claim(store, message())
    holder = Database(dialect_of(server_url), timeout=5.0, clock=None)

    class SoftTimeLimit(Exception):
        pass

    def strike(*_: Any) -> None:
        raise SoftTimeLimit

    def complete_meanwhile(connection: Connection) -> None:
        lock = text("UPDATE taskguard_messages SET crashes = 9 WHERE namespace = :namespace")
        connection.execute(lock, {"namespace": namespace})
        before = signal.signal(signal.SIGALRM, strike)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            with pytest.raises(SoftTimeLimit):
                store.complete(message().id, token, result=b"1", retention=60)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    holder.run(complete_meanwhile, transaction=True)
    holder.close()
    assert store.complete(message().id, token, result=b"1", retention=60)
    assert store.find(message("other").id) is None
    claim(store, message("other"))


@pytest.mark.parametrize("analyzed", [False, True])
@pytest.mark.parametrize("rows", [1, 30, 1_000])
def test_a_completion_finds_its_row_by_the_key(rows: int, analyzed: bool, namespace: str, postgresql_url: str) -> None:
    """Not in the index of the states, where all rows that ever ran are entered: there it took longer with each."""
    database = Database(dialect_of(postgresql_url), timeout=5.0, clock=None)
    complete = database.prompt(_COMPLETE).text
    database.close()
    record, _ = lifecycle.claim(None, message(), holder="worker/1", lease=15, max_crashes=3, now=1.0)
    row = {**to_row(record), "namespace": namespace}
    given = {"in_namespace": namespace, "run": "run-0", "shown": 1, "answer": b"", "now": 1, "until": 1}
    with create_engine(postgresql_url, poolclass=NullPool).connect() as connection:  # nothing of it is committed
        connection.execute(text(f'CREATE SCHEMA "{namespace}"'))
        connection.execute(text(f'SET LOCAL search_path TO "{namespace}"'))
        connection.execute(text("SET LOCAL enable_seqscan = off"))
        metadata.create_all(connection, checkfirst=False)
        connection.execute(insert(messages), [{**row, "id": f"run-{number}"} for number in range(rows)])
        if analyzed:
            connection.execute(text("ANALYZE taskguard_messages"))
        plan = "\n".join(connection.exec_driver_sql(f"EXPLAIN {complete}", given).scalars())
    assert "taskguard_messages_pkey" in plan


@pytest.fixture
def schema_url(namespace: str, postgresql_url: str) -> Iterator[str]:
    """PostgreSQL in a schema of this test's own: the tables that other tests share may be of an older version."""
    engine = create_engine(postgresql_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text(f'CREATE SCHEMA "{namespace}"'))
        yield f"{postgresql_url}?options=-csearch_path%3D{namespace}"
        connection.execute(text(f'DROP SCHEMA "{namespace}" CASCADE'))


def test_who_lists_a_state_finds_it_in_its_index(open_store: Open, schema_url: str) -> None:
    """That index is for them alone: a query that does not say so reads the whole table."""
    store = open_store(schema_url)
    store.ping()
    engine = store._database.engine
    asked: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "state" in statement and "CASE" not in statement:
            asked.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    list(store.scan(State.DEAD))
    store.depths()
    store.outbox.status()
    list(store.outbox.peek(5))
    store.outbox.requeue()
    store.outbox.purge()
    event.remove(engine, "before_cursor_execute", note)
    assert len(asked) == 6
    with engine.connect() as connection:
        connection.exec_driver_sql("SET enable_seqscan = off")
        for statement, parameters in asked:
            plan = "\n".join(connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars())
            assert "taskguard_messages_listed" in plan, statement


def test_a_process_that_does_one_thing_at_a_time_needs_one_connection(server_url: str, open_store: Open) -> None:
    """Statements that are sent past SQLAlchemy and transactions take turns on it."""
    store = open_store(server_url)
    made: list[Any] = []
    event.listen(store._database.engine, "connect", lambda connection, _: made.append(connection))
    for number in range(3):
        token = claim(store, message(str(number)))
        assert store.find(message(str(number)).id) is not None
        assert store.complete(message(str(number)).id, token, result=b"1", retention=60)
    store.expire(limit=1)
    assert len(made) == 1


def test_a_connection_that_was_lost_is_not_kept(server_url: str, open_store: Open) -> None:
    """The next statement is made on a new one."""
    store = open_store(server_url)
    claim(store, message("before"))
    made: list[Any] = []
    event.listen(store._database.engine, "connect", lambda connection, _: made.append(connection))
    (kept,) = store._database._lane._kept
    kept.driver_connection.close()
    claim(store, message("after"))
    claim(store, message("then"))
    assert len(made) == 1


def test_a_thread_may_take_what_another_was_about_to_give_back(server_url: str, open_store: Open) -> None:
    """One is kept for all of them, and a transaction gives it back while a statement may just have taken it."""

    class Snatched(deque[Any]):
        def __len__(self) -> int:
            return 1

    store = open_store(server_url)
    claim(store, message())
    store._database._lane.close()
    store._database._lane._kept = Snatched()
    assert store.find(message().id) is not None
