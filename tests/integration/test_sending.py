"""From the call to a real worker: names that are held, settings that take effect, and starts that are refused."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from taskguard.record import Reason
from tests import services
from tests.integration.workshop import PATIENCE, Workshop

pytestmark = pytest.mark.xdist_group("sending")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """One prefork worker on Redis."""
    namespace, redis = f"t{uuid.uuid4().hex[:16]}", services.require("redis")
    workshop = Workshop(
        broker=redis, notes=redis, store=redis, namespace=namespace, directory=tmp_path_factory.mktemp("sending")
    )
    workshop.start()
    yield workshop
    workshop.close()
    services.delete_redis_keys(redis, f"*{namespace}*")


def test_a_countdown_is_kept_to(workshop: Workshop) -> None:
    """Not before its moment, though the message rests with the relay."""
    before = workshop.app.taskguard.store.now()
    result = workshop.reliable.add.apply_async((1, 2), countdown=1)
    assert workshop.wait_ready(result).get() == 3
    assert workshop.app.taskguard.store.now() - before >= 1


def test_send_task_by_name_is_in_custody_too(workshop: Workshop) -> None:
    """With the key that the task declares: the second sender gets the first one's result."""
    n = uuid.uuid4().hex
    first, second = (workshop.app.send_task("once", (n,)) for _ in range(2))
    assert workshop.wait_ready(first).get() == workshop.wait_ready(second).get()


def test_a_retry_that_cannot_be_in_time_is_buried_now(workshop: Workshop) -> None:
    """Nobody waits for an hour for what will not be run."""
    result = workshop.reliable.flaky.apply_async((1,), {"failures": 9}, deadline=0.5, expires=0.45)
    assert workshop.wait_ready(result).state == "FAILURE"
    assert workshop.letter(result).failure.reason is Reason.EXPIRED


@pytest.mark.parametrize("how", ["well", "fail"])
def test_a_unique_name_is_let_go_by_the_end_of_its_task(how: str, workshop: Workshop) -> None:
    """Success and dead letter alike: the next call is queued."""
    single, n = workshop.app.tasks["single"], uuid.uuid4().hex
    first = single.apply_async((n,), {"how": how}, countdown=3)
    assert single.delay(n, how=how).id == first.id
    workshop.wait_ready(first)
    workshop.wait(lambda: single.apply_async((n,), {"how": how}).id != first.id, "the name is let go")


def test_a_revoked_task_stays_revoked(workshop: Workshop) -> None:
    """The record outlives whoever heard the broadcast, and the state is visible."""
    result = workshop.reliable.add.apply_async((1, 2), countdown=3)
    workshop.app.control.revoke(result.id)
    assert workshop.wait_ready(result).state == "REVOKED"
    assert workshop.runs(result) == []


def test_a_task_that_kills_its_process_is_poison_at_its_own_bound(workshop: Workshop) -> None:
    """``max_crashes=2`` on the task: two runs, then a dead letter."""
    result = workshop.app.tasks["dying"].delay()
    assert workshop.wait_ready(result).state == "FAILURE"
    assert workshop.letter(result).failure.reason is Reason.POISON
    assert len(workshop.runs(result)) == 2


# -- settings ----------------------------------------------------------------------------------------------------------

WAYS: dict[str, Any] = {
    "argument": lambda name, value: {"TEST_INSTALL": json.dumps({name: value})},
    "configuration": lambda name, value: {"TEST_CONF": json.dumps({f"taskguard_{name}": value})},
    "environment": lambda name, value: {f"TASKGUARD_{name.upper()}": str(value)},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_setting_takes_effect_in_a_worker(way: str, namespace: str, redis_url: str, tmp_path: Path) -> None:
    """``max_crashes=1``, wherever it is said: the first crash is the last."""
    workshop = Workshop(broker=redis_url, notes=redis_url, store=redis_url, namespace=namespace, directory=tmp_path)
    try:
        workshop.start(**WAYS[way]("max_crashes", 1))
        result = workshop.app.tasks["crashing"].delay()
        assert workshop.wait_ready(result).state == "FAILURE"
        assert workshop.letter(result).failure.reason is Reason.POISON
        assert len(workshop.runs(result)) == 1
    finally:
        workshop.close()


@pytest.mark.parametrize(
    ("pool", "env", "named"),
    [
        ("prefork", {"TASKGUARD_STORE": ""}, "store"),
        ("prefork", {"TASKGUARD_STORE": "memory://"}, "not shared"),
        ("prefork", {"TASKGUARD_STORE": "gopher://localhost"}, "gopher"),
        ("prefork", {"TASKGUARD_STORE": "redis://127.0.0.1:1/0"}, "127.0.0.1:1"),
        ("solo", {"TASKGUARD_LEASE": "soon"}, "lease"),
        ("solo", {"TEST_CONF": '{"task_protocol": 1}'}, "task_protocol"),
        ("solo", {"TEST_CONF": '{"worker_consumer": "celery.worker.consumer:Consumer"}'}, "worker_consumer"),
    ],
)
def test_a_worker_that_could_lose_work_does_not_start(
    pool: str, env: dict[str, str], named: str, namespace: str, redis_url: str, tmp_path: Path
) -> None:
    """It ends with a status that is not 0 and one line that names the setting and the way out."""
    workshop = Workshop(broker=redis_url, notes=redis_url, store=redis_url, namespace=namespace, directory=tmp_path)
    try:
        number = workshop.start(pool, wait=False, **env)
        assert workshop.workers[number].wait(PATIENCE) != 0
        told = workshop.said(number).splitlines()
        lines = [line for line in told if named in line and ("Error" in line or line.startswith("taskguard: "))]
        assert lines, workshop.said(number)[-2000:]
    finally:
        workshop.close()
