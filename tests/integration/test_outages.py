"""The store goes away for a while, or the relay dies in the worst moment."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery.result import AsyncResult
from redis import Redis

from tests import services
from tests.integration.conftest import pairs
from tests.integration.servers import PrivatePostgreSQL, PrivateRedis
from tests.integration.site import LEASE, PATIENCE, ROOT, Site

Mortal = PrivateRedis | PrivatePostgreSQL

KILLED_RELAY = """
import os, signal
from taskguard.celery.worker import make_relay
from tests.integration.app import app

store = app.taskguard.store
store.remove = lambda leased: os.kill(os.getpid(), signal.SIGKILL)
make_relay(app).step()
"""

RELAY = """
from taskguard.celery.worker import make_relay
from tests.integration.app import app

print(make_relay(app).step())
"""


@pytest.fixture
def private_store(tmp_path: Path) -> Iterator[PrivateRedis]:
    """A Redis of this test's own, which it may stop and kill."""
    with PrivateRedis(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def frail(private_store: PrivateRedis, namespace: str, tmp_path: Path) -> Iterator[Site]:
    """A site whose message store may be killed; the broker and the results may not."""
    url = services.require("redis")
    site = Site(broker=url, store=private_store.url, journal=url, namespace=namespace, directory=tmp_path, lease=LEASE)
    yield site
    site.close()
    services.delete_redis_keys(url, f"*{namespace}*")


def test_runs_outlast_a_store_that_was_killed_and_came_back(frail: Site, private_store: PrivateRedis) -> None:
    """The store is dead for longer than the lease while bodies end and messages arrive: each completes once."""
    frail.start_worker()
    gate = uuid.uuid4().hex
    running = [frail.send("held", gate) for _ in range(2)]
    for result in running:
        frail.wait_started(result)
    private_store.kill()
    down_until = time.time() + LEASE + 1
    waiting = [frail.send("work", number) for number in range(4)]
    frail.journal.open(gate)
    frail.wait(lambda: all(frail.finished(result) for result in running), "the bodies' ends")
    frail.wait(lambda: frail.journal.entries("store_unavailable"), "someone who misses the store")
    frail.wait(lambda: time.time() > down_until, "the end of the outage")
    assert not any(frail.told("completed", result) for result in [*running, *waiting])
    private_store.start()
    for result in [*running, *waiting]:
        frail.wait_state(result, "SUCCESS")
    frail.wait_settled()
    for result in [*running, *waiting]:
        assert len(frail.told("completed", result)) == 1
        assert not frail.letters(result.id)


@pytest.fixture(params=["redis", "postgresql"])
def mortal(request: pytest.FixtureRequest, namespace: str, tmp_path: Path) -> Iterator[tuple[Site, Mortal]]:
    """A site, and its server that may be killed: Redis as broker and as store, or PostgreSQL as store."""
    url = services.require("redis")
    server: Mortal = PrivateRedis(tmp_path / "redis") if request.param == "redis" else PrivatePostgreSQL()
    with server:
        broker = server.url if request.param == "redis" else url
        site = Site(broker=broker, store=server.url, journal=url, namespace=namespace, directory=tmp_path)
        yield site, server
        site.close()
        services.delete_redis_keys(url, f"*{namespace}*")


def test_a_server_killed_twice_under_load_loses_and_repeats_nothing(mortal: tuple[Site, Mortal]) -> None:
    """SIGKILL while tasks with keys run, and again when half of them are done: each key completes once."""
    site, server = mortal
    site.start_worker()
    results: list[AsyncResult] = []
    for _ in range(2):
        before = len(results)
        results.append(site.send("held", gate := uuid.uuid4().hex))  # no kill comes too late for this one
        results += [site.send("work", number, idempotency_key=f"key-{before + number}") for number in range(50)]
        site.wait(lambda least=before + 10: len(site.journal.entries("finished")) >= least, "some of the tasks")
        server.kill()
        assert len(site.journal.entries("completed")) < len(results), "killed too late to matter"
        site.journal.open(gate)
        server.start()
    site.wait(lambda: all(result.state == "SUCCESS" for result in results), "the end of every task")
    site.wait_settled()
    assert [len(site.told("completed", result)) for result in results] == [1] * len(results)
    starts = [len(site.started(result)) for result in results]
    assert max(starts) <= 3, f"two kills, and {max(starts)} starts of one task"
    assert not any(site.letters(result.id) for result in results)


def test_a_store_that_forgot_a_run_is_told_how_it_ended(frail: Site, private_store: PrivateRedis) -> None:
    """Emptied in the middle of two runs: one completes and one rests for its retry, though nobody knew of them."""
    frail.start_worker()
    gate = uuid.uuid4().hex
    completing, retrying = frail.send("held", gate), frail.send("held_and_retried", gate)
    for result in (completing, retrying):
        frail.wait_started(result)
    with Redis.from_url(private_store.url) as client:
        client.flushdb()
    frail.journal.open(gate)
    frail.assert_done_once(completing, "held", starts=1)
    frail.assert_done_once(retrying, "held_and_retried", starts=2)
    assert len(frail.told("reclaimed", completing)) == len(frail.told("reclaimed", retrying)) == 1


def test_a_frozen_store_delays_and_repeats_nothing(frail: Site, private_store: PrivateRedis) -> None:
    """A store that stalls for less than a lease: every run ends as if nothing had happened."""
    frail.start_worker(TASKGUARD_LEASE="20")
    gate = uuid.uuid4().hex
    running = [frail.send("held", gate) for _ in range(2)]
    for result in running:
        frail.wait_started(result)
    with private_store.frozen():
        waiting = [frail.send("work", number) for number in range(4)]
        frail.journal.open(gate)
        frail.wait(lambda: all(frail.finished(result) for result in running), "the bodies' ends")
        assert not any(frail.told("completed", result) for result in running)
    for result in running:
        frail.assert_done_once(result, "held", starts=1)
    for result in waiting:
        frail.assert_done_once(result, "work", starts=1)


@pytest.mark.parametrize("site", pairs(("redis", "redis"), ("rabbitmq", "postgresql")), indirect=True, scope="module")
def test_a_relay_killed_between_publishing_and_removing_repeats_nothing(no_workers: Site) -> None:
    """Delayed tasks and a waiting retry are at the broker and still at rest: published again, and run once."""
    site = no_workers
    site.start_worker(TASKGUARD_RELAY="0")
    retried = site.send("retried", 0.1)
    site.wait(lambda: site.told("retried", retried), "the retry at rest")
    delayed = [site.send("work", number, countdown=0.1) for number in range(3)]
    site.wait_past(site.store.now() + 0.2)

    assert _python(site, KILLED_RELAY).returncode == -signal.SIGKILL
    for result in (*delayed, retried):
        site.wait_state(result, "SUCCESS")
    assert site.store.due_in() is not None, "the delayed messages are still at rest"

    site.wait_past(site.store.now() + LEASE)
    again = _python(site, RELAY)
    assert again.stdout.strip() == str(len(delayed)).encode(), again.stderr.decode()
    for result in delayed:
        site.wait(lambda r=result: site.told("replayed", r), "the second copy")
        site.assert_done_once(result, "work", starts=1)
    site.assert_done_once(retried, "retried", starts=2)


def _python(site: Site, program: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=site.environ(),
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
