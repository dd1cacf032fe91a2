"""The limiter: rules, permits and demand together."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from taskguard.downstream.admittance import booking
from taskguard.errors import ConfigurationError, RateLimitedError, StoreUnavailable
from taskguard.events import Event
from taskguard.limiter.decision import Decision
from taskguard.limiter.limiter import RETRY_DOWN, Limiter
from taskguard.limiter.rulebook import FixedRules, RuleBook
from taskguard.permits import Answer, Ask
from taskguard.policies import FixedWindow, TokenBucket
from taskguard.rules import Identity, Rule
from taskguard.stores.memory import MemoryPermits
from taskguard.stores.memory.rules import MemoryRules
from tests.clocks import ManualClock

ANN, BOB = Identity(client="ann", endpoint="GET /x"), Identity(client="bob", endpoint="GET /x")


class Counting(MemoryPermits):
    """Permits that count how often they are asked, and may be away or slow."""

    in_process = False

    def __init__(self, clock: ManualClock | None = None) -> None:
        super().__init__(clock)
        self.asked = 0
        self.away = False
        self.slow = 0.0
        self.gate: threading.Event | None = None
        self.reached, self.returned, self.returned_in = threading.Event(), threading.Event(), ""

    def unbook(self, name: str, slot_at: float) -> None:
        super().unbook(name, slot_at)
        self.returned_in = threading.current_thread().name
        self.returned.set()

    def admit(self, ask: Ask) -> Answer:
        self.asked += 1
        if self.gate is not None:
            self.reached.set()
            assert self.gate.wait(10)
        if self.slow:
            time.sleep(self.slow)
        if self.away:
            raise StoreUnavailable("store does not answer; wait")
        return super().admit(ask)


@pytest.fixture
def permits(clock: ManualClock) -> Counting:
    """An empty store of permits."""
    return Counting(clock)


@pytest.fixture
def events() -> list[Event]:
    """What was told."""
    return []


def limiter(permits: Counting, *rules: Rule, **options: Any) -> Limiter:
    """A limiter by these rules."""
    return Limiter(FixedRules(*rules), permits, **options)


def rule(id: str = "each", limits: Any = "3/minute", **fields: Any) -> Rule:
    """A rule for each client."""
    return Rule(id=id, limits=limits, **({"client": "*"} | fields))


def test_each_client_has_its_limit_and_is_told_when_to_come_back(permits: Counting, clock: ManualClock) -> None:
    """Three a minute: the fourth waits for the first token."""
    made = limiter(permits, rule())
    decisions = [made.check(ANN) for _ in range(4)]
    assert [each.allowed for each in decisions] == [True, True, True, False]
    refused = decisions[3]
    assert refused.refused_by == rule()
    assert refused.retry_after == pytest.approx(20.0, abs=1e-3)
    assert made.check(BOB).allowed


def test_waiting_as_told_admits(permits: Counting, clock: ManualClock) -> None:
    """By the store's clock."""
    made = limiter(permits, rule(limits=FixedWindow(1, 60)))
    assert made.check(ANN).allowed
    wait = made.check(ANN).retry_after
    assert wait is not None
    clock.advance(wait)
    made.after_fork()  # forget the refusal that was remembered by the process's clock
    assert made.check(ANN).allowed


def test_what_is_left_of_every_limit_is_told(permits: Counting) -> None:
    """For the headers of an answer."""
    made = limiter(permits, rule(limits="3/minute; 10/day"), rule("all", "100/second", client=""))
    standings = made.check(ANN).standings
    assert {(each.rule.id, each.view.limit, round(each.view.remaining)) for each in standings} == {
        ("each", 3, 2),
        ("each", 10, 9),
        ("all", 100, 99),
    }


def test_stacked_rules_take_all_or_nothing(permits: Counting) -> None:
    """What the client may not do costs the endpoint nothing."""
    made = limiter(permits, rule(limits="1/minute"), rule("all", "2/minute", client=""))
    assert made.check(ANN).allowed
    assert [made.check(ANN).allowed for _ in range(5)] == [False] * 5
    assert made.check(BOB).allowed
    last = made.check(Identity(client="eve"))
    assert (last.allowed, last.refused_by and last.refused_by.id) == (False, "all")


def test_a_call_that_no_rule_speaks_of_goes_on_and_asks_nobody(permits: Counting) -> None:
    """No round trip."""
    made = limiter(permits, rule(endpoint="POST *"))
    assert made.check(ANN).allowed
    assert permits.asked == 0


def test_a_refusal_that_must_hold_is_not_asked_again(permits: Counting) -> None:
    """A client in a loop costs the store nothing."""
    made = limiter(permits, rule(limits="1/minute"))
    decisions = [made.check(ANN) for _ in range(50)]
    assert permits.asked == 2
    assert all(not each.allowed and each.retry_after for each in decisions[1:])
    assert decisions[49].standings[0].view.remaining == 0
    assert made.check(BOB).allowed


