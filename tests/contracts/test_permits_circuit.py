"""The circuit: one window, one generation, one probe budget for the whole fleet. On every backend."""

from __future__ import annotations

import pytest

from taskguard.errors import ConfigurationError
from taskguard.permits import Ask, CircuitAsk, CircuitView, Outcomes, Permit, ProbeOutcome, RateAsk, Refusal
from taskguard.policies.circuit import CircuitBreaker
from taskguard.policies.rates import TokenBucket
from taskguard.ports import PermitStore
from tests.contracts.permits import START, MicroClock, admitted, probed, tell, through, wait_us

BREAKER = CircuitBreaker(minimum_calls=10, wait_in_open=30, backoff=2, max_wait_in_open=100, probe_lease=20)


def tripped(permits: PermitStore, policy: CircuitBreaker = BREAKER) -> None:
    """Open the circuit, by its first generation."""
    assert tell(permits, policy, calls=10, failures=10) == "open"


def half_open(permits: PermitStore, micros: MicroClock, policy: CircuitBreaker = BREAKER) -> None:
    """Open the circuit, wait, and send "first" as a probe. The generation is 2 then."""
    tripped(permits, policy)
    micros.advance(30)
    answer = through(permits, policy, "first")
    assert isinstance(answer, Permit)
    assert answer.probe


def test_a_circuit_nobody_reported_to_is_closed(permits: PermitStore) -> None:
    """It lets calls through, and asking leaves nothing behind."""
    answer = through(permits, BREAKER)
    assert isinstance(answer, Permit)
    assert (answer.probe, answer.circuit) == (False, CircuitView(name="bank"))
    assert permits.circuit("bank") == CircuitView(name="bank")
    assert permits.circuits() == []


def test_many_processes_that_see_few_calls_each_trip_together(permits: PermitStore) -> None:
    """Ten reports of one call: below the minimum nothing trips, at it the fleet's failures count."""
    for n in range(9):
        assert tell(permits, BREAKER, calls=1, failures=n % 2) == "closed"
    assert tell(permits, BREAKER, calls=1, failures=1) == "open"
    view = permits.circuit("bank")
    assert (view.state, view.generation, view.trips, view.until) == ("open", 1, 1, START + 30)
    assert view.why == "5 of 10 calls failed"
    refusal = through(permits, BREAKER)
    assert isinstance(refusal, Refusal)
    assert (refusal.by, refusal.name, refusal.retry_after, refusal.slot_in) == ("circuit", "bank", 30.0, None)
    assert refusal.circuit == view


def test_one_healthy_caller_does_not_mask_anothers_failures(permits: PermitStore) -> None:
    """A share of all calls decides: successes in between do not reset it, and below the threshold it stays closed."""
    policy = CircuitBreaker(failure_rate_threshold=0.3, minimum_calls=10)
    for _ in range(7):
        assert tell(permits, policy, calls=1) == "closed"
    for _ in range(2):
        assert tell(permits, policy, calls=1, failures=1) == "closed"
    assert tell(permits, policy, calls=1) == "closed"
    assert permits.circuit("bank").calls == 10
    assert tell(permits, policy, calls=1, failures=1) == "closed"
    assert tell(permits, policy, calls=2, failures=1) == "open"


def test_slow_calls_trip_by_their_own_threshold(permits: PermitStore) -> None:
    """Where one is declared; else they do not count."""
    assert tell(permits, BREAKER, calls=100, slow=100) == "closed"
    policy = CircuitBreaker(slow_call_rate_threshold=0.8, slow_call_duration=1)
    assert tell(permits, policy, calls=100, slow=59) == "closed"
    assert tell(permits, policy, calls=5, slow=5) == "open"
    assert permits.circuit("bank").why == "164 of 205 calls were slow"


def test_a_time_window_forgets_what_is_older_than_it(permits: PermitStore, micros: MicroClock) -> None:
    """Sixty seconds, in ten parts: failures of the part that has left do not trip."""
    micros.advance(20)  # an edge of the window's parts
    assert tell(permits, BREAKER, calls=9, failures=9) == "closed"
    micros.advance(59.999999)
    assert permits.circuit("bank").calls == 9
    micros.advance(us=1)
    assert tell(permits, BREAKER, calls=1, failures=1) == "closed"
    assert permits.circuit("bank").calls == 1


