"""Eight real processes at one limit, by the server's clock: together they are given exactly what one would be."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest

from taskguard.permits import Ask, CircuitAsk, Outcomes, Permit, RateAsk, Slot, SlotAsk
from taskguard.policies.circuit import CircuitBreaker
from taskguard.policies.rates import FixedWindow, LeakyBucket, Rate, SlidingLog, SlidingWindow, TokenBucket
from taskguard.ports import PermitStore
from taskguard.stores import open_permits
from tests.contracts.permits import admitted

PROCESSES = 8
CALLS = 12
"""That each process makes. All together are more than a limit admits."""
LIMIT = 40
PATIENCE = 60
YEAR = 366 * 86400
RATES: dict[str, Rate] = {
    "TokenBucket": TokenBucket(1, per=YEAR, burst=LIMIT),
    "LeakyBucket": LeakyBucket(1, per=YEAR),
    "FixedWindow": FixedWindow(LIMIT, per=YEAR),
    "SlidingWindow": SlidingWindow(LIMIT, per=YEAR),
    "SlidingLog": SlidingLog(LIMIT, per=YEAR),
}
"""Limits that give nothing back while the race runs, so that the number to be admitted is known."""
BREAKER = CircuitBreaker(minimum_calls=PROCESSES * 2, wait_in_open=0.001, probe_lease=600)

Racer = Callable[[PermitStore, int, Barrier, Any], Any]


@pytest.fixture(params=["redis", "postgresql", "mariadb", "sqlite"])
def store_url(request: pytest.FixtureRequest) -> str:
    """The URL of each backend that processes can share."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


