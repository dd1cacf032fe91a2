"""The Redis transport under real workers: what is no message, what a killed worker had taken, a broker that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from taskguard.deadletters import DeadLetters
from taskguard.record import Reason
from tests.integration.conftest import open_site
from tests.integration.servers import PrivateRedis
from tests.integration.site import PATIENCE, ROOT, Site, Worker
from tests.integration.transport_faults import KILLED, POINTS

LEASE = 4.0
RECOVERY = 10.0
"""Seconds from a worker's death to the start of what it had taken, with that lease.

Less than five where nothing else runs, and far from the visibility timeout on any machine.
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Site]:
    """Redis as broker and store, with nobody there yet."""
    with ExitStack() as stack:
        site = open_site(stack, "redis", "redis", tmp_path)
        yield site


def broker(site: Site) -> Redis:
    """The broker."""
    return Redis.from_url(site.broker)


def waiting(site: Site) -> int:
    """Messages in the queue."""
    return int(broker(site).llen(f"{site.namespace}.{site.queue}"))


def taken(site: Site) -> int:
    """Messages a consumer has."""
    return int(broker(site).hlen(f"{site.namespace}.unacked"))


def occupied(site: Site, gate: str, **env: str) -> tuple[Worker, Any]:
    """A worker with one slot, which is taken, and two more messages than it runs."""
    worker = site.start_worker(concurrency=1, TEST_CONF='{"worker_prefetch_multiplier": 4}', **env)
    running = site.send("held", gate)
    site.wait_started(running)
    return worker, running


def assert_completed_once(site: Site, *results: Any) -> None:
    """Each run's outcome was written once, and nothing is under way that could write it again."""
    for result in results:
        site.wait_state(result, "SUCCESS")
        site.wait(lambda result=result: site.told("completed", result), f"{result.id} completed")
    site.wait_settled()
    assert [len(site.told("completed", result)) for result in results] == [1] * len(results)


def test_an_item_that_is_no_message_becomes_a_dead_letter(place: Site) -> None:
    """Row 31. Stock dies of it and loses it; here its bytes are kept, and the tasks behind it run."""
    worker = place.start_worker()
    junk = [b"no json \xff\x00", b'[{"no": "message"}]', b"{}"]
    for item in junk:
        broker(place).lpush(f"{place.namespace}.{place.queue}", item)
    after = place.send("work", 7)
    place.wait_state(after, "SUCCESS")
    place.wait(lambda: taken(place) == 0, "all acknowledged")
    letters = list(DeadLetters(place.store).select())
    assert sorted(letter.envelope.body for letter in letters) == sorted(junk)
    assert {letter.failure.reason for letter in letters} == {Reason.UNDECODABLE}
    assert worker.alive


@pytest.mark.parametrize("point", POINTS)
def test_no_kill_between_queue_and_worker_loses_a_message(place: Site, point: str) -> None:
    """There is no instant at which a message is in the consumer's memory alone."""
    result = place.send("work", 3)
    assert faulted(place, point) == KILLED
    assert waiting(place) + taken(place) == 1
    place.start_worker()
    assert_completed_once(place, result)
    place.assert_done_once(result, "work", starts=1)


def test_stock_loses_a_message_in_that_instant(place: Site) -> None:
    """The fault is real: kombu's own transport, killed between its pop and its note, leaves nothing."""
    place.send("work", 3)
    assert faulted(place, "stock") == KILLED
    assert waiting(place) + taken(place) == 0


def faulted(site: Site, point: str) -> int:
    """Consume in a process that is killed at *point*. Returns how it ended."""
    command = [sys.executable, "-m", "tests.integration.transport_faults", point]
    environ = site.environ(TASKGUARD_LEASE="1")
    return subprocess.run(command, cwd=ROOT, env=environ, timeout=PATIENCE, check=False).returncode


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_what_a_killed_worker_had_not_started_runs_elsewhere_in_seconds(place: Site, pool: str) -> None:
    """Soon after a lease of four seconds, in order, and not counted as a crash of what had not begun."""
    lease = {"TASKGUARD_LEASE": str(LEASE)}
    lost, running = occupied(place, "never", **lease)
    waited = [place.send("work", number) for number in range(3)]
    place.wait(lambda: waiting(place) == 0, "three messages prefetched")
    place.start_worker(pool=pool, **lease)
    lost.kill()
    killed_at = place.store.now()
    starts = [place.wait_started(result) for result in waited]
    assert max(entry.at for entry in starts) - killed_at < RECOVERY
    assert {entry.crashes for entry in starts} == {0}
    for result in waited:
        place.wait_state(result, "SUCCESS")
        assert len(place.started(result)) == 1
    place.journal.open("never")
    assert_completed_once(place, running)
    place.wait(lambda: taken(place) == 0, "nothing left unacknowledged")