def test_a_time_window_moves_in_tenths(permits: PermitStore, micros: MicroClock) -> None:
    """What was reported in one tenth leaves together."""
    policy = CircuitBreaker(minimum_calls=100, window_size=10)
    for _ in range(12):
        tell(permits, policy, calls=1, failures=1)
        micros.advance(0.5)
    view = permits.circuit("bank")
    assert (view.calls, view.failures) == (12, 12)
    micros.advance(3.999999)
    assert permits.circuit("bank").calls == 12
    micros.advance(us=1)
    assert permits.circuit("bank").calls == 10
    micros.advance(5)
    assert permits.circuit("bank").calls == 0


def test_a_count_window_holds_the_last_calls(permits: PermitStore, micros: MicroClock) -> None:
    """Twenty calls, however long ago; a report too many pushes the oldest out."""
    policy = CircuitBreaker(window="count", window_size=20, minimum_calls=20)
    for _ in range(9):
        assert tell(permits, policy, calls=1, failures=1) == "closed"
    micros.advance(86_400)
    for _ in range(20):
        assert tell(permits, policy, calls=1) == "closed"
    view = permits.circuit("bank")
    assert (20 <= view.calls <= 22, view.failures <= 2) == (True, True)
    assert tell(permits, policy, calls=30, failures=14) == "closed", "a report larger than the window is the window"
    assert permits.circuit("bank").calls == 30
    assert tell(permits, policy, calls=20, failures=20) == "open"


def test_outcomes_from_before_the_trip_say_nothing(permits: PermitStore, micros: MicroClock) -> None:
    """Late successes do not close what they began before, late failures do not open it again."""
    half_open(permits, micros)
    assert tell(permits, BREAKER, calls=50, generation=0) == "half_open"
    assert tell(permits, BREAKER, calls=50, failures=50, generation=0) == "half_open"
    assert probed(permits, BREAKER, "first", "success", generation=2) == "closed"
    assert tell(permits, BREAKER, calls=50, failures=50, generation=2) == "closed"
    view = permits.circuit("bank")
    assert (view.generation, view.calls) == (3, 0)
    assert tell(permits, BREAKER, calls=50, failures=50, generation=3) == "open"


def test_one_probe_at_a_time(permits: PermitStore, micros: MicroClock) -> None:
    """The first who asks after the wait is it; all others are refused until it has spoken."""
    tripped(permits)
    micros.advance(us=29_999_999)
    assert wait_us(through(permits, BREAKER)) == 1
    micros.advance(us=1)
    answers = [through(permits, BREAKER, f"caller-{n}") for n in range(16)]
    assert [isinstance(answer, Permit) and answer.probe for answer in answers] == [True] + 15 * [False]
    assert wait_us(answers[1]) == 20_000_000
    assert permits.circuit("bank").state == "half_open"
    again = through(permits, BREAKER, "caller-0")
    assert isinstance(again, Permit)
    assert again.probe, "an answer that was lost is given again"


def test_a_probe_that_dies_gives_way_when_its_lease_ends(permits: PermitStore, micros: MicroClock) -> None:
    """The next one goes then; what the slow one says after all counts, once, and a stranger's word never."""
    half_open(permits, micros)
    micros.advance(us=19_999_999)
    assert not admitted(through(permits, BREAKER, "second"))
    micros.advance(us=1)
    assert admitted(through(permits, BREAKER, "second"))
    assert probed(permits, BREAKER, "stranger", "failure", generation=2) == "half_open"
    assert probed(permits, BREAKER, "first", "success", generation=2) == "closed"
    assert probed(permits, BREAKER, "second", "failure", generation=2) == "closed"


def test_a_late_end_of_a_probe_is_counted_once(permits: PermitStore, micros: MicroClock) -> None:
    """Two must succeed: the same one told twice is one; its failure would open it."""
    policy = CircuitBreaker(success_threshold=2, probe_lease=20)
    half_open(permits, micros, policy)
    micros.advance(21)
    assert admitted(through(permits, policy, "second"))
    for _ in range(2):
        assert probed(permits, policy, "first", "success", generation=2) == "half_open"
    assert not admitted(through(permits, policy, "third")), "the second is under way"
    assert probed(permits, policy, "second", "failure", generation=2) == "open"


