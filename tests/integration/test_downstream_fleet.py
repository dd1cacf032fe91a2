"""Downstreams of several processes on one Redis: what the fleet is promised, counted at the downstream's side."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
from redis import Redis

from taskguard.downstream.service import Downstream
from taskguard.errors import BulkheadFullError, CircuitOpenError, RateLimitedError
from taskguard.policies import CircuitBreaker, Concurrency, TokenBucket
from taskguard.stores import open_permits

PROCESSES = 4
PATIENCE = 60.0
RATE = TokenBucket(200, per=1, burst=20)
BREAKER = CircuitBreaker(minimum_calls=4, wait_in_open=1.0, backoff=1.0, probe_lease=20)


class Bank:
    """The service that is called. It counts at its own side, in Redis."""

    def __init__(self, url: str, namespace: str) -> None:
        self.redis = Redis.from_url(url)
        self.name = f"bank:{namespace}"

    def count(self, what: str, by: int = 1) -> int:
        return int(self.redis.incrby(f"{self.name}:{what}", by))

    def read(self, what: str) -> int:
        return int(self.redis.get(f"{self.name}:{what}") or 0)

    def most(self, value: int) -> None:
        self.redis.zadd(f"{self.name}:most", {"calls": value}, gt=True)

    def busiest(self) -> int:
        return int(self.redis.zscore(f"{self.name}:most", "calls") or 0)


def permits(url: str, namespace: str) -> Any:
    return open_permits(url, namespace=namespace, timeout=5.0)


def hammers(url: str, namespace: str, pipe: Connection) -> None:
    """Calls as fast as it can from eight threads, for two seconds."""
    bank = Downstream("bank", rate=RATE, store=permits(url, namespace))
    admitted = [0] * 8
    pipe.send("ready")
    pipe.recv()
    until = time.monotonic() + 2

    def work(index: int) -> None:
        while time.monotonic() < until:
            try:
                bank.call(lambda: None)
                admitted[index] += 1
            except RateLimitedError as refused:
                time.sleep(min(refused.retry_after or 0, 0.01))

    workers = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    pipe.send(sum(admitted))


def crowds(url: str, namespace: str, pipe: Connection) -> None:
    """Sixteen calls from four threads through three places of the fleet."""
    site = Bank(url, namespace)
    bank = Downstream("bank", concurrency=Concurrency(3, max_wait=PATIENCE), store=permits(url, namespace))

    def call() -> None:
        site.most(site.count("inside"))
        time.sleep(0.005)
        site.count("inside", -1)
        site.count("done")

    def work() -> None:
        for _ in range(4):
            bank.call(call)

    pipe.send("ready")
    pipe.recv()
    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    pipe.send("done")


def watches(url: str, namespace: str, pipe: Connection) -> None:
    """Listens, says when it saw the trip, then calls until the circuit is closed again."""
    site = Bank(url, namespace)
    bank = Downstream("bank", circuit=BREAKER, store=permits(url, namespace))
    bank.call(lambda: None)
    assert bank.circuit is not None
    pipe.send("ready")
    until = time.monotonic() + PATIENCE
    while bank.circuit.state == "closed" and time.monotonic() < until:
        time.sleep(0.0005)
    pipe.send(time.time())
    pipe.recv()

    def probe() -> None:
        inside, number = site.count("inside"), site.count("probes")
        if number <= 3:  # the third closes the circuit, and many may call again
            site.most(inside)
        time.sleep(0.3)
        site.count("inside", -1)
        if number < 3:
            raise ConnectionError("still down")

    while time.monotonic() < until:
        try:
            bank.call(probe)
            break
        except ConnectionError:
            continue
        except CircuitOpenError as refused:
            if site.read("probes") >= 3 and bank.circuit.state == "closed":
                break
            time.sleep(min(refused.retry_after or 0.01, 0.01))
    pipe.send(site.read("probes"))


def holds(url: str, namespace: str, pipe: Connection) -> None:
    """Takes the only place and keeps it."""
    bank = Downstream("bank", concurrency=Concurrency(1, lease=1), store=permits(url, namespace))
    with bank.permit():
        pipe.send("ready")
        pipe.recv()


class Fleet:
    """Processes that do the same, and what they say."""

    def __init__(self, url: str, namespace: str) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._args = (url, namespace)
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def start(self, work: Callable[..., None], many: int) -> None:
        for _ in range(many):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=work, args=(*self._args, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)
        assert self.hear() == ["ready"] * many

    def hear(self) -> list[Any]:
        said = []
        for pipe in self.pipes:
            assert pipe.poll(PATIENCE), "a process says nothing"
            said.append(pipe.recv())
        return said

    def go(self) -> None:
        for pipe in self.pipes:
            pipe.send("go")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(PATIENCE)


@pytest.fixture
def fleet(redis_url: str, namespace: str) -> Iterator[Fleet]:
    fleet = Fleet(redis_url, namespace)
    yield fleet
    fleet.close()


def test_the_fleet_never_calls_more_often_than_the_rate(fleet: Fleet) -> None:
    """Trap 26: four processes of eight threads, burst and rate and not one more; and nearly all of it is used."""
    fleet.start(hammers, PROCESSES)
    began = time.monotonic()
    fleet.go()
    admitted = sum(fleet.hear())
    elapsed = time.monotonic() - began
    assert admitted <= 20 + 200 * elapsed
    assert admitted >= 200


def test_the_fleet_never_makes_more_calls_at_once_than_there_are_places(
    fleet: Fleet, redis_url: str, namespace: str
) -> None:
    """Trap 26: counted by the downstream. Everybody has his turn."""
    fleet.start(crowds, PROCESSES)
    fleet.go()
    assert fleet.hear() == ["done"] * PROCESSES
    site = Bank(redis_url, namespace)
    assert (site.read("done"), site.read("inside")) == (PROCESSES * 16, 0)
    assert 1 <= site.busiest() <= 3


def test_a_trip_is_seen_by_all_and_one_probe_goes_at_a_time(fleet: Fleet, redis_url: str, namespace: str) -> None:
    """Traps 33 and 39: pushed, and the downstream meets one probe after the other until it is well."""
    fleet.start(watches, PROCESSES)
    bank = Downstream("bank", circuit=BREAKER, store=permits(redis_url, namespace))

    def fail() -> None:
        raise ConnectionError

    for _ in range(20):
        try:
            bank.call(fail)
        except ConnectionError:
            tripped_at = time.time()
        except CircuitOpenError:
            break
    seen = sorted(at - tripped_at for at in fleet.hear())
    assert seen[-1] < 1.0, seen
    fleet.go()
    probes = fleet.hear()
    site = Bank(redis_url, namespace)
    assert site.busiest() == 1
    assert min(probes) >= 3
    assert permits(redis_url, namespace).circuit("bank").state == "closed"


def test_the_place_of_a_killed_process_comes_back(fleet: Fleet, redis_url: str, namespace: str) -> None:
    """Trap 32: kill -9; its lease ends, and another's call goes. While it lived the lease was renewed."""
    fleet.start(holds, 1)
    bank = Downstream("bank", concurrency=Concurrency(1, lease=1), store=permits(redis_url, namespace))
    until = time.monotonic() + 2.5
    while time.monotonic() < until:
        with pytest.raises(BulkheadFullError):
            bank.call(lambda: None)
        time.sleep(0.05)
    os.kill(fleet.processes[0].pid, signal.SIGKILL)
    patient = Downstream("bank", concurrency=Concurrency(1, lease=1, max_wait=10), store=permits(redis_url, namespace))
    assert patient.call(lambda: 5) == 5
