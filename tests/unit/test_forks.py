"""A fork waits for whoever works beside it: a child born in between would inherit a lock that nobody releases."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
from kombu.utils.objects import cached_property
from sqlalchemy import Connection
from sqlalchemy.engine import make_url

from taskguard.custody import Claimed
from taskguard.forks import PATIENCE, undisturbed
from taskguard.stores.sql import SQLStore
from taskguard.stores.sql.database import Database
from taskguard.stores.sql.dialect import dialect_of
from tests.contracts.messages import ask, message

STUCK = 20
"""Seconds after which a child that hangs is killed."""

HESITATION = 0.3
"""Seconds a thread stays inside for a fork that does not wait for it."""


@pytest.fixture
def store(sqlite_url: str, namespace: str) -> SQLStore:
    """A store in a file of this test's own, whose tables exist."""
    store = SQLStore.from_url(sqlite_url, namespace=namespace)
    store.ping()
    return store


class Writer(threading.Thread):
    """Inside ``BEGIN IMMEDIATE`` from `begun` until `forked`, or until it has hesitated long enough."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._database = Database(dialect_of(make_url(url)), timeout=5.0, clock=None)
        self.begun, self.forked = threading.Event(), threading.Event()
        self.inside = False

    def run(self) -> None:
        self._database.run(self._linger, transaction=True)
        self._database.close()

    def _linger(self, connection: Connection) -> None:
        self.inside = connection.exec_driver_sql("SELECT 1").scalar_one() == 1
        self.begun.set()
        self.forked.wait(HESITATION)
        self.inside = False


def in_a_child(work: Callable[[], object]) -> Callable[[], int]:
    """Fork, and do *work* in the child. Returns what waits for its exit status: 0, or a signal where it hung."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(STUCK)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def claims(store: SQLStore, key: str) -> None:
    assert isinstance(ask(store, message(key)), Claimed)


def test_a_child_forked_while_a_thread_writes_can_use_its_store(store: SQLStore, sqlite_url: str) -> None:
    """The fork happens when the thread is outside, and both sides go on."""
    writer = Writer(sqlite_url)
    writer.start()
    assert writer.begun.wait(STUCK)
    assert writer.inside

    def work() -> None:
        assert not writer.inside, "born while a thread of its parent was in a transaction"
        claims(store, "child")

    wait = in_a_child(work)
    writer.forked.set()
    claims(store, "parent")
    assert wait() == 0
    writer.join(STUCK)
    assert store.find(message("child").id) is not None


def test_a_child_shares_no_connection_with_its_parent(store: SQLStore) -> None:
    """SQLite forbids it: they are closed before the fork, and each side opens its own."""
    claims(store, "before")
    waits = [in_a_child(lambda key=f"child-{number}": claims(store, key)) for number in range(3)]  # type: ignore[misc]
    claims(store, "after")
    assert [wait() for wait in waits] == [0, 0, 0]
    assert all(store.find(message(f"child-{number}").id) for number in range(3))


class Slow:
    """What a result backend is to a thread that tells it something for the first time."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    @cached_property
    def client(self) -> str:
        self.begun.set()
        self.go.wait(HESITATION)
        return "client"


def test_a_child_can_use_what_a_thread_of_its_parent_was_making(store: SQLStore) -> None:
    """kombu guards a cached property with a lock that all its instances share, and that no fork makes anew."""
    slow = Slow()

    def tell() -> None:
        with undisturbed:
            assert slow.client

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    assert slow.begun.wait(STUCK)
    child = Slow()
    child.go.set()
    assert in_a_child(lambda: child.client)() == 0
    teller.join(STUCK)


def test_a_fork_does_not_wait_for_ever() -> None:
    """A thread that waits for a network holds a fork up for `PATIENCE`, and enters again afterwards."""
    inside, leave, again = threading.Event(), threading.Event(), threading.Event()

    def wait() -> None:
        with undisturbed, undisturbed:
            inside.set()
            leave.wait(STUCK)
        with undisturbed:
            again.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert inside.wait(STUCK)
    started = time.monotonic()
    with undisturbed:  # whoever forks does not wait for itself
        status = in_a_child(lambda: None)
    assert PATIENCE <= time.monotonic() - started < PATIENCE + 5
    assert status() == 0
    leave.set()
    assert again.wait(STUCK)


def test_what_is_prepared_before_a_fork_meets_nobody_inside() -> None:
    """SQLite's connections are closed there."""
    seen: list[bool] = []
    busy = threading.Event()
    working = False

    def work() -> None:
        nonlocal working
        with undisturbed:
            working = True
            busy.set()
            time.sleep(0.05)
            working = False

    undisturbed.before_fork(lambda: seen.append(working))
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert busy.wait(STUCK)
    assert in_a_child(lambda: None)() == 0
    assert seen == [False]
