"""The edges of a run: what fails before the body or after it, in the wrong moment, or takes the process along."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery import chain
from celery.result import AsyncResult
from celery.signals import after_task_publish, before_task_publish
from redis import Redis

from taskguard.letter import DeadLetter
from taskguard.record import Reason
from tests import services
from tests.integration import edges
from tests.integration.conftest import open_site
from tests.integration.edges import BLOCKED_MAX_CRASHES
from tests.integration.journal import Entry
from tests.integration.servers import PrivateRedis
from tests.integration.site import LEASE, Site


class EdgeSite(Site):
    """A site whose workers know the tasks of `tests.integration.edges`."""

    program = edges.__name__
    _make_app = staticmethod(edges.make_app)

    def runs_of(self, task: str) -> list[Entry]:
        """The runs of every message of this task."""
        return [entry for entry in self.journal.entries("started") if entry.name == task]

    def letter_when_dead(self, result: AsyncResult) -> DeadLetter:
        """The one dead letter of this task, waited for."""
        self.wait(lambda: self.letters(result.id), f"a dead letter of {result.id}")
        return self.letter(result.id)


def _brokers(*names: str) -> list[Any]:
    return [pytest.param(name, id=name, marks=pytest.mark.xdist_group(f"edges-{name}")) for name in names]


@pytest.fixture(scope="module", params=_brokers("redis", "rabbitmq"))
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EdgeSite]:
    """A broker and a Redis store, with one worker for all tests of this module that leave it alive."""
    with ExitStack() as stack:
        site = open_site(stack, request.param, "redis", tmp_path_factory.mktemp(request.param), EdgeSite)
        assert isinstance(site, EdgeSite)
        site.start_worker()
        yield site


on_redis = pytest.mark.parametrize("site", _brokers("redis"), indirect=True, scope="module")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PrivateRedis]:
    """A Redis of this test's own, which it may freeze, lock and kill."""
    with PrivateRedis(tmp_path / "redis") as server:
        yield server


@contextmanager
def _site(namespace: str, directory: Path, **servers: Any) -> Iterator[EdgeSite]:
    """A site at the shared Redis, but for *servers*."""
    url = services.require("redis")
    site = EdgeSite(
        **{"broker": url, "store": url, "journal": url, **servers}, namespace=namespace, directory=directory
    )
    try:
        yield site
    finally:
        site.close()
        services.delete_redis_keys(url, f"*{namespace}*")


# -- what follows a run ------------------------------------------------------------------------------------------------


def test_what_follows_a_run_may_wait_its_turn(site: EdgeSite) -> None:
    """A chain's second step with a countdown, a link with one, and a link to a unique task: each runs, and once."""
    task, n = site.app.tasks, uuid.uuid4().hex
    delayed = chain(task["add"].s("a", "b"), task["add"].s("c").set(countdown=1)).apply_async()
    link, unique = task["add"].s("link").set(countdown=0.5), task["single"].si(n)
    link_id, unique_id = link.freeze(), unique.freeze()
    first = site.send("work", 1, link=[link, unique])
    for result in (delayed, link_id, unique_id, first):
        site.wait_state(result, "SUCCESS")
    assert (delayed.result, link_id.result, unique_id.result) == ("a+b+c", "1+link", f"single {n}")
    assert site.started(delayed)[0].at - site.finished(delayed.parent)[0].at >= 0.9, "the countdown was kept"
    site.wait_settled()
    assert [len(site.started(each)) for each in (delayed, delayed.parent, link_id, unique_id, first)] == [1] * 5


def test_a_link_that_cannot_be_sent_is_a_dead_letter_of_the_run_it_follows(site: EdgeSite) -> None:
    """Its key function raises for what the first task returned: the run counts, and the letter says what is missing."""
    result = site.send("work", 1, link=site.app.tasks["ordered"].s())
    letter = site.letter_when_dead(result)
    assert letter.failure.reason is Reason.PERMANENT_ERROR
    assert "completed, but what follows could not be sent" in letter.failure.message
    site.wait_settled()
    assert len(site.told("completed", result)) == len(site.started(result)) == 1


def test_a_link_runs_once_however_often_its_task_is_delivered(site: EdgeSite) -> None:
    """A chain as a link, and the same message again after all is done: every step is replayed, and none is run."""
    add, mark = site.app.tasks["add"], uuid.uuid4().hex
    before = len(site.runs_of("add"))
    result, again = site.send_repeatable("work", 1, link=chain(add.s(mark), add.s("b")))
    site.wait(lambda: len(site.runs_of("add")) == before + 2, "both steps of the link")
    steps = [site.app.AsyncResult(run.task_id) for run in site.runs_of("add")[before:]]
    site.wait_state(steps[1], "SUCCESS")
    assert steps[1].result == f"1+{mark}+b"
    again()
    for each in (result, *steps):
        site.wait(lambda each=each: site.told("replayed", each), "the second delivery")
    site.wait_settled()
    assert len(site.runs_of("add")) == before + 2