def test_a_stopped_worker_gives_back_what_it_had_not_started(place: Site) -> None:
    """A warm shutdown: at once, at the front of the queue, in order."""
    worker, running = occupied(place, "g")
    waited = [place.send("work", number) for number in range(5)]
    place.wait(lambda: waiting(place) in (1, 2), "messages prefetched")  # an early acknowledgement makes room
    worker.terminate()
    place.journal.open("g")
    assert worker.wait_end() == 0
    place.wait_state(running, "SUCCESS")
    done = [result for result in waited if place.started(result)]
    assert waiting(place) == len(waited) - len(done)
    assert taken(place) == 0
    place.start_worker(concurrency=1)
    for result in waited:
        place.wait_state(result, "SUCCESS")
        assert len(place.started(result)) == 1
    order = sorted((place.started(result)[0].at, number) for number, result in enumerate(waited))
    assert [number for _, number in order] == list(range(5))


def test_a_broker_that_was_killed_is_consumed_again(place: Site, tmp_path: Path) -> None:
    """Its scripts and its knowledge of who waits are gone; messages sent before and after arrive."""
    with PrivateRedis(tmp_path / "redis") as server:
        site = Site(
            broker=server.url, store=place.store_url, journal=place.broker, namespace=place.namespace,
            directory=tmp_path,
        )  # fmt: skip
        try:
            worker, running = occupied(site, "g")
            before = [site.send("work", number) for number in range(5)]
            site.wait(lambda: taken(site) >= 4, "prefetched")
            server.kill()
            server.start()
            site.journal.open("g")
            after = site.send("work", 5)
            assert_completed_once(site, running, *before, after)
            site.wait(lambda: taken(site) + waiting(site) == 0, "nothing stuck")
            assert worker.alive
        finally:
            site.close()


def test_forgotten_scripts_are_loaded_again(place: Site, tmp_path: Path) -> None:
    """``SCRIPT FLUSH`` in the middle costs nothing."""
    with PrivateRedis(tmp_path / "redis") as server:
        site = Site(
            broker=server.url, store=place.store_url, journal=place.broker, namespace=place.namespace,
            directory=tmp_path,
        )  # fmt: skip
        try:
            worker, running = occupied(site, "g")
            with Redis.from_url(server.url) as client:
                client.script_flush()
            site.journal.open("g")
            for result in (running, site.send("work", 1)):
                site.wait_state(result, "SUCCESS")
            site.wait(lambda: taken(site) == 0, "acknowledged")
            assert worker.alive
        finally:
            site.close()


def test_a_broker_that_tells_nothing_is_asked(place: Site, tmp_path: Path) -> None:
    """A user without the right to be told gets a slower worker, which says so, and no loss."""
    with PrivateRedis(tmp_path / "redis") as server:
        with Redis.from_url(server.url) as client:
            client.execute_command("ACL", "SETUSER", "deaf", "on", ">pass", "~*", "&*", "+@all", "-client")
        site = Site(
            broker=server.url.replace("://", "://deaf:pass@"), store=place.store_url, journal=place.broker,
            namespace=place.namespace, directory=tmp_path,
        )  # fmt: skip
        try:
            worker = site.start_worker()
            for number in range(3):
                site.wait_state(site.send("work", number), "SUCCESS")
            assert worker.says("cannot tell of new messages")
        finally:
            site.close()


def test_a_suspended_worker_loses_its_messages_and_repeats_none(place: Site) -> None:
    """Its lease ends, others run them; when it comes to, custody tells it so."""
    lease = {"TASKGUARD_LEASE": "3"}
    slow, running = occupied(place, "g", **lease)
    waited = [place.send("work", number) for number in range(3)]
    place.wait(lambda: waiting(place) == 0, "three messages prefetched")
    place.start_worker(**lease)
    os.kill(slow.process.pid, signal.SIGSTOP)
    try:
        for result in waited:
            place.wait_state(result, "SUCCESS")
    finally:
        os.kill(slow.process.pid, signal.SIGCONT)
    place.journal.open("g")
    assert_completed_once(place, running, *waited)
    place.wait(lambda: taken(place) == 0, "all acknowledged")
    assert all(len(place.started(result)) == 1 for result in waited)


def test_workers_answer_commands(place: Site) -> None:
    """``celery inspect``: its replies and broadcasts go kombu's way, and shown URLs are what they were."""
    worker = place.start_worker()
    place.wait(lambda: place.app.control.inspect(timeout=2).ping(), "a pong")
    assert place.app.connection_for_read().as_uri().startswith("redis://")
    assert worker.says("transport:   redis://")
