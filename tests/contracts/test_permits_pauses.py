"""A downstream that asks to be left alone pauses its circuit, and trips it all the same. On every backend."""

from __future__ import annotations

from taskguard.permits import CircuitView
from taskguard.policies.circuit import CircuitBreaker
from taskguard.ports import PermitStore
from tests.contracts.permits import START, MicroClock, admitted, probed, tell, through, wait_us

BREAKER = CircuitBreaker(minimum_calls=5, wait_in_open=30, backoff=2, max_wait_in_open=100, probe_lease=20)


def pause(permits: PermitStore, until: float) -> CircuitView:
    """What a `Retry-After` does."""
    return permits.force("bank", "forced_open", until=until, who="retry-after", why="it asked to wait")


def test_who_always_asks_to_wait_trips_and_is_probed_and_backed_off_from(
    permits: PermitStore, micros: MicroClock
) -> None:
    """The window goes on through the pauses; then the circuit's own waits hold."""
    for n in range(4):
        assert tell(permits, BREAKER, calls=1, failures=1, generation=2 * n) == "closed"
        assert pause(permits, START + n + 1).state == "forced_open"
        micros.advance(1)
        assert permits.circuit("bank").state == "closed"
    assert tell(permits, BREAKER, calls=1, failures=1, generation=8) == "open"
    view = permits.circuit("bank")
    assert (view.trips, view.why) == (1, "5 of 5 calls failed")
    assert pause(permits, START + 1000) == view, "the circuit's own wait holds"
    assert pause(permits, START + 5) == view
    micros.advance(30)
    answer = through(permits, BREAKER, "probe")
    assert admitted(answer)
    half = permits.circuit("bank")
    assert pause(permits, START + 1000) == half
    assert probed(permits, BREAKER, "probe", "failure", generation=half.generation) == "open"
    assert wait_us(through(permits, BREAKER)) == 60_000_000


def test_calls_under_way_when_the_pause_began_count(permits: PermitStore, micros: MicroClock) -> None:
    """They trip it within the pause, which is no shorter for that; those from before a trip say nothing."""
    assert tell(permits, BREAKER, calls=1, failures=1) == "closed"
    assert pause(permits, START + 50).generation == 1
    assert tell(permits, BREAKER, calls=3, failures=3, generation=0) == "forced_open"
    assert tell(permits, BREAKER, calls=1, failures=1, generation=2) == "forced_open", "of no generation yet"
    assert tell(permits, BREAKER, calls=1, failures=1, generation=1) == "open"
    assert wait_us(through(permits, BREAKER)) == 50_000_000
    micros.advance(50)
    assert admitted(through(permits, BREAKER, "probe"))
    assert probed(permits, BREAKER, "probe", "success", generation=3) == "closed"
    assert tell(permits, BREAKER, calls=50, failures=50, generation=1) == "closed"
    assert permits.circuit("bank").calls == 0


def test_the_longer_pause_and_an_operators_word_hold(permits: PermitStore) -> None:
    """A shorter pause, and one that meets what an operator forced, changes nothing."""
    longer = pause(permits, START + 50)
    assert pause(permits, START + 20) == longer
    assert pause(permits, START + 60).until == START + 60
    forced = permits.force("bank", "forced_closed", until=None, who="eve", why="mine")
    assert pause(permits, START + 90) == forced
    assert permits.force("bank", "closed", until=None, who="eve", why="").state == "closed"
    assert tell(permits, BREAKER, calls=50, failures=50, generation=forced.generation) == "closed"