def test_a_cost_that_can_never_be_admitted_says_so(permits: Counting) -> None:
    """retry_after is None, now and from memory."""
    made = limiter(permits, rule(limits="3/minute"))
    assert [made.check(ANN, 4).retry_after for _ in range(2)] == [None, None]
    assert made.check(ANN, 3).allowed


def test_a_changed_rule_is_in_effect_at_once_also_for_who_was_refused(permits: Counting) -> None:
    """Raising a limit live helps those who wait."""
    store = MemoryRules()
    store.put([rule(limits="1/minute")], who="ann", why="")
    book = RuleBook(store)
    made = Limiter(book, permits, timeout=10)
    assert [made.check(ANN).allowed for _ in range(3)] == [True, False, False]
    version = store.put([rule(limits="600/minute burst=10")], who="ann", why="more")
    assert book.wait_for(version, 10)
    decision = made.check(ANN)
    assert decision.version == version
    assert decision.retry_after == pytest.approx(0.1)  # by the new rate; by the old one it was a minute
    book.close()


def test_a_shadow_refuses_nothing_and_is_told(permits: Counting, events: list[Event]) -> None:
    """How a limit is tried before it holds."""
    made = limiter(permits, rule("try", "1/minute", shadow=True), rule(limits="5/minute"), notify=events.append)
    assert [made.check(ANN).allowed for _ in range(3)] == [True] * 3
    assert [(event.name, event.key) for event in events] == [("would_refuse", "ann")] * 2


def test_refusals_are_told(permits: Counting, events: list[Event]) -> None:
    """Each of them."""
    made = limiter(permits, rule(limits="1/minute"), notify=events.append)
    for _ in range(3):
        made.check(ANN)
    assert [(event.name, event.detail) for event in events] == [("rate_limited", "GET /x: rule each")] * 2


