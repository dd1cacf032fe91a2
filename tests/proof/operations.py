"""Rows 43-51: workers that are stopped, cut off or replaced, and a Redis broker that forgets."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress

from celery.result import AsyncResult
from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import ResponseError

from taskguard.errors import ConfigurationError
from taskguard.record import State
from tests.integration.journal import Deadline
from tests.integration.proxy import Proxy
from tests.proof.outcome import Outcome
from tests.proof.rows import FETCHING, POOLS, Setup, row
from tests.proof.stage import END_PATIENCE, Stage
from tests.proof.tasks import CATCH_UP, PER_SECOND

LATE = Setup(options={"acks_late": True})
KEPT_AT_BROKER = Setup(env={"TASKGUARD_EARLY_ACK": "0"})
ONE_EACH = Setup(conf={"worker_prefetch_multiplier": 1})
HASTY = Setup(transport={"visibility_timeout": 3, "unacked_restore_interval": 0.5, "unacked_restore_throttle": 1})
"""A killed stock worker's messages come back in an hour otherwise."""
SHORT_RUNS = 6.0
"""Seconds in which idle workers have run what is short; taskguard's are given longer on a busy machine."""


@row(43, "rate_limit by each worker", pools=POOLS, concurrency=2, patience=20)
def rate_limit(stage: Stage) -> Outcome:
    """Three workers share tasks that may start five times a second; with taskguard, two that come late may catch up."""
    stage.kill_all()
    workers = [stage.start_worker() for _ in range(3)]
    results = [stage.send("paced", number) for number in range(PER_SECOND * 5)]
    stage.wait_all("started", results, timeout=60)
    stage.fired(all(worker.alive for worker in workers), "three workers shared more than they may start in a second")
    starts = sorted(entry.at for result in results for entry in stage.started(result))
    most = max(sum(at <= other < at + 1 for other in starts) for at in starts)
    took = starts[-1] - starts[0]
    outcome = stage.finish(
        results, note=f"{most} starts in the busiest second, {len(results) / max(took, 1):.1f} a second over all"
    )
    if stage.guarded:
        # How late a start comes after its permit, each run decides for itself.
        assert most <= PER_SECOND + CATCH_UP + 1
        assert took > (len(results) - CATCH_UP - 1) / PER_SECOND
        assert not stage.total("retried", results), "waiting for a turn is no attempt"
    return outcome


@row(44, "long run in front of short ones", pools=FETCHING, concurrency=1, patience=8)
def prefetched(stage: Stage) -> Outcome:
    """One worker runs a long task; short ones are sent, and another worker is idle."""
    stage.kill_all()
    busy = stage.start_worker()
    long = stage.send("held", gate := stage.gate())
    stage.wait_started(long)
    short = [stage.send("work", number) for number in range(3)]
    if not stage.guarded:
        stage.wait(lambda: all(busy.says(f"work[{result.id}] received") for result in short), "all fetched")
    stage.start_worker()
    Deadline.after(SHORT_RUNS).reached(lambda: len(stage.counts("finished", short)) == len(short))
    # A run that was acknowledged early has given its place in the prefetch window away: docs/guarantees.md.
    at_least = len(short) - stage.row.concurrency if stage.guarded else 0
    stage.wait(lambda: len(stage.counts("finished", short)) >= at_least, "the short ones that the idle worker can have")
    done = len(stage.counts("finished", short))
    stage.fired(not stage.finished(long), "the long run was still going on")
    stage.journal.open(gate)
    return stage.finish([long, *short], note=f"{done} of {len(short)} ran beside the long one")