@on_redis
def test_a_unique_task_is_said_to_be_published_once(site: EdgeSite) -> None:
    """Celery's signals count messages; the one built for the store is none."""
    heard: list[tuple[str, str]] = []

    def before(headers: dict[str, Any], **_: Any) -> None:
        heard.append(("before", headers["id"]))

    def after(headers: dict[str, Any], **_: Any) -> None:
        heard.append(("after", headers["id"]))

    before_task_publish.connect(before, sender="single")
    after_task_publish.connect(after, sender="single")
    result = site.send("single", uuid.uuid4().hex)
    assert heard == [("before", result.id), ("after", result.id)]
    site.wait_state(result, "SUCCESS")


# -- before the body ---------------------------------------------------------------------------------------------------


def test_a_task_that_cannot_be_prepared_is_settled_as_if_its_body_had_failed(site: EdgeSite) -> None:
    """`before_start` raises: what is transient is retried, what is not is a dead letter."""
    once, never = site.send("prepared", "once"), site.send("prepared", "never")
    site.wait_state(once, "SUCCESS")
    site.wait_state(never, "FAILURE")
    assert len(site.journal.entries("prepared", once.id)) == 2
    assert len(site.started(once)) == 1
    assert [attempt.error for attempt in site.letter(never.id).record.attempts] == ["ValueError: no such bank"]
    assert site.letter(never.id).failure.reason is Reason.PERMANENT_ERROR
    assert not site.started(never)


def test_a_message_whose_key_cannot_be_made_is_rejected_and_the_worker_goes_on(site: EdgeSite) -> None:
    """Its producer knows no taskguard, and the key function raises KeyError in the worker's parent."""
    worker = site.worker()
    pid, task_id = worker.process.pid, str(uuid.uuid4())
    headers = {"id": task_id, "task": "ordered", "lang": "py"}
    site.publish_raw(json.dumps([[{"no": "id"}], {}, {}]).encode(), headers)
    result = site.app.AsyncResult(task_id)
    assert site.letter_when_dead(result).failure.reason is Reason.REJECTED
    site.wait_state(result, "FAILURE")
    site.assert_done_once(site.send("work", 1), "work", starts=1)
    assert worker.alive
    assert worker.process.pid == pid


@on_redis
def test_a_hard_time_limit_before_the_claim_costs_no_message(site: EdgeSite) -> None:
    """A receiver of `task_prerun` blocks until the pool kills it: counted as a crash, run again, completed."""
    result = site.send("blocked", 1)
    site.wait_state(result, "SUCCESS")
    assert len(site.journal.entries("prerun", result.id)) == 2
    assert [run.crashes for run in site.started(result)] == [1]
    site.wait_settled()


def test_hard_time_limits_before_every_claim_end_as_poison(tmp_path: Path, namespace: str) -> None:
    """No child ever gets as far as the claim: after `max_crashes` the message is a dead letter all the same."""
    with _site(namespace, tmp_path) as site:
        site.start_worker()
        result = site.send("blocked", 99)

        def begun() -> int:
            return len(site.journal.entries("prerun", result.id))

        site.wait(lambda: site.letters(result.id) or begun() > BLOCKED_MAX_CRASHES, "the dead letter")
        assert begun() == BLOCKED_MAX_CRASHES
        site.wait_state(result, "FAILURE")
        letter = site.letter(result.id)
        assert letter.failure.reason is Reason.POISON
        assert not site.started(result)


def test_a_store_that_refuses_the_claim_loses_nothing(server: PrivateRedis, tmp_path: Path, namespace: str) -> None:
    """It answers each call with an error: messages go back to the broker, unhurried, until it answers well."""
    with _site(namespace, tmp_path, store=server.url) as site, Redis.from_url(server.url) as operator:
        worker = site.start_worker()
        operator.config_set("requirepass", "s3cret")
        operator.client_kill_filter(_type="normal", skipme=True)
        results = [site.send("work", number) for number in range(3)]
        site.wait(lambda: all(worker.says(f"Task work[{result.id}] reject") for result in results), "the rejections")
        assert not any(site.started(result) for result in results)
        operator.config_set("requirepass", "")
        for result in results:
            site.assert_done_once(result, "work", starts=1)


# -- limits ------------------------------------------------------------------------------------------------------------


