"""Traps 44 to 46: what calls leave behind in a process is bounded."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import tracemalloc

import pytest

from taskguard.downstream.denials import MOST
from taskguard.errors import RateLimitedError
from taskguard.policies import CircuitBreaker, FixedWindow, Limit, TokenBucket
from tests.unit.permithouse import PermitHouse


def test_a_denied_call_leaves_nothing_behind() -> None:
    """Trap 46: ten thousand refusals, no growth to speak of."""
    permits = PermitHouse()
    bank = permits.downstream(rate=TokenBucket(1, per=3600), circuit=CircuitBreaker())
    bank.call(lambda: None)
    permits.desk._notify = lambda event: None

    def deny(times: int) -> None:
        for _ in range(times):
            with pytest.raises(RateLimitedError):
                bank.call(lambda: None)

    deny(100)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        deny(2000)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 50_000


def test_many_keys_do_not_fill_the_process_and_reset_no_limit() -> None:
    """Trap 44: refusals are remembered of so many keys; one that is forgotten is asked for, and refused again."""
    permits = PermitHouse()
    bank = permits.downstream(rate=Limit(FixedWindow(1, per=3600), key="{client}"))
    permits.desk._notify = lambda event: None
    for client in range(MOST + 500):
        with bank.permit(key=str(client)):
            pass
        with pytest.raises(RateLimitedError), bank.permit(key=str(client)):
            pass
    assert len(permits.desk.denials) <= MOST
    for client in (0, 1, MOST // 2, MOST + 499):
        with pytest.raises(RateLimitedError), bank.permit(key=str(client)):
            pass


def test_no_thread_is_started_for_a_key_or_a_call() -> None:
    """Trap 45."""
    permits = PermitHouse()
    bank = permits.downstream(rate=Limit(FixedWindow(1, per=3600), key="{client}"), concurrency=3)
    with bank.permit(key="first"):
        pass
    before = threading.active_count()
    for client in range(500):
        with bank.permit(key=str(client)):
            pass
    assert threading.active_count() <= before


def test_a_process_that_ends_tells_what_it_counted() -> None:
    """The successes of its last second, and the places it gave back, are told at its end."""
    source = """
import sys
from tests.unit.permithouse import PermitHouse
from taskguard.policies import CircuitBreaker
permits = PermitHouse()
bank = permits.downstream(circuit=CircuitBreaker(), concurrency=1)
bank.call(lambda: None)
permits.desk._releases.due_at = 1e18
report, release = permits.store.report, permits.store.release
permits.store.report = lambda *a, **o: (print("told", a[2].calls), report(*a, **o))[1]
permits.store.release = lambda slots: (print("released", len(slots)), release(slots))[1]
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert sorted(done.stdout.splitlines()) == ["released 1", "told 1"], done.stderr


def test_greenlets_share_a_downstream() -> None:
    """Trap 30: under gevent the threads are greenlets, places are handed over, and nobody stops the others."""
    pytest.importorskip("gevent")
    source = """
from gevent import monkey
monkey.patch_all()
import gevent
from taskguard.downstream.desk import Desk
from taskguard.downstream.service import Downstream
from taskguard.policies import CircuitBreaker, Concurrency, TokenBucket
from taskguard.stores.memory import MemoryPermits
inside = most = 0
def work(index):
    global inside, most
    inside += 1
    most = max(most, inside)
    gevent.sleep(0.001)
    inside -= 1
    return index
for local in (True, False):
    bank = Downstream("bank", store=Desk(MemoryPermits()), rate=TokenBucket(1e5), circuit=CircuitBreaker(),
                      concurrency=Concurrency(3, local=local, max_wait=20))
    greenlets = [gevent.spawn(bank.call, work, index) for index in range(20)]
    gevent.joinall(greenlets, timeout=20)
    print(sorted(each.value for each in greenlets) == list(range(20)), most)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=90, check=False)
    assert done.stdout.splitlines() == ["True 3", "True 3"], done.stderr
