"""Trap 30: a forked child is a process of its own, whatever its parent was doing when it was born."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from taskguard.downstream.pools import ThreadPoolBulkhead
from taskguard.downstream.tending import tending
from taskguard.errors import BulkheadFullError
from taskguard.policies import CircuitBreaker, Concurrency, TokenBucket
from tests.unit.permithouse import PATIENCE, PermitHouse


@pytest.fixture
def permits() -> PermitHouse:
    return PermitHouse()


def in_child(work: Callable[[], Any]) -> str:
    """What *work* gives, or its traceback, in a forked child."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = repr(work())
        except BaseException:
            said = traceback.format_exc()
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return said


def test_a_child_begins_without_its_parents_counts_and_releases(permits: PermitHouse) -> None:
    """What the parent has not told or given back yet is the parent's."""
    bank = permits.downstream(circuit=CircuitBreaker(), concurrency=1)
    bank.call(lambda: None)
    permits.desk._releases.due_at = float("inf")

    def child() -> Any:
        assert bank.circuit is not None
        permits.store.asked.clear()
        pending = len(permits.desk._returned)
        bank.circuit.tend()
        return pending, permits.store.asked["report"], bank.guard.circuit is not None and bank.guard.circuit.asleep

    assert in_child(child) == "(0, 0, True)"


def test_a_child_has_threads_of_its_own_as_soon_as_it_needs_them(permits: PermitHouse) -> None:
    """Its counts are told, its circuits listened to, its releases sent."""
    bank = permits.downstream(circuit=CircuitBreaker(), concurrency=1)
    charge = permits.downstream("plain", circuit=CircuitBreaker())(lambda: 5)
    bank.call(lambda: None)
    charge()

    def child() -> Any:
        before = {thread.name for thread in threading.enumerate()}
        charge()
        after = {thread.name for thread in threading.enumerate()}
        sent = threading.Event()
        release = permits.store.release
        permits.store.release = lambda slots: (release(slots), sent.set())  # type: ignore[method-assign]
        permits.desk.flush()
        sent.clear()
        with bank.permit(covers=False):
            pass
        return sorted(before & {"taskguard-tending", "taskguard-circuits"}), sorted(after - before), sent.wait(PATIENCE)

    permits.desk.flush()
    assert in_child(child) == "([], ['taskguard-circuits', 'taskguard-tending'], True)"


def test_holders_of_parent_and_child_differ(permits: PermitHouse) -> None:
    """Else the child's call would be taken for the parent's, and both would have one place."""
    first = permits.desk.holder()
    prefix, _, serial = first.rpartition("-")
    theirs = in_child(lambda: permits.desk.holder()).strip("'")
    assert not theirs.startswith(prefix)
    assert int(serial, 16) == 1


def test_the_parents_calls_take_no_local_place_in_the_child(permits: PermitHouse) -> None:
    """They run in the parent; the child would never see them end."""
    bank = permits.downstream(concurrency=Concurrency(1, local=True))
    with bank.permit(covers=False):
        assert in_child(lambda: bank.call(lambda: 5)) == "5"
        with pytest.raises(BulkheadFullError):
            bank.call(lambda: None)


def test_a_fork_amid_calls_of_other_threads_harms_neither(permits: PermitHouse) -> None:
    """No lock of the parent's threads stays locked in the child."""
    bank = permits.downstream(
        circuit=CircuitBreaker(), rate=TokenBucket(1e6), concurrency=Concurrency(8, local=True, max_wait=5)
    )
    bank.call(lambda: None)
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            bank.guard.slots and bank.guard.slots.take() and bank.guard.slots.release()
            bank.stats()

    workers = [threading.Thread(target=busy, daemon=True) for _ in range(3)]
    for worker in workers:
        worker.start()
    try:
        for _ in range(5):
            assert in_child(lambda: bank.guard.slots is not None and bank.guard.slots.take()) == "True"
    finally:
        stop.set()
        for worker in workers:
            worker.join(PATIENCE)


def test_a_pool_of_threads_works_in_a_child() -> None:
    """Threads are not inherited; the child's pool makes its own."""
    with ThreadPoolBulkhead("mail", size=2) as pool:
        assert pool.call(lambda: 5) == 5
        assert in_child(lambda: pool.call(lambda: 6)) == "6"


def test_many_downstreams_need_two_threads(permits: PermitHouse) -> None:
    """Trap 45: one that tends and one that listens, whatever the number of circuits and limits."""
    before = threading.active_count()
    banks = [
        permits.downstream(f"bank-{n}", circuit=CircuitBreaker(), rate=TokenBucket(1e5), concurrency=3)
        for n in range(50)
    ]
    for bank in banks:
        bank.call(lambda: None)
    assert threading.active_count() - before <= 2


def test_what_nobody_uses_any_more_is_not_tended(permits: PermitHouse) -> None:
    """Chores are held weakly: a downstream that is gone leaves nothing."""
    import gc

    bank = permits.downstream(circuit=CircuitBreaker())
    bank.call(lambda: None)
    circuit = bank.circuit
    assert circuit in tending._chores
    known = len(tending._chores)
    del bank, circuit
    gc.collect()
    assert len(tending._chores) < known