def test_a_soft_time_limit_that_strikes_at_the_gate_ends_nothing(
    server: PrivateRedis, tmp_path: Path, namespace: str
) -> None:
    """The store is frozen while one run waits to be claimed and another to be completed: both complete."""
    with _site(namespace, tmp_path, store=server.url, lease=20.0) as site:
        worker = site.start_worker()
        ending = site.send("hurried", end := uuid.uuid4().hex)
        site.wait_started(ending)
        with server.frozen():
            site.journal.open(end)
            beginning = site.send("hurried", begin := uuid.uuid4().hex)
            site.journal.open(begin)
            for result in (ending, beginning):
                site.wait(
                    lambda id=result.id: worker.says(f"Soft time limit (3s) exceeded for hurried[{id}]"),
                    f"the limit of {result.id}",
                )
            assert site.finished(ending)
            assert not site.started(beginning)
        for result in (ending, beginning):
            site.assert_done_once(result, "hurried", starts=1)


# -- what takes the process along --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_a_body_that_leaves_is_counted_as_a_crash(pool: str, tmp_path: Path, namespace: str) -> None:
    """`sys.exit` in every pool: poison after `max_crashes`, and the worker does what comes next."""
    with _site(namespace, tmp_path) as site:
        worker = site.start_worker(pool=pool)
        result = site.send("leaving")
        site.wait_state(result, "FAILURE")
        assert [run.crashes for run in site.started(result)] == [0, 1]
        letter = site.letter(result.id)
        assert letter.failure.reason is Reason.POISON
        assert [attempt.outcome for attempt in letter.record.attempts] == ["crash", "crash", "dead"]
        site.assert_done_once(site.send("work", 1), "work", starts=1)
        assert worker.alive


@on_redis
def test_a_body_out_of_memory_leaves_its_worker_alive(site: EdgeSite) -> None:
    """MemoryError, which stops Celery's own worker: retried as declared, then a dead letter that everyone can see."""
    worker = site.worker()
    pid = worker.process.pid
    result = site.send("greedy")
    site.wait_state(result, "FAILURE")
    letter = site.letter(result.id)
    assert (letter.failure.reason, letter.failure.error_type) == (Reason.MAX_RETRIES, "MemoryError")
    assert [attempt.outcome for attempt in letter.record.attempts] == ["retry", "dead"]
    assert len(site.started(result)) == 2
    site.assert_done_once(site.send("work", 1), "work", starts=1)
    assert worker.alive
    assert worker.process.pid == pid


def _active(site: Site) -> Any:
    """What the worker's parent knows to be running, as soon as it says so: a beat later the run is in custody, and its
    message acknowledged."""
    return site.app.control.inspect(timeout=1, limit=1).active()


def test_a_lost_broker_connection_charges_nobody_with_a_crash(
    server: PrivateRedis, tmp_path: Path, namespace: str
) -> None:
    """Celery cancels what runs, if told to: the message is due at once, and completes as if for the first time."""
    conf = json.dumps({"worker_cancel_long_running_tasks_on_connection_loss": True})
    with _site(namespace, tmp_path, broker=server.url, TEST_CONF=conf) as site:
        worker = site.start_worker()
        result = site.send("held", gate := uuid.uuid4().hex)
        first = site.wait_started(result)
        site.wait(lambda: result.id in str(_active(site)), "a parent that knows of it")
        with Redis.from_url(server.url) as operator:
            assert operator.client_kill_filter(_type="normal", skipme=True)
        site.wait(lambda: worker.says("Connection to broker lost"), "a worker that misses its broker")
        site.wait(lambda: not psutil.pid_exists(first.pid), "the end of the cancelled run")
        site.journal.open(gate)
        second = site.wait_started(result, 2)
        assert second.crashes == 0
        site.assert_done_once(result, "held", starts=2)
        record = site.record(result, "held")
        assert record is not None
        assert record.crashes == 0
        assert not site.told("crash", result)


def test_a_worker_goes_on_while_the_result_backend_is_away(
    server: PrivateRedis, tmp_path: Path, namespace: str
) -> None:
    """A child dies, and a message is too late: neither telling holds up the pool, and both are told when it is back."""
    with _site(namespace, tmp_path, TEST_BACKEND=server.url) as site:
        site.start_worker()
        held = site.send("held", gate := uuid.uuid4().hex)
        run = site.wait_started(held)
        late = site.send("work", 1, countdown=0.5, deadline=0.1)
        server.kill()
        os.kill(run.pid, signal.SIGKILL)
        site.wait(lambda: site.told("crash", held), "the crash")
        for _ in range(3):
            quiet = [site.send("quiet", ignore_result=True) for _ in range(4)]
            asked = time.time()
            for result in quiet:
                site.wait_started(result)
            assert max(site.started(result)[0].at for result in quiet) - asked < 4 * LEASE
        site.wait(lambda: site.letters(late.id), "the letter of the late one")
        server.start()
        site.wait_state(late, "FAILURE")
        site.wait_state(held, "RETRY")
        site.journal.open(gate)
        site.wait_state(held, "SUCCESS")
