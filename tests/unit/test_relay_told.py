"""A relay whose store tells it of what is due: how long it sleeps, and what wakes it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import pytest

from taskguard.relay import LONGEST_SLEEP, TOLD_ONCE
from taskguard.stores.memory import MemoryStore
from tests.clocks import ManualClock
from tests.contracts.messages import LEASE
from tests.unit.relayhouse import House, running


@pytest.fixture
def house(clock: ManualClock) -> House:
    """A house of this test's own."""
    return House(clock)


class TellingStore(MemoryStore):
    """A store in memory that tells of what is due, when a test says so."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.lines: queue.Queue[Callable[[bool], None]] = queue.Queue()
        self.over = threading.Event()

    def watch_due(self, told: Callable[[bool], None], *, stop: Callable[[], bool]) -> None:
        told(True)
        self.lines.put(told)
        self.over.wait(10)


def test_a_relay_that_is_told_sleeps_until_it_is(house: House) -> None:
    """However long its poll is; and when the line is lost it looks by itself again."""
    house.store = store = TellingStore(house.clock)
    with running(house.relay(poll=0.01)):
        told = store.lines.get(timeout=10)
        for key in ("a", "b"):
            house.rests(key)
            told(True)
            assert house.broker.asked.acquire(timeout=10)
        told(False)
        house.rests("c")
        assert house.broker.asked.acquire(timeout=10)
    store.over.set()
    assert house.broker.keys == ["a", "b", "c"]


def test_a_told_relay_sleeps_until_the_next_is_due_but_not_for_long(house: House) -> None:
    """So it sees the end of each lease that begins while it sleeps. What is due it takes, and then waits for a poll."""
    relay = house.relay(poll=0.25)
    relay._is_told = True
    assert relay._turn() == LONGEST_SLEEP
    house.rests("a", due_in=2.0)
    assert relay._turn() == pytest.approx(2.0, abs=0.01)
    house.rests("b", due_in=LEASE)
    house.clock.advance(2.0)
    assert relay._turn() == 0.25
    assert house.broker.keys == ["a"]
    assert relay._turn() == LONGEST_SLEEP


def test_what_comes_due_right_after_another_waits_for_the_poll(house: House) -> None:
    """A relay that is told of each by itself would ask the store for each by itself."""
    relay, stop = house.relay(poll=0.3), threading.Event()
    relay._is_told = True
    house.rests("a")
    began = time.monotonic()
    assert relay._turn() == 0.3
    relay.ring()
    relay._rest(stop, 3600.0)
    assert time.monotonic() - began >= 0.3
    began = time.monotonic()
    relay.ring()
    relay._rest(stop, 3600.0)
    assert time.monotonic() - began < 0.3, "nothing was taken since"


def test_a_relay_that_was_told_looks_once_more(house: House) -> None:
    """A store tells once in a while: what came due in it right after is found without being told."""
    relay = house.relay(poll=0.01)
    relay._is_told, relay._told_at = True, time.monotonic()
    assert relay._turn() == TOLD_ONCE
    relay._told_at -= TOLD_ONCE
    assert relay._turn() == LONGEST_SLEEP


def test_a_line_that_cannot_be_had_costs_no_message(house: House) -> None:
    """It is told of, once, and the relay looks by itself."""

    class Deaf(MemoryStore):
        def watch_due(self, told: Callable[[bool], None], *, stop: Callable[[], bool]) -> None:
            raise OSError("no socket")

    house.store = Deaf(house.clock)
    with running(house.relay(poll=0.01)):
        house.rests("a")
        assert house.broker.asked.acquire(timeout=10)
    assert [event.detail for event in house.events] == ["not told of what is due: OSError: no socket", ""]
