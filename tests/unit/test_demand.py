"""Demand as a process counts it, its warnings, and the report of who is near or over."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from taskguard.errors import ConfigurationError, StoreUnavailable
from taskguard.events import Event
from taskguard.limiter.demand import HELD, TOP, Demand
from taskguard.limiter.headroom import Headroom, headroom
from taskguard.limiter.limiter import Limiter
from taskguard.limiter.rulebook import FixedRules
from taskguard.policies import LeakyBucket
from taskguard.rules import Identity, Rule, RuleSet
from taskguard.stores.memory import MemoryPermits
from taskguard.stores.memory.demand import MemoryDemand
from taskguard.traffic import OTHER, WINDOW, Asked, Counted
from tests.clocks import ManualClock

EACH = Rule(id="each", client="*", limits="100/minute")
ANN = Identity(client="ann", endpoint="GET /x")


class Store(MemoryDemand):
    """A store that may be away, and counts its batches."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.batches: list[int] = []
        self.away = False

    def add(self, asked: Any) -> list[Counted]:
        if self.away:
            raise StoreUnavailable("store does not answer; wait")
        self.batches.append(len(asked))
        return super().add(asked)


@pytest.fixture
def store(clock: ManualClock) -> Store:
    """An empty one."""
    return Store(clock)


@pytest.fixture
def events() -> list[Event]:
    """What was told."""
    return []


def make(store: Store, *rules: Rule, **options: Any) -> Demand:
    """Demand by these rules, which is flushed when the test says so."""
    demand = Demand(store, rules=lambda: RuleSet.of(*(rules or (EACH,))), **options)
    demand._tended, demand.due_at = True, 0.0  # the tending thread is not needed
    return demand


def sums(store: Store, clock: ManualClock) -> dict[tuple[str, str], tuple[float, float]]:
    """What the store has now."""
    return {(each.client, each.rule): (each.accepted, each.refused) for each in store.read(since=clock())}


class TestCounting:
    def test_calls_are_added_in_one_batch(self, store: Store, clock: ManualClock) -> None:
        """A thousand calls are one round trip."""
        demand = make(store)
        for n in range(1000):
            demand.count(ANN, (EACH,), 1.0, refused_by=EACH if n % 4 == 0 else None)
        demand.flush()
        assert store.batches == [1]
        assert sums(store, clock) == {("ann", "each"): (750, 250)}

    def test_the_busiest_are_told_apart_and_the_rest_is_counted_together(
        self, store: Store, clock: ManualClock
    ) -> None:
        """A flood of made-up names hides nobody who matters, and no call is lost."""
        demand = make(store)
        for n in range(10_000):
            demand.count(Identity(client=f"bot{n}"), (EACH,), 1.0)
            if n < 500:
                demand.count(ANN, (EACH,), 1.0)
        assert len(demand._held) <= HELD + 1
        demand.flush()
        found = sums(store, clock)
        assert found["ann", "each"] == (500, 0)
        assert len(found) <= TOP + 1
        assert sum(accepted for accepted, _ in found.values()) == 10_500
        assert (OTHER, OTHER) in found

    def test_what_could_not_be_added_is_held(self, store: Store, clock: ManualClock) -> None:
        """Until the store is back; bounded all the same."""
        demand = make(store)
        store.away = True
        for _ in range(3):
            demand.count(ANN, (EACH,), 1.0)
            demand.tend()
        store.away = False
        demand.count(ANN, (EACH,), 1.0)
        demand.flush()
        assert sums(store, clock) == {("ann", "each"): (4, 0)}

    def test_the_tending_thread_adds_it_soon(self, store: Store, clock: ManualClock) -> None:
        """Without anybody waiting."""
        added = threading.Event()

        class Telling(Store):
            def add(self, asked: Any) -> list[Counted]:
                try:
                    return super().add(asked)
                finally:
                    added.set()

        telling = Telling(clock)
        demand = Demand(telling, rules=RuleSet)
        for _ in range(2):
            demand.count(ANN, (), 1.0)
            assert added.wait(10)
            added.clear()
        assert sums(telling, clock) == {("ann", ""): (2, 0)}

    def test_a_child_does_not_add_what_its_parent_counted(self, store: Store, clock: ManualClock) -> None:
        """That would be twice."""
        demand = make(store)
        demand.count(ANN, (EACH,), 1.0)
        demand.after_fork()
        demand.flush()
        assert sums(store, clock) == {}

    def test_every_rule_that_let_a_call_in_counts_it(self, store: Store, clock: ManualClock) -> None:
        """And a refusal counts where it was refused."""
        everybody = Rule(id="all", limits="9/second")
        demand = make(store)
        demand.count(ANN, (EACH, everybody), 2.0)
        demand.count(ANN, (), 3.0, refused_by=everybody)
        demand.flush()
        assert sums(store, clock) == {("ann", "each"): (2, 0), ("ann", "all"): (2, 3)}


