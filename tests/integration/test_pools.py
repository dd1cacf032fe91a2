"""Pools: what is promised holds in prefork, threads, gevent and solo alike."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskguard.record import Reason
from tests import services
from tests.integration.workshop import Workshop

POOLS = ("prefork", "threads", "gevent", "solo")
LEASE = 3.0

pytestmark = pytest.mark.xdist_group("pools")


@pytest.fixture(scope="module", params=POOLS)
def workshop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """One worker of each pool, and a lease that ends in the middle of a longer run."""
    namespace = f"t{uuid.uuid4().hex[:16]}"
    redis = services.require("redis")
    directory = tmp_path_factory.mktemp(request.param)
    workshop = Workshop(
        broker=redis, notes=redis, store=redis, namespace=namespace, directory=directory, TASKGUARD_LEASE=str(LEASE)
    )
    workshop.start(request.param)
    yield workshop
    workshop.close()
    services.delete_redis_keys(redis, f"*{namespace}*")


def test_a_task_completes(workshop: Workshop) -> None:
    """Its result is in the backend, and it ran once."""
    result = workshop.reliable.add.delay(2, 3)
    assert workshop.wait_ready(result).get() == 5
    assert len(workshop.runs(result)) == 1


def test_a_task_is_retried(workshop: Workshop) -> None:
    """The retry rests in the store and comes back by the relay."""
    result = workshop.reliable.flaky.delay(7, failures=2)
    assert workshop.wait_ready(result).get() == 7
    assert [run[3] for run in workshop.runs(result)] == [0, 1, 2]


def test_a_failure_is_a_dead_letter(workshop: Workshop) -> None:
    """With its reason, and FAILURE in the backend."""
    for task, reason in (
        (workshop.reliable.broken, Reason.PERMANENT_ERROR),
        (workshop.reliable.flaky, Reason.MAX_RETRIES),
    ):
        result = task.apply_async((1,), {} if task is workshop.reliable.broken else {"failures": 9})
        assert workshop.wait_ready(result).state == "FAILURE"
        assert workshop.letter(result).failure.reason is reason


@pytest.mark.smoke
def test_a_duplicate_waits_and_is_given_the_result(workshop: Workshop) -> None:
    """Two messages with one key: one run, one result under both ids."""
    once = workshop.app.tasks["once"]
    n = uuid.uuid4().hex
    first, second = once.delay(n), once.delay(n)
    told = {workshop.wait_ready(each).get() for each in (first, second)}
    assert len(told) == 1
    assert len(workshop.runs(first)) + len(workshop.runs(second)) == 1


def test_what_is_late_does_not_run(workshop: Workshop) -> None:
    """FAILURE, a dead letter, and no body."""
    result = workshop.reliable.add.apply_async((1, 1), deadline=0.001)
    assert workshop.wait_ready(result).state == "FAILURE"
    assert "DeadlineExceeded" in repr(result.result)
    assert workshop.letter(result).failure.reason is Reason.EXPIRED
    assert workshop.runs(result) == []


def test_the_run_knows_what_remains(workshop: Workshop) -> None:
    """And what it starts inherits it, unless its own is earlier."""
    for own, most in ((None, 300), (100, 100), (999, 300)):
        left, inner = workshop.wait_ready(workshop.app.tasks["outer"].apply_async((own,), deadline=300)).get()
        assert 0 < left <= 300
        assert most - 60 < workshop.wait_ready(workshop.app.AsyncResult(inner)).get() <= most


def test_a_run_longer_than_its_lease_is_left_alone(workshop: Workshop) -> None:
    """The heartbeat holds the lease through two of them: nobody rescues what is alive."""
    result = workshop.app.tasks["long"].delay(2 * LEASE)
    assert workshop.wait_ready(result).get() == 0
    workshop.wait_settled()
    assert len(workshop.runs(result)) == 1


@pytest.mark.parametrize("pool", POOLS)
def test_the_run_of_a_killed_worker_is_rescued(pool: str, tmp_path: Path, namespace: str, redis_url: str) -> None:
    """SIGKILL in mid-run: when the lease ends another worker runs it, and it is known as a crash."""
    workshop = Workshop(
        broker=redis_url, notes=redis_url, store=redis_url, namespace=namespace, directory=tmp_path,
        TASKGUARD_LEASE=str(LEASE),
    )  # fmt: skip
    try:
        first = workshop.start(pool)
        result = workshop.app.tasks["long"].delay(2)
        workshop.wait(lambda: workshop.runs(result), "the run has begun")
        workshop.kill(first)
        workshop.start(pool)
        assert workshop.wait_ready(result).get() == 1
        assert len(workshop.runs(result)) == 2
    finally:
        workshop.close()
