"""Paused queues, with real workers: nobody consumes them, also not who comes later; and they resume by themselves."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import open_site
from tests.integration.journal import Entry
from tests.integration.site import Site, Worker

PROMISED = {"prefork": 1.0, "threads": 1.0, "gevent": 3.0}
"""Seconds within which every worker has stopped, or begins again. With gevent, Celery looks up every two seconds."""
PLACES = [
    ("redis", "redis", "prefork"),
    ("redis", "postgresql", "threads"),
    ("rabbitmq", "redis", "threads"),
    ("rabbitmq", "postgresql", "prefork"),
    ("redis", "redis", "gevent"),
]


class Yard(Site):
    """A site whose workers consume two queues."""

    pool = "prefork"

    def __init__(self, **options: Any) -> None:
        own, other = (f"{options['namespace']}.{name}" for name in ("tasks", "other"))
        super().__init__(**options, TEST_CONF=json.dumps({"task_queues": {own: {}, other: {}}}))
        self.other = other

    def hire(self) -> Worker:
        """A worker of this yard's pool."""
        return self.start_worker(pool=self.pool)

    def pause(self, **options: Any) -> float:
        """Pause the queue. Returns when that was."""
        self.app.taskguard.permits.pause(self.queue, **{"until": None, "who": "ann", "why": "a test", **options})
        return time.time()

    def told_of(self, what: str, times: int = 1) -> list[Entry]:
        """The events of this name about the queue, once there are so many."""

        def found() -> list[Entry]:
            return [entry for entry in self.journal.entries(what) if entry.detail.startswith(self.queue)]

        self.wait(lambda: len(found()) >= times, f"{times} times {what}")
        return found()

    def passes_by(self) -> None:
        """A task through the other queue, and back: what was to be consumed from this one has been by now."""
        for _ in range(2):
            self.wait_state(self.send("work", queue=self.other), "SUCCESS")


@pytest.fixture(params=PLACES, ids="-".join)
def yard(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Yard]:
    """One of each broker with each store and pool."""
    broker, store, pool = request.param
    with ExitStack() as stack:
        opened: Any = open_site(stack, broker, store, tmp_path, Yard)
        opened.pool = pool
        yield opened


def test_a_paused_queue_is_left_alone_by_all_workers_also_after_a_restart(yard: Yard) -> None:
    """Both stop within a second; the one that is started later never begins; all go on when it is resumed."""
    first, second = yard.hire(), yard.hire()
    yard.wait_state(yard.send("work"), "SUCCESS")
    at = yard.pause()
    stopped = yard.told_of("queue_paused", 2)
    assert {entry.pid for entry in stopped} == {first.process.pid, second.process.pid}
    assert max(entry.at for entry in stopped) - at < PROMISED[yard.pool]
    assert stopped[0].detail == f"{yard.queue} until it is resumed, by ann: a test"
    waiting = [yard.send("work", number) for number in range(3)]
    yard.passes_by()
    first.kill()
    second.kill()
    third = yard.hire()
    assert yard.told_of("queue_paused", 3)[-1].pid == third.process.pid
    yard.passes_by()
    assert not any(yard.started(result) for result in waiting)
    assert yard.app.taskguard.permits.resume(yard.queue)
    at = time.time()
    assert yard.told_of("queue_resumed")[0].at - at < PROMISED[yard.pool]
    for result in waiting:
        yard.assert_done_once(result, "work", starts=1)


def test_a_queue_that_is_paused_for_a_while_resumes_by_itself(yard: Yard) -> None:
    """What was fetched before runs to its end meanwhile."""
    yard.hire()
    running = yard.send("held", "gate")
    yard.wait_started(running)
    until = yard.app.taskguard.permits.now() + 2.5
    yard.pause(until=until)
    yard.told_of("queue_paused")
    result = yard.send("work")
    yard.journal.open("gate")
    yard.wait_state(running, "SUCCESS")
    yard.wait_state(result, "SUCCESS")
    start = yard.started(result)[0].at
    assert until - 0.2 < start < until + PROMISED[yard.pool] + 1.0