@row(45, "warm shutdown", pools=POOLS)
def warm(stage: Stage) -> Outcome:
    """SIGTERM while four tasks run for longer than a lease and more wait; another worker takes over."""
    stage.kill_all()
    leaving = stage.start_worker()
    gate = stage.gate()
    results = [stage.send("held", gate) for _ in range(8)]
    stage.wait(lambda: stage.total("started", results) == 4, "four runs")
    asked = stage.clock()
    leaving.terminate()
    stage.start_worker()
    stage.fired(lambda: leaving.says("Warm shutdown"), "the worker was asked to stop")
    stage.wait(lambda: stage.clock() > asked + 1.5 * stage.row.lease, "more than a lease")
    assert leaving.alive, "the shutdown waits for what runs"
    stage.journal.open(gate)
    stage.wait(lambda: not leaving.alive, "the end of the shutdown")
    assert leaving.process.returncode == 0
    return stage.finish(results)


@row(46, "cold shutdown", patience=8)
def cold(stage: Stage) -> Outcome:
    """SIGQUIT while four tasks run and more wait, acknowledged on arrival by stock; then another worker."""
    stage.kill_all()
    leaving = stage.start_worker()
    gate = stage.gate()
    results = [stage.send("held", gate) for _ in range(2)]
    stage.wait_all("started", results)
    if stage.guarded:
        stage.wait(
            lambda: all(_is_kept(stage, result) for result in results), "two runs of which the broker has no copy"
        )
    results += [stage.send("held", gate) for _ in range(8)]
    stage.wait(lambda: stage.total("started", results) == 4, "four runs")
    leaving.process.send_signal(signal.SIGQUIT)
    stage.wait(lambda: not leaving.alive, "the end of a worker that was asked to end at once")
    stage.fired(not stage.total("finished", results), "four runs were broken off")
    stage.journal.open(gate)
    stage.start_worker()
    outcome = stage.finish(results, starts=14)
    if stage.guarded:
        assert not any(run.crashes for result in results for run in stage.started(result)), "nobody's crash"
    return outcome


def _is_kept(stage: Stage, result: AsyncResult) -> bool:
    record = stage.record(result, "held")
    return record is not None and record.kept


@row(47, "broker connection cut in mid-run", pools=POOLS, both=LATE, guarded=KEPT_AT_BROKER)
def connection_cut(stage: Stage) -> Outcome:
    """A worker's connections to the broker break while two tasks run, and the broker hands their messages out again."""
    stage.kill_all()
    with Proxy(stage.broker) as proxy:
        worker = stage.start_worker(TEST_BROKER=proxy.url)
        gate = stage.gate()
        results = [stage.send("held", gate) for _ in range(2)]
        stage.wait_all("started", results)
        assert proxy.cut()
        stage.fired(lambda: worker.says("Connection to broker lost"), "the worker lost its broker")
        again = (
            (lambda: all(stage.told("discarded", result) for result in results))
            if stage.guarded
            else (lambda: stage.total("started", results) == 4)
        )
        came = Deadline.after(stage.row.patience).reached(again)
        stage.journal.open(gate)
        outcome = stage.finish(results, note="" if came else "nothing was handed out again")
        stage.kill_all()
    return outcome


@row(48, "revoked, then killed", pools=POOLS, stock=HASTY, patience=12)
def revoked(stage: Stage) -> Outcome:
    """Tasks are revoked, one before a worker hears of it; then every worker is SIGKILLed, and another comes."""
    stage.kill_all()
    worker = stage.start_worker()
    gate = stage.gate()
    busy = [stage.send("held", gate) for _ in range(4)]
    stage.wait_all("started", busy)
    called_off = [stage.send("work", number) for number in range(5)]
    stage.app.control.revoke([result.id for result in called_off[:4]])
    stage.wait(lambda: worker.says("flagged as revoked"), "the worker heard of it")
    worker.kill()
    stage.app.control.revoke(called_off[4].id)
    stage.fired(not any(stage.started(result) for result in called_off), "all were revoked before they ran")
    stage.journal.open(gate)
    stage.start_worker()
    Deadline.after(END_PATIENCE if stage.guarded else stage.row.patience).reached(
        lambda: all(result.state == "REVOKED" for result in called_off)
    )
    ran = sum(bool(stage.started(result)) for result in called_off)
    note = f"{ran} of {len(called_off)} revoked tasks ran"
    outcome = stage.finish(busy, starts=8, note=note)
    if stage.guarded:
        assert [result.state for result in called_off] == ["REVOKED"] * len(called_off)
        assert not ran
        assert {record.state for r in called_off if (record := stage.record(r, "work"))} == {State.DISCARDED}
    return outcome