class TestWarnings:
    def limiter(self, store: Store, clock: ManualClock, events: list[Event], *rules: Rule) -> Limiter:
        """Everything together."""
        demand = make(store, *rules, notify=events.append)
        return Limiter(FixedRules(*rules), MemoryPermits(clock), demand=demand, notify=events.append)

    @pytest.mark.parametrize(
        "limits",
        [f"10/hour algorithm={each}" for each in ("token_bucket", "fixed_window", "sliding_window", "sliding_log")],
    )
    def test_a_warning_comes_before_the_limit_is_reached(
        self, store: Store, clock: ManualClock, events: list[Event], limits: str
    ) -> None:
        """At the eighth call of ten, once, and before any refusal."""
        made = self.limiter(store, clock, events, Rule(id="each", client="*", limits=limits))
        allowed = []
        for _ in range(12):
            allowed.append(made.check(ANN).allowed)
            if len(allowed) == 7:
                assert events == []
            if len(allowed) == 8:
                assert [event.name for event in events] == ["limit_near"]
        assert allowed == [True] * 10 + [False] * 2
        assert [event.name for event in events] == ["limit_near", "rate_limited", "rate_limited"]
        assert events[0].key == "ann"
        assert events[0].detail.startswith("GET /x: rule each, 10/hour")
        assert events[0].detail.endswith("2 of 10 left")

    def test_the_fleets_sum_warns_where_each_process_sees_little(
        self, store: Store, clock: ManualClock, events: list[Event]
    ) -> None:
        """Two processes with 45 calls each of a hundred a minute: whoever adds second knows."""
        one, two = (make(store, notify=events.append) for _ in range(2))
        for demand in (one, two):
            for _ in range(45):
                demand.count(ANN, (EACH,), 1.0)
            assert events == []
            demand.flush()
        assert [event.name for event in events] == ["limit_near"]
        assert "90 in the minute, by the whole fleet" in events[0].detail

    def test_a_client_is_judged_by_all_its_endpoints(
        self, store: Store, clock: ManualClock, events: list[Event]
    ) -> None:
        """The limit counts them together, so the warning does."""
        demand = make(store, notify=events.append)
        for endpoint in ("GET /a", "GET /b"):
            for _ in range(45):
                demand.count(Identity(client="ann", endpoint=endpoint), (EACH,), 1.0)
        demand.flush()
        assert len(events) == 1

    def test_a_warning_comes_again_in_the_next_window_and_not_before(self, store: Store, clock: ManualClock) -> None:
        """Neither a flood nor silence for ever."""
        events: list[Event] = []
        ticks = ManualClock(0.0)
        demand = make(store, notify=events.append, clock=ticks)
        for expected in (1, 1, 2):
            demand.count(ANN, (EACH,), 90.0)
            demand.flush()
            assert len(events) == expected
            if expected == 1 and store.batches == [1, 1]:
                ticks.advance(WINDOW)
                clock.advance(WINDOW)

    def test_the_share_is_declared(self, store: Store, clock: ManualClock, events: list[Event]) -> None:
        """Half, say."""
        demand = make(store, notify=events.append, near=0.5)
        demand.count(ANN, (EACH,), 49.0)
        demand.flush()
        assert events == []
        demand.count(ANN, (EACH,), 1.0)
        demand.flush()
        assert len(events) == 1

    @pytest.mark.parametrize("near", [0, 1.5, -1, True, "much"])
    def test_a_share_that_is_none_is_refused(self, store: Store, near: Any) -> None:
        """Where it is declared."""
        with pytest.raises(ConfigurationError, match=r"Demand\.near"):
            make(store, near=near)

    def test_limits_that_one_call_empties_do_not_warn_by_what_is_left(
        self, store: Store, clock: ManualClock, events: list[Event]
    ) -> None:
        """A paced limit has always nothing left."""
        made = self.limiter(store, clock, events, Rule(id="each", client="*", limits=(LeakyBucket(100, 1),)))
        assert made.check(ANN).allowed
        assert events == []


def counted(n: int, accepted: float, refused: float = 0, **fields: Any) -> Counted:
    """The sums of the n-th window."""
    base = {"client": "ann", "endpoint": "GET /x", "rule": "each"} | fields
    return Counted(window_at=n * WINDOW, accepted=accepted, refused=refused, **base)


def row(*found: Counted, limits: str = "100/minute", **fields: Any) -> Headroom:
    """The one row of the report."""
    [only] = headroom(found, RuleSet.of(Rule(id="each", client="*", limits=limits, **fields)))
    return only