def test_a_probe_that_asks_again_keeps_its_place(permits: PermitStore, micros: MicroClock) -> None:
    """Its lease begins anew."""
    half_open(permits, micros)
    micros.advance(15)
    assert admitted(through(permits, BREAKER, "first"))
    micros.advance(15)
    assert wait_us(through(permits, BREAKER, "second")) == 5_000_000


def test_a_probe_that_is_ignored_gives_its_place_back(permits: PermitStore, micros: MicroClock) -> None:
    """Neither success nor failure: the next probe goes at once."""
    half_open(permits, micros)
    assert probed(permits, BREAKER, "first", "ignored", generation=2) == "half_open"
    assert admitted(through(permits, BREAKER, "second"))
    assert not admitted(through(permits, BREAKER, "third"))


def test_as_many_probes_must_succeed_as_declared(permits: PermitStore, micros: MicroClock) -> None:
    """Two at once, three successes; one that failed opens it for all."""
    policy = CircuitBreaker(probes_in_half_open=2, success_threshold=3)
    half_open(permits, micros, policy)
    assert admitted(through(permits, policy, "second"))
    assert not admitted(through(permits, policy, "third"))
    assert probed(permits, policy, "first", "success", generation=2) == "half_open"
    assert probed(permits, policy, "first", "success", generation=2) == "half_open", "told twice, counted once"
    assert admitted(through(permits, policy, "third"))
    assert probed(permits, policy, "second", "success", generation=2) == "half_open"
    assert probed(permits, policy, "third", "success", generation=2) == "closed"
    view = permits.circuit("bank")
    assert (view.trips, view.closed_at) == (0, START + 30)
    assert admitted(through(permits, policy))


def test_the_wait_grows_while_probes_fail_and_is_bounded(permits: PermitStore, micros: MicroClock) -> None:
    """30, 60, 100 and no more; closing begins anew."""
    tripped(permits)
    generation = 1
    for trips, wait in enumerate([30, 60, 100, 100], start=1):
        view = permits.circuit("bank")
        assert (view.state, view.trips, view.generation) == ("open", trips, generation)
        assert wait_us(through(permits, BREAKER)) == wait * 1_000_000
        micros.advance(wait)
        assert admitted(through(permits, BREAKER, "probe"))
        if trips < 4:
            assert probed(permits, BREAKER, "probe", "failure", generation=generation + 1) == "open"
            generation += 2
    assert probed(permits, BREAKER, "probe", "success", generation=generation + 1) == "closed"
    assert tell(permits, BREAKER, calls=10, failures=10, generation=generation + 2) == "open"
    assert wait_us(through(permits, BREAKER)) == 30_000_000


def test_a_probe_is_not_given_where_the_rate_refuses(permits: PermitStore, micros: MicroClock) -> None:
    """All or nothing: the circuit stays as it was, and whoever comes next with a permit is the probe."""
    rate = RateAsk("bank", TokenBucket(1))
    assert admitted(permits.admit(Ask(rates=(rate,))))
    tripped(permits)
    micros.advance(30)
    assert admitted(permits.admit(Ask(rates=(rate,))))
    both = Ask(rates=(rate,), circuit=CircuitAsk("bank", BREAKER, "a"))
    refusal = permits.admit(both)
    assert isinstance(refusal, Refusal)
    assert refusal.by == "rate"
    assert permits.circuit("bank").state == "open"
    micros.advance(1)
    answer = permits.admit(both)
    assert isinstance(answer, Permit)
    assert answer.probe


def test_an_open_circuit_spends_no_permit(permits: PermitStore) -> None:
    """It is asked first."""
    tripped(permits)
    rate = RateAsk("bank", TokenBucket(1))
    for _ in range(3):
        refusal = permits.admit(Ask(rates=(rate,), circuit=CircuitAsk("bank", BREAKER, "a"), book=True))
        assert isinstance(refusal, Refusal)
        assert (refusal.by, refusal.slot_in) == ("circuit", None)
    assert admitted(permits.admit(Ask(rates=(rate,))))