class Racers:
    """Eight processes that live through many races, because starting them costs more than a race."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._start = context.Barrier(PROCESSES, timeout=PATIENCE)
        self._pipes, self._processes = [], []
        for number in range(PROCESSES):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(number, self._start, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, racer: Racer, url: str, namespace: str, given: Any = None) -> list[Any]:
        """Run *racer* in every process at once. Returns what each of them saw."""
        for pipe in self._pipes:
            pipe.send((racer, url, namespace, given))
        seen = [pipe.recv() for pipe in self._pipes]
        self._start.reset()
        for outcome in seen:
            if isinstance(outcome, str):
                pytest.fail(f"a racer failed:\n{outcome}")
        return seen

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(PATIENCE)
            process.kill()


def _serve(number: int, start: Barrier, pipe: Connection) -> None:
    while True:
        try:
            racer, url, namespace, given = pipe.recv()
        except EOFError:
            return
        try:
            with closing(open_permits(url, namespace=namespace, timeout=30)) as store:
                store.now()
                seen = racer(store, number, start, given)
        except BaseException:
            start.abort()
            seen = traceback.format_exc()
        pipe.send(seen)


@pytest.fixture(scope="module")
def racers() -> Iterator[Racers]:
    """The processes, for all races of this module."""
    with closing(Racers()) as racers:
        yield racers


def spend(store: PermitStore, number: int, start: Barrier, policy: Rate) -> int:
    """Every process asks as often as it may, and counts what it is given."""
    ask = Ask(rates=(RateAsk("bank", policy),), book=True)
    start.wait()
    return sum(admitted(store.admit(ask)) for _ in range(CALLS))


@pytest.mark.parametrize("name", RATES)
def test_processes_together_are_given_the_limit_and_not_one_more(
    store_url: str, namespace: str, racers: Racers, name: str
) -> None:
    """Each algorithm, from an unused limit, whose state does not even exist: 96 ask, 40 go; of a leaky bucket, one."""
    given = racers.run(spend, store_url, namespace, RATES[name])
    assert sum(given) == (1 if name == "LeakyBucket" else LIMIT)


def spend_stacked(store: PermitStore, number: int, start: Barrier, _: Any) -> int:
    """Two limits that the processes ask for in both orders, and one bulkhead."""
    rates = (RateAsk("a", TokenBucket(1, per=YEAR, burst=25)), RateAsk("b", FixedWindow(LIMIT, per=YEAR)))
    start.wait()
    return sum(
        admitted(store.admit(Ask(rates=rates[:: (-1) ** number], slot=SlotAsk("c", 1000, f"{number}/{n}", 600))))
        for n in range(CALLS)
    )


def test_stacked_limits_are_debited_together(store_url: str, namespace: str, racers: Racers) -> None:
    """As many as the narrower admits, and the wider has exactly the rest: nothing was debited for a refused call."""
    assert sum(racers.run(spend_stacked, store_url, namespace)) == 25
    with closing(open_permits(store_url, namespace=namespace, timeout=30)) as store:
        rest = Ask(rates=(RateAsk("b", FixedWindow(LIMIT, per=YEAR)),))
        assert sum(admitted(store.admit(rest)) for _ in range(LIMIT)) == LIMIT - 25


def take_places(store: PermitStore, number: int, start: Barrier, _: Any) -> list[bool]:
    """Every process takes a place, and keeps it until all have asked; then gives it back for the next round."""
    got = []
    for n in range(5):
        slot = SlotAsk("bank", 3, f"{number}/{n}", 600)
        start.wait()
        got.append(admitted(store.admit(Ask(slot=slot))))
        start.wait()
        mine = Slot(slot.name, slot.holder)
        store.admit(Ask(release=(mine, mine)))
    return got


def test_no_more_places_are_held_than_there_are(store_url: str, namespace: str, racers: Racers) -> None:
    """Three of eight, in every round: none is lost by a release that came twice."""
    for round_ in zip(*racers.run(take_places, store_url, namespace), strict=True):
        assert sum(round_) == 3


def fail_and_probe(store: PermitStore, number: int, start: Barrier, _: Any) -> list[bool]:
    """Every process reports two failures, then all ask until one is the probe, and nobody reports it."""
    start.wait()
    for _call in range(2):
        store.report("bank", BREAKER, Outcomes(0, 1, 1, 0))
    start.wait()
    probes = []
    for n in range(CALLS):
        answer = store.admit(Ask(circuit=CircuitAsk("bank", BREAKER, f"{number}/{n}")))
        probes.append(isinstance(answer, Permit) and answer.probe)
        assert isinstance(answer, Permit) == probes[-1], "an open circuit lets probes through, and nothing else"
    return probes


def test_a_fleet_trips_together_and_sends_one_probe(store_url: str, namespace: str, racers: Racers) -> None:
    """Two failures in each of eight processes reach a minimum of sixteen; then exactly one call goes."""
    seen = racers.run(fail_and_probe, store_url, namespace)
    assert sum(sum(probes) for probes in seen) == 1
    with closing(open_permits(store_url, namespace=namespace, timeout=30)) as store:
        view = store.circuit("bank")
        assert (view.state, view.generation, view.trips) == ("half_open", 2, 1)


def book_slots(store: PermitStore, number: int, start: Barrier, _: Any) -> list[float]:
    """Every process books for its refused calls. Returns the instants of their slots."""
    ask = Ask(rates=(RateAsk("bank", TokenBucket(1, per=100, burst=1)),), book=True)
    start.wait()
    slots = []
    for _call in range(CALLS):
        answer = store.admit(ask)
        if not isinstance(answer, Permit):
            assert answer.slot_in is not None
            slots.append(store.now() + answer.slot_in)
    return slots


def test_no_two_calls_are_given_one_slot(store_url: str, namespace: str, racers: Racers) -> None:
    """95 of 96 calls are booked, a hundred seconds apart, by however many processes."""
    slots = sorted(slot for slots in racers.run(book_slots, store_url, namespace) for slot in slots)
    assert len(slots) == PROCESSES * CALLS - 1
    assert min(after - before for before, after in pairwise(slots)) > 90
    assert slots[-1] - slots[0] == pytest.approx((len(slots) - 1) * 100, abs=20)