class TestReport:
    def test_who_is_far_from_the_limit_is_ok(self) -> None:
        """Half of it."""
        found = row(counted(1, 50), counted(2, 10))
        assert (found.state, found.share, found.since, found.needed) == ("ok", 0.5, None, None)
        assert (found.client, found.endpoint, found.rule, found.limit) == ("ann", "GET /x", "each", "100/minute")

    def test_who_is_near_is_told_since_when(self) -> None:
        """Since the first window of the stretch that goes on; a short rest does not end it, a long one does."""
        found = row(counted(1, 90), counted(20, 85), counted(21, 10), counted(23, 95))
        assert (found.state, found.share, found.since) == ("near", 0.95, 20 * WINDOW)

    def test_a_stretch_that_has_ended_has_no_since(self) -> None:
        """Its age would grow for ever after demand has stopped. A rest that does not end one is five windows, or a
        period that is longer."""
        rules, found = RuleSet.of(Rule(id="each", client="*", limits="100/minute; 100/hour")), [counted(1, 150)]
        ages = {
            n: {row.limit: row.since for row in headroom(found, rules, now=(n + 0.9) * WINDOW)}
            for n in (1, 6, 7, 61, 62)
        }
        assert ages == {
            1: {"100/minute": WINDOW, "100/hour": WINDOW},
            6: {"100/minute": WINDOW, "100/hour": WINDOW},
            7: {"100/minute": None, "100/hour": WINDOW},
            61: {"100/minute": None, "100/hour": WINDOW},
            62: {"100/minute": None, "100/hour": None},
        }
        assert [row.state for row in headroom(found, rules, now=1e6)] == ["over", "over"]

    def test_who_is_over_is_told_what_would_have_served_all(self) -> None:
        """Demand is accepted and refused together."""
        found = row(counted(1, 100, 150), counted(2, 20))
        assert (found.state, found.share, found.accepted, found.refused) == ("over", 2.5, 120, 150)
        assert (found.since, found.needed) == (WINDOW, "250/minute")

    @pytest.mark.parametrize(
        ("limits", "windows", "needed"),
        [
            ("10/second", [(600, 300)], "15/second"),
            ("10/second", [(10, 40)], "50/second"),
            ("10/second burst=20", [(600, 600)], "20/second burst=40"),
            ("10/second algorithm=sliding_window", [(600, 301)], "16/second algorithm=sliding_window"),
            ("100/minute", [(0, 250)], "250/minute"),
            ("100/hour", [(60, 0), (40, 40)], "140/hour"),
            ("100/minute", [(60, 5)], "110/minute"),
            ("1000000/second", [(0, 9e9)], None),
        ],
    )
    def test_the_limit_that_is_needed(self, limits: str, windows: list[tuple[float, float]], needed: str) -> None:
        """In the notation of rules, in two figures, rounded up."""
        assert row(*(counted(n, *each) for n, each in enumerate(windows)), limits=limits).needed == needed

    def test_endpoints_that_a_limit_counts_together_are_one_row(self) -> None:
        """And named only where there is one."""
        found = row(counted(1, 60, endpoint="GET /x"), counted(1, 60, endpoint="GET /y"))
        assert (found.client, found.endpoint, found.share) == ("ann", "", 1.2)

    def test_clients_that_a_limit_counts_apart_are_rows_of_their_own_the_worst_first(self) -> None:
        """Each with its share."""
        rules = RuleSet.of(Rule(id="each", client="*", limits="100/minute; 1000/day"))
        found = headroom([counted(1, 20), counted(1, 90, client="bob")], rules)
        assert [(each.client, each.limit, each.share) for each in found] == [
            ("bob", "100/minute", 0.9),
            ("ann", "100/minute", 0.2),
            ("bob", "1000/day", 0.09),
            ("ann", "1000/day", 0.02),
        ]

    def test_a_long_period_sums_its_windows(self) -> None:
        """An hour's limit over minutes; what is older counts no more."""
        found = row(*(counted(n, 10) for n in range(120)), limits="1000/hour")
        assert found.share == pytest.approx(0.6)

    def test_what_belongs_to_no_rule_has_no_row(self) -> None:
        """Rules that are gone, calls that none applied to, and what was too much to be told apart."""
        odd = [counted(1, 9, rule=name) for name in ("", "gone", OTHER)]
        assert headroom(odd, RuleSet.of(EACH)) == []

    def test_a_row_is_json(self) -> None:
        """For scripts."""
        assert row(counted(1, 50)).as_dict()["limit"] == "100/minute"


def test_asked_is_a_value() -> None:
    """Two of the same are equal."""
    assert Asked(client="a", endpoint="b", rule="c") == Asked(client="a", endpoint="b", rule="c")