@pytest.mark.parametrize("state", ["forced_open", "forced_closed", "disabled"])
def test_an_operators_word_holds_until_it_ends(permits: PermitStore, micros: MicroClock, state: str) -> None:
    """Whatever is reported meanwhile; then the circuit is closed and new. Who and why are kept."""
    view = permits.force("bank", state, until=START + 60, who="eve", why="maintenance")  # type: ignore[arg-type]
    assert (view.state, view.until, view.who, view.why) == (state, START + 60, "eve", "maintenance")
    assert permits.circuit("bank") == view
    answer = through(permits, BREAKER)
    if state == "forced_open":
        assert wait_us(answer) == 60_000_000
    else:
        assert admitted(answer)
    assert tell(permits, BREAKER, calls=50, failures=50, generation=view.generation) == state
    micros.advance(us=59_999_999)
    assert permits.circuit("bank").state == state
    micros.advance(us=1)
    after = permits.circuit("bank")
    assert (after.state, after.generation, after.who) == ("closed", view.generation + 1, "")
    assert admitted(through(permits, BREAKER))
    assert tell(permits, BREAKER, calls=50, failures=50, generation=view.generation) == "closed"
    assert tell(permits, BREAKER, calls=50, failures=50, generation=view.generation + 1) == "open"


def test_a_circuit_forced_for_good_stays_until_it_is_taken_back(permits: PermitStore, micros: MicroClock) -> None:
    """No waiting helps, and none is told; closing begins anew."""
    permits.force("bank", "forced_open", until=None, who="eve", why="broken")
    micros.advance(400 * 86_400)
    refusal = through(permits, BREAKER)
    assert isinstance(refusal, Refusal)
    assert refusal.retry_after is None
    view = permits.force("bank", "closed", until=None, who="adam", why="mended")
    assert (view.state, view.closed_at, view.who) == ("closed", START + 400 * 86_400, "adam")
    assert admitted(through(permits, BREAKER))


@pytest.mark.parametrize("state", ["open", "half_open", "shut"])
def test_a_state_that_cannot_be_forced_is_refused(permits: PermitStore, state: str) -> None:
    """It is said which can be."""
    with pytest.raises(
        ConfigurationError, match=f"circuit bank: '{state}' is no state to force; use one of forced_open"
    ):
        permits.force("bank", state, until=None, who="eve", why="")  # type: ignore[arg-type]


def test_closing_by_hand_ends_an_open_circuit_and_its_probes(permits: PermitStore, micros: MicroClock) -> None:
    """The probe under way then says nothing."""
    half_open(permits, micros)
    assert permits.force("bank", "closed", until=None, who="eve", why="it is back").generation == 3
    assert probed(permits, BREAKER, "first", "failure", generation=2) == "closed"


def test_an_open_circuit_does_not_outlive_a_clock_that_is_set_back(permits: PermitStore, micros: MicroClock) -> None:
    """After a failover to a server an hour behind, it is open for its longest wait at most."""
    tripped(permits)
    micros.advance(-3600)
    assert wait_us(through(permits, BREAKER)) == 100_000_000
    micros.advance(99)
    assert not admitted(through(permits, BREAKER))
    micros.advance(1)
    assert admitted(through(permits, BREAKER))


def test_all_circuits_are_listed_by_name(permits: PermitStore) -> None:
    """As they stand, whatever they are called."""
    names = ["a b", "bank", "{x}:y", "ä\n"]
    for name in names:
        permits.report(name, BREAKER, Outcomes(0, 1, 1, 0))
    permits.force("bank", "disabled", until=None, who="eve", why="")
    assert [view.name for view in permits.circuits()] == sorted(names)
    assert [view.state for view in permits.circuits()] == ["closed", "disabled", "closed", "closed"]
    assert permits.circuits()[0] == permits.circuit("a b")


def test_a_watcher_is_told_each_state_that_lasts(permits: PermitStore, micros: MicroClock) -> None:
    """From the one it finds, through a trip and a probe, to closed again; each before the next is made."""
    steps = iter(
        [
            lambda: through(permits, BREAKER, "first") if not micros.advance(30) else None,
            lambda: permits.report("bank", BREAKER, Outcomes(2), ProbeOutcome("first", "success")),
        ]
    )
    tripped(permits)
    seen: list[tuple[str, int]] = []

    def changed(view: CircuitView) -> None:
        seen.append((view.state, view.generation))
        if (step := next(steps, None)) is not None:
            step()

    permits.watch_circuits(changed, stop=lambda: len(seen) == 3)
    assert seen == [("open", 1), ("half_open", 2), ("closed", 3)]