class TestStoreDown:
    @pytest.mark.parametrize(("declared", "allowed"), [("allow", True), ("refuse", False)])
    def test_calls_go_by_what_is_declared(
        self, permits: Counting, events: list[Event], declared: Any, allowed: bool
    ) -> None:
        """And one event says so when it begins and one when it ends, not one a call."""
        made = limiter(permits, rule(), on_store_down=declared, notify=events.append)
        permits.away = True
        decisions = [made.check(ANN) for _ in range(100)]
        assert {(each.allowed, each.store_down, each.retry_after) for each in decisions} == {
            (allowed, True, 0.0 if allowed else RETRY_DOWN)
        }
        assert [event.name for event in events] == ["permits_down"]
        assert made.store_down_total.total() == 100
        assert permits.asked < 20
        permits.away = False
        made.permits.outage.succeeded()  # its pause is over
        assert made.check(ANN).allowed
        assert [event.name for event in events] == ["permits_down", "permits_back"]

    def test_a_coroutine_waits_no_longer_than_the_timeout(self, permits: Counting) -> None:
        """However slow the store is."""
        permits.slow = 0.5
        made = limiter(permits, rule(), timeout=0.1)

        async def ask() -> tuple[Decision, float]:
            began = time.monotonic()
            return await made.aenter(ANN), time.monotonic() - began

        decision, took = asyncio.run(ask())
        assert (decision.allowed, decision.store_down) == (True, True)
        assert took < 0.4

    def test_a_crowd_at_a_healthy_store_is_no_outage(self, permits: Counting) -> None:
        """Who waits for a thread waits: the limit holds however many come at once."""
        permits.slow = 0.05
        made = limiter(permits, rule(limits="300/hour"), timeout=1)

        async def ask() -> list[Decision]:
            return await asyncio.gather(*(made.aenter(ANN) for _ in range(600)))

        decisions = asyncio.run(ask())
        assert (sum(each.allowed for each in decisions), sum(each.store_down for each in decisions)) == (300, 0)

    def test_past_a_bound_who_comes_is_refused_and_not_let_through(
        self, permits: Counting, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever is declared for a store that is down: this one is not."""
        monkeypatch.setattr("taskguard.limiter.limiter.QUEUE", 2)
        goes_on = threading.Event()
        permits.gate = goes_on
        made = limiter(permits, rule(), timeout=10)

        async def ask() -> tuple[Decision, list[Decision]]:
            first = [asyncio.create_task(made.aenter(ANN)) for _ in range(2)]
            await asyncio.sleep(0)
            third = await made.aenter(BOB)
            goes_on.set()
            return third, await asyncio.gather(*first)

        third, first = asyncio.run(ask())
        assert (third.allowed, third.crowded, third.store_down, third.retry_after) == (False, True, False, RETRY_DOWN)
        assert all(each.allowed for each in first)
        assert made.crowded_total.total() == 1
        assert made.check(BOB).allowed

    def test_what_is_known_is_answered_on_the_loop(self, permits: Counting) -> None:
        """A refusal that is remembered, and a call that no rule speaks of, wait for no thread."""
        made = limiter(permits, rule(limits="1/minute", endpoint="GET /x"))
        assert [made.check(ANN).allowed for _ in range(2)] == [True, False]
        before = {thread.name for thread in threading.enumerate()}

        async def ask() -> list[bool]:
            return [(await made.aenter(each)).allowed for each in (ANN, Identity(client="ann", endpoint="GET /y"))]

        assert asyncio.run(ask()) == [False, True]
        begun = {thread.name for thread in threading.enumerate()} - before
        assert not [name for name in begun if name.startswith("taskguard-limiter")]
        assert permits.asked == 2

    def test_rules_that_cannot_be_read_yet_are_a_store_that_is_down(self, permits: Counting) -> None:
        """Nothing is let through by mistake where the declaration says refuse."""

        class Mute(MemoryRules):
            def watch(self, changed: Any, *, stop: Any) -> None:
                while not stop():
                    time.sleep(0.01)

        book = RuleBook(Mute())
        made = Limiter(book, permits, on_store_down="refuse", timeout=0.05)
        assert [made.check(ANN).allowed for _ in range(3)] == [False] * 3
        assert permits.asked == 0
        book.close()

    def test_what_to_do_is_declared_and_checked(self, permits: Counting) -> None:
        """A word that means nothing is refused at once."""
        with pytest.raises(ConfigurationError, match="'maybe' is not known"):
            limiter(permits, rule(), on_store_down="maybe")


class TestQueue:
    @pytest.fixture
    def live(self) -> Counting:
        """Permits by the real clock: these tests wait for slots."""
        return Counting()

    def test_who_is_over_a_queueing_limit_waits_for_its_slot(self, live: Counting) -> None:
        """Five calls at twenty a second from a bucket of one: the last comes 200 ms after the first."""
        made = limiter(live, rule(limits=TokenBucket(20, 1, burst=1), over_limit="queue"))
        began = time.monotonic()
        assert all(made.enter(ANN, max_wait=5).allowed for _ in range(5))
        assert 0.19 < time.monotonic() - began < 2.0

    def test_coroutines_come_one_after_the_other(self, live: Counting) -> None:
        """Each in its own slot: no herd, no polling."""
        made = limiter(live, rule(limits=TokenBucket(20, 1, burst=1), over_limit="queue"), timeout=1)

        async def all_of_them() -> list[float]:
            async def one() -> float:
                decision = await made.aenter(ANN, max_wait=5)
                assert decision.allowed
                return time.monotonic()

            return sorted(await asyncio.gather(*(one() for _ in range(6))))

        ended = asyncio.run(all_of_them())
        assert 0.24 < ended[-1] - ended[0] < 2.0
        assert live.asked <= 6 + 2 * 6  # who wakes a hair late moves the next by as much

    @pytest.mark.parametrize("how", ["cancelled", "late"])
    def test_a_slot_that_is_booked_for_nobody_is_given_back_in_a_thread(self, live: Counting, how: str) -> None:
        """The caller was cancelled, or told after the timeout that the store is down, before the answer came."""
        made = limiter(live, rule(limits="1/minute", over_limit="queue"), timeout=0.05 if how == "late" else 10)
        assert made.enter(ANN).allowed
        live.gate = threading.Event()

        async def ask() -> None:
            asking = asyncio.create_task(made.aenter(ANN, max_wait=100))
            assert await asyncio.to_thread(live.reached.wait, 10)
            if how == "cancelled":
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
            else:
                assert (await asking).store_down
            assert live.gate is not None
            live.gate.set()
            assert await asyncio.to_thread(live.returned.wait, 10)

        asyncio.run(ask())
        assert live.returned_in.startswith("taskguard-limiter")

    def test_who_will_not_wait_that_long_is_refused_and_leaves_the_line(self, live: Counting) -> None:
        """The slot is given back, so the next is not delayed by somebody who left."""
        made = limiter(live, rule(limits="1/minute", over_limit="queue"))
        assert made.enter(ANN, max_wait=5).allowed
        waits = []
        for _ in range(3):
            decision = made.enter(ANN, max_wait=0.5)
            assert not decision.allowed
            assert decision.slot_in is not None
            waits.append(decision.slot_in)
        assert max(waits) < 61

    def test_slots_are_told_by_the_stores_clock(self, permits: Counting, clock: ManualClock) -> None:
        """This host's may be wrong: what is unbooked is the slot that was booked, and a task is told its instant."""
        made = limiter(permits, rule(limits=TokenBucket(1, 60, burst=1), over_limit="queue"))
        assert made.enter(ANN).allowed
        waits = [made.enter(ANN, max_wait=0.001).slot_in for _ in range(3)]
        assert waits == [pytest.approx(60, abs=0.1)] * 3
        ahead = booking.set(True)
        try:
            with pytest.raises(RateLimitedError) as caught:
                made.permit(ANN)
        finally:
            booking.reset(ahead)
        assert caught.value.slot_at == pytest.approx(clock() + 60, abs=0.1)

    def test_a_rule_that_refuses_does_not_queue(self, live: Counting) -> None:
        """Whatever its callers would wait."""
        made = limiter(live, rule(limits="1/minute"))
        assert made.enter(ANN, max_wait=50).allowed
        decision = made.enter(ANN, max_wait=50)
        assert (decision.allowed, decision.slot_in) == (False, None)