AT_BROKER = 6
"""Tasks that a broker alone has when it forgets."""


def _broker_forgets(stage: Stage, forget: Callable[[], None]) -> Outcome:
    """Four tasks run, six wait at the broker alone, three are delayed; three more are sent afterwards.

    What the broker alone had is lost, and counted as lost. A worker may have fetched some of it before.
    """
    stage.worker()
    gate = stage.gate()
    running = [stage.send("held", gate) for _ in range(4)]
    stage.wait_all("started", running)
    waiting = [stage.send("work", number) for number in range(AT_BROKER)]
    delayed = [stage.send("work", number, countdown=2) for number in range(3)]
    forget()
    after = _sent(stage, 3)
    stage.journal.open(gate)
    outcome = stage.finish([*running, *delayed, *after], forgotten=waiting)
    gone = len(waiting) - len(stage.counts("finished", waiting))
    stage.fired(bool(gone), "what only the broker had is gone")
    return outcome


def _sent(stage: Stage, number: int) -> list[AsyncResult]:
    """Sent as soon as the broker takes messages again."""
    results: list[AsyncResult] = []

    def sent() -> bool:
        try:
            while len(results) < number:
                results.append(stage.send("work", len(results)))
        except OperationalError:
            return False
        return True

    stage.wait(sent, "a broker that takes messages")
    return results


@row(49, "FLUSHDB at the broker", brokers=("redis",), private=("broker",), both=LATE | ONE_EACH,
     beyond_saving=AT_BROKER)  # fmt: skip
def flushed(stage: Stage) -> Outcome:
    """Somebody empties the broker's database; the message store is on another server."""

    def flush() -> None:
        with Redis.from_url(stage.broker) as client:
            client.flushdb()

    return _broker_forgets(stage, flush)


@row(50, "broker that evicts", brokers=("redis",), private=("broker",),
     redis_options=("--appendonly", "no", "--maxmemory", "4mb", "--maxmemory-policy", "allkeys-lru"))  # fmt: skip
def evicting(stage: Stage) -> Outcome:
    """The broker has 4 MB, and `maxmemory-policy allkeys-lru`: when it is full, it evicts queues without a word.

    taskguard publishes nothing there until an operator has set `noeviction`; then a full broker refuses.
    """
    results = _fill(stage)
    with Redis.from_url(stage.broker) as operator:
        if stage.guarded:
            stage.fired(not results, "each call raised ConfigurationError")
            operator.config_set("maxmemory-policy", "noeviction")
            results = _fill(stage)
            stage.fired(0 < len(results) < LARGE, "the broker was full, and refused")
            operator.config_set("maxmemory", 0)  # a full one takes no worker either
        else:
            stage.fired(operator.info("stats")["evicted_keys"] > 0, "the broker was full, and evicted")
    stage.worker()
    return stage.finish(results, note=f"{LARGE - len(results)} of {LARGE} refused")


LARGE = 100
"""Messages of 40 kB, more than the broker has room for."""


def _fill(stage: Stage) -> list[AsyncResult]:
    """Send them. Returns what was accepted."""
    results = []
    for _ in range(LARGE):
        with suppress(ConfigurationError, OperationalError, ResponseError):
            results.append(stage.send("work", "x" * 40_000))
    return results


@row(51, "broker restarted without persistence", brokers=("redis",), private=("broker",), both=LATE | ONE_EACH,
     redis_options=("--appendonly", "no"), beyond_saving=AT_BROKER)  # fmt: skip
def restarted(stage: Stage) -> Outcome:
    """The broker is SIGKILLed and started again, and had written nothing down; the message store is another server."""

    def restart() -> None:
        stage.servers["broker"].kill()
        stage.servers["broker"].start()

    return _broker_forgets(stage, restart)
