"""Tasks whose downstream is narrow, or down: what it sees, counted at its side, and what becomes of them.

``python -m tests.acceptance.downstream`` plays the same scenes in full length.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from taskguard.record import Record
from tests.acceptance.downstream import (
    BURST,
    CONCURRENCY,
    DECLARED,
    LIMIT,
    RATE,
    WORKERS,
    Figures,
    outage,
    paced,
    scene,
    trip,
)
from tests.acceptance.narrow import busiest
from tests.integration.journal import Deadline

TASKS = 300
ROUND_TRIPS = {0.0: 5.0, 1.0: 4.0}
"""The most a task may cost in store round trips, by ``max_wait``: a busy machine asks some again, goals are 4 and 4."""


def assert_all_done(told: Figures) -> None:
    """Everything ended well, at the first attempt."""
    print(told.shown())
    assert (told.done, told.dead, told.retries) == (told.sent, 0, 0), told.shown()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("max_wait", [0.0, 1.0], ids=["resting", "waiting"])
def test_a_narrow_downstream_never_sees_more_than_it_takes(tmp_path: Path, max_wait: float) -> None:
    """No second over 50 and no 429; the order is kept within a second; nobody polls for its turn."""
    told = paced(TASKS, max_wait=max_wait, directory=tmp_path)
    assert_all_done(told)
    assert told.busiest <= LIMIT
    assert told.refused == 0
    assert told.overtaken <= 1.0
    assert told.trips <= ROUND_TRIPS[max_wait]
    assert bool(told.deferred) == (max_wait == 0)


@pytest.mark.timeout(240)
def test_a_narrow_downstream_behind_rabbitmq(tmp_path: Path) -> None:
    """Whose queues put nobody ahead: those who come for their slots stand in the queue once more."""
    told = paced(TASKS, broker="rabbitmq", directory=tmp_path)
    assert_all_done(told)
    assert told.busiest <= LIMIT
    assert told.refused == 0


@pytest.mark.timeout(240)
@pytest.mark.parametrize("on_open", ["defer", "pause_queue"])
def test_a_downstream_that_is_down_sees_probes_and_then_no_flood(tmp_path: Path, on_open: str) -> None:
    """No task fails or loses an attempt, the failed probes among them; the parked come back at the declared rate."""
    told = outage(TASKS, 5.0, directory=tmp_path, on_open=on_open)
    assert_all_done(told)
    assert told.failed == len(told.probes)
    assert 1 <= len(told.probes) <= 4, told.probes
    gaps = [after - before for before, after in zip([0.0, *told.probes], told.probes, strict=False)]
    assert all(gap >= 0.95 * wait for gap, wait in zip(gaps, (1.0, 1.5, 2.25, 3.4), strict=False)), told.probes
    assert told.busiest <= 1.2 * RATE


@pytest.mark.timeout(180)
def test_a_queue_that_a_circuit_paused_stays_so_across_a_restart(tmp_path: Path) -> None:
    """Until the circuit's probe may go; the worker that starts meanwhile leaves it alone, and all resume."""
    wait = 12.0
    circuit = {"minimum_calls": 3, "wait_in_open": wait, "slow_start": 1.0, "on_open": "pause_queue"}
    with scene({**DECLARED, "circuit": circuit}, directory=tmp_path) as played:
        played.hire()
        played.narrow.go_down(3600)
        trip(played)
        probe_at = time.time() + wait
        before = len(played.narrow.calls())
        played.send_calls(range(40))

        def paused() -> set[int]:
            return {e.pid for e in played.journal.entries("queue_paused") if e.detail.startswith(played.queue)}

        played.wait(lambda: len(paused()) == WORKERS, "all workers have stopped consuming")
        for worker in list(played.workers):
            worker.kill()
        new = played.start_worker(concurrency=CONCURRENCY)
        played.wait(lambda: new.process.pid in paused(), "the new one, too")
        assert time.time() < probe_at, "the circuit is still open"
        assert len(played.narrow.calls()) == before, "and nobody has called"
        played.narrow.go_down(0)
        played.wait_all(40, timeout=60)
        calls = played.narrow.calls()[before:]
        assert min(each.at for each in calls) >= probe_at - 0.5
        assert {each.status for each in calls} == {201}
        assert played.journal.entries("queue_resumed")
        assert not played.journal.entries("retried")


@pytest.mark.timeout(180)
def test_the_slot_of_a_killed_worker_comes_back(tmp_path: Path) -> None:
    """When its lease ends; who waited for it has it then, or the rescued run itself."""
    lease = 2.0
    with scene({"concurrency": {"limit": 1, "lease": lease}}, directory=tmp_path) as played:
        first = played.start_worker(concurrency=CONCURRENCY)
        one = played.send("hold", "one")
        played.wait_started(one)
        two = played.send("hold", "two")
        played.wait(lambda: played.told("deferred", two), "the second finds the place taken")
        killed_at = time.time()
        first.kill()
        played.journal.open("one")
        played.journal.open("two")
        played.start_worker(concurrency=CONCURRENCY)
        played.wait_state(one, "SUCCESS")
        played.wait_state(two, "SUCCESS")
        starts = sorted(each.at for result in (one, two) for each in played.started(result) if each.at > killed_at)
        assert starts[0] - killed_at < lease + 8, "the lease, the start of a worker, and a look of the relay"
        assert len(played.started(two)) == 1


@pytest.mark.timeout(180)
def test_a_redelivered_message_gives_no_slot_back(tmp_path: Path) -> None:
    """The copy is dropped before it asks for anything; the run that goes on keeps its place (trap 47)."""
    with scene({"concurrency": {"limit": 1, "lease": 5.0}}, directory=tmp_path) as played:
        played.start_worker(concurrency=CONCURRENCY)
        one, again = played.send_repeatable("hold", "one")
        played.wait_started(one)
        again()
        played.wait(lambda: played.told("discarded", one), "the second copy was recognised")
        two = played.send("hold", "two")
        played.wait(lambda: len(played.told("deferred", two)) > 1, "the place is still taken")
        assert not played.started(two)
        assert len(played.started(one)) == 1
        played.journal.open("one")
        played.journal.open("two")
        played.wait_state(one, "SUCCESS")
        played.wait_state(two, "SUCCESS")
        record = next(each for each in played.done() if each.task_id == two.id)
        assert {attempt.outcome for attempt in _attempts(record)} == {"defer"}


def _attempts(record: Record) -> list:  # type: ignore[type-arg]
    return record.attempts


@pytest.mark.timeout(240)
def test_the_limit_holds_while_children_are_replaced_and_pools_grow(tmp_path: Path) -> None:
    """With ``worker_max_tasks_per_child`` and a pool that changes its size, as autoscaling does (trap 48)."""
    conf = '{"worker_max_tasks_per_child": 5}'
    grown = WORKERS  # one process each
    with scene({**DECLARED, "rate": RATE - grown}, directory=tmp_path, TEST_CONF=conf) as played:
        played.hire()
        played.send_calls(range(TASKS))
        played.app.control.pool_grow(1)
        assert Deadline.after(30).reached(lambda: len(played.served()) >= TASKS // 2)
        played.app.control.pool_shrink(1)
        played.wait_all(TASKS, timeout=60)
        calls = played.narrow.calls()
        assert {each.status for each in calls} == {201}
        assert busiest([each.at for each in calls]) <= BURST + RATE - grown + WORKERS * CONCURRENCY + grown
        assert not played.journal.entries("retried")
        pids = {each.pid for each in played.journal.entries("completed")}
        assert len(pids) > 4 * WORKERS * CONCURRENCY, "children were replaced"
