"""What must wait, and what must not: a long retry while every worker dies, and the neighbours of a poison task."""

from __future__ import annotations

import time
from itertools import product

import pytest

from taskguard.record import Reason, State
from tests.integration.conftest import pairs
from tests.integration.site import Site

pytestmark = pytest.mark.parametrize(
    "site", pairs(*product(("redis", "rabbitmq"), ("redis", "postgresql"))), indirect=True, scope="module"
)

DELAY = 10.0
CLOCKS = 0.5
"""Seconds by which the store's clock may differ from that of the journal."""
LEASE = 6.0
"""Of the poison task's worker: far more than a new child takes on a busy machine."""
MAX_CRASHES = 3


def test_a_retry_in_ten_seconds_outlives_every_worker(no_workers: Site) -> None:
    """All workers die while it waits: another runs it when it is due, and once, and nobody's death is charged to it."""
    site = no_workers
    for _ in range(2):
        site.start_worker()
    result = site.send("retried", DELAY)
    first = site.wait_started(result)
    site.wait(lambda: site.told("retried", result), "the retry at rest")
    site.kill_all()
    record = site.record(result, "retried")
    assert record is not None
    assert record.state is State.PENDING
    assert record.due_at is not None
    assert record.due_at - first.at >= DELAY - CLOCKS
    site.start_worker()
    site.assert_done_once(result, "retried", starts=2)
    second = site.started(result)[-1]
    assert second.at >= record.due_at - CLOCKS
    assert (second.crashes, second.attempt) == (0, 2)


def test_the_neighbours_of_a_poison_task_wait_no_longer_than_a_lease(no_workers: Site) -> None:
    """A task kills its process until it is a dead letter; each that is sent meanwhile starts within a lease, once."""
    site = no_workers
    worker = site.start_worker(TASKGUARD_LEASE=str(LEASE))
    poison = site.send("poison")
    waits, sent = [], []
    while not site.letters(poison.id) or len(sent) < 20:
        at = time.time()
        sent.append(site.send("work", len(sent)))  # one after the other: nobody waits for a neighbour
        waits.append((site.wait_started(sent[-1]).at - at, at))
        assert len(sent) < 1000, "the poison task has no end"
    for result in sent:
        site.wait_state(result, "SUCCESS")
    site.wait_settled()
    runs = site.started(poison)
    assert len(runs) == MAX_CRASHES
    assert site.letter(poison.id).failure.reason is Reason.POISON
    assert any(runs[0].at <= at <= runs[-1].at for _, at in waits), "tasks were sent while the poison was at work"
    (longest, _), (ordinary, _) = max(waits), sorted(waits)[len(waits) // 2]
    print(f"{len(sent)} neighbours: waited {longest:.2f} s at most, {ordinary:.2f} s in the middle")
    assert longest <= LEASE + ordinary
    assert all(len(site.started(result)) == 1 for result in sent)
    assert worker.alive
