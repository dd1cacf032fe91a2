"""The gate's ways out: each one atomic step in the store, written before it is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskguard import errors
from taskguard.custody import Hold, Unique
from taskguard.gate import Custody, Terms
from taskguard.headers import next_attempt
from taskguard.record import Attempt, Reason, State
from taskguard.settlement import Completed, DeadLettered, Deferred, Discarded, Drop, Retried
from tests.clocks import ManualClock
from tests.contracts.messages import LEASE, message
from tests.unit.gatehouse import TERMS, House

# -- the ways out ------------------------------------------------------------------------------------------------------


def test_a_retry_rests_until_its_moment(house: House) -> None:
    """The next delivery is in the store; the history names the error and the worker."""
    following, due_at = next_attempt(message(), retries=1), house.clock.at + 5
    settled = house.gate.retry(house.custody(message()), following, due_at=due_at, error=OSError("bank down"))
    assert isinstance(settled, Retried)
    record = house.record(message())
    assert (record.state, record.due_at, record.sequence, record.wire) == (
        State.PENDING,
        due_at,
        1,
        following.to_wire(),
    )
    assert [(a.worker, a.outcome, a.error) for a in record.attempts] == [("worker-1", "retry", "OSError: bank down")]


@pytest.mark.parametrize("early_by", [0.0, 1.0])
def test_a_retry_that_could_only_start_too_late_is_buried_now(house: House, early_by: float) -> None:
    """Nobody waits for what will not be run; the error behind it is kept as the cause."""
    first = message().replace(deadline_at=house.clock.at + 10)
    following = next_attempt(first, retries=1)
    cause = OSError("bank down")
    settled = house.gate.retry(house.custody(first), following, due_at=house.clock.at + 10 + early_by, error=cause)
    assert isinstance(settled, DeadLettered)
    assert settled.failure.reason is Reason.EXPIRED
    assert "would start after the deadline" in settled.failure.message
    assert settled.error is not None
    assert settled.error.__cause__ is cause


def test_a_deferral_costs_no_attempt(house: House) -> None:
    """The message rests, and its next run is the first still."""
    following = next_attempt(message(), retries=0)
    settled = house.gate.defer(house.custody(message()), following, due_at=house.clock.at + 5, why="rate")
    assert settled == Deferred(house.clock.at + 5, "rate")
    house.clock.advance(5)
    assert house.custody(following, holder="worker-2/b").attempt == 1


def test_a_crash_is_counted_and_due_at_once(house: House) -> None:
    """A run that tried to take its process down spends no retry, but a crash; its history says what it was."""
    custody = house.custody(message())
    leaving = SystemExit(3)
    assert house.gate.crash(custody, leaving) == Retried(house.clock.at, leaving)
    record = house.record(message())
    assert (record.state, record.crashes, record.due_at) == (State.PENDING, 1, house.clock.at)
    assert record.wire == message().to_wire()
    assert [(attempt.outcome, attempt.error) for attempt in record.attempts] == [("crash", "SystemExit: 3")]
    assert house.told == ["crash"]
    assert house.custody(message(), holder="worker-2/b").attempt == 2


def test_the_last_crash_makes_the_next_delivery_poison(house: House) -> None:
    """``max_crashes`` bounds it as it bounds processes that were killed."""
    for number in range(TERMS.max_crashes):
        house.gate.crash(house.custody(message(), holder=f"worker-1/{number}"), SystemExit(3))
    settled = house.enter(message(), holder="worker-1/last")
    assert isinstance(settled, DeadLettered)
    assert settled.failure.reason is Reason.POISON
    assert house.record(message()).crashes == TERMS.max_crashes


def test_a_crash_of_a_run_that_lost_its_lease_is_not_counted_twice(house: House) -> None:
    """The lease's end has counted it; the newer run is left alone."""
    custody = house.custody(message())
    house.clock.advance(LEASE + 1)
    newer = house.custody(message(), holder="worker-2/b")
    assert house.gate.crash(custody, SystemExit(3)) == Discarded(Drop.CUSTODY_LOST)
    assert custody.lost
    record = house.record(message())
    assert (record.state, record.token, record.crashes) == (State.RUNNING, newer.token, 1)


def test_a_dead_letter_keeps_the_traceback(house: House) -> None:
    """Reason, type, message and where it was raised."""
    try:
        raise LookupError("no such card")
    except LookupError as exc:
        settled = house.gate.bury(house.custody(message()), Reason.PERMANENT_ERROR, exc)
    assert isinstance(settled, DeadLettered)
    assert (settled.failure.error_type, settled.failure.message) == ("LookupError", "no such card")
    assert "test_a_dead_letter_keeps_the_traceback" in settled.failure.traceback


EXITS = {
    "complete": lambda gate, custody: gate.complete(custody, 1, result=b"1"),
    "retry": lambda gate, custody: gate.retry(
        custody, next_attempt(custody.envelope, retries=1), due_at=0.0, error=None
    ),
    "defer": lambda gate, custody: gate.defer(
        custody, next_attempt(custody.envelope, retries=0), due_at=0.0, why="rate"
    ),
    "bury": lambda gate, custody: gate.bury(custody, Reason.PERMANENT_ERROR, ValueError()),
    "expire": lambda gate, custody: gate.expire(custody),
    "discard": lambda gate, custody: gate.discard(custody, Drop.IGNORED),
}


@pytest.mark.parametrize("exit", EXITS)
def test_a_run_that_lost_its_lease_writes_nothing(house: House, exit: str) -> None:
    """Another run holds the key: the loser's outcome is discarded and said so."""
    loser = house.custody(message())
    house.clock.advance(LEASE + 1)
    winner = house.custody(message(), holder="worker-2/b")
    before = house.record(message())
    assert EXITS[exit](house.gate, loser) == Discarded(Drop.CUSTODY_LOST)
    assert house.record(message()) == before
    assert house.told[-1] == "custody_lost"
    assert loser.lost
    assert winner.token > loser.token


@pytest.mark.parametrize("exit", ["complete", "expire", "discard"])
def test_a_run_called_directly_has_no_way_out(house: House, exit: str) -> None:
    """There is nothing to settle; the mistake is named."""
    with pytest.raises(errors.TaskguardError, match="called directly"):
        EXITS[exit](house.gate, Custody(message(), "shop", "direct"))


def test_whether_a_run_holds_is_asked_once_it_is_lost_no_more(house: House) -> None:
    """What is lost stays lost, also when the store is away."""
    custody = house.custody(message())
    assert house.gate.holds(custody)
    house.clock.advance(LEASE + 1)
    house.custody(message(), holder="worker-2/b")
    assert not house.gate.holds(custody)
    house.store.silent_for = 99
    assert not house.gate.holds(custody)


def test_a_direct_call_is_never_lost(house: House) -> None:
    """Token 0 stands for no custody at all; the store is not asked."""
    house.store.silent_for = 99
    assert house.gate.holds(Custody(message(), "shop", "direct"))


# -- unique names ------------------------------------------------------------------------------------------------------


def reserved(house: House) -> bool:
    """Whether the key's name is held, asked as a second sender would."""
    second = message(task_id="task-2")
    return house.store.schedule(second, due_at=house.clock.at + 99, unique=Unique(second.id, 60.0)) != "task-2"


@pytest.mark.parametrize("exit", ["complete", "bury", "discard"])
def test_a_unique_name_held_until_the_end_is_let_go_by_every_end(house: House, exit: str) -> None:
    """Success, dead letter and discard alike: a dead letter must not block the key."""
    terms = Terms(max_crashes=3, retention=60.0, release_unique="success")
    house.store.schedule(message(), due_at=house.clock.at, unique=Unique(message().id, 60.0))
    EXITS[exit](house.gate, house.custody(message(), terms))
    assert not reserved(house)


@pytest.mark.parametrize("exit", ["retry", "defer"])
def test_a_unique_name_is_held_through_retries(house: House, exit: str) -> None:
    """The work is still to be done."""
    terms = Terms(max_crashes=3, retention=60.0, release_unique="success")
    house.store.schedule(message(), due_at=house.clock.at, unique=Unique(message().id, 60.0))
    EXITS[exit](house.gate, house.custody(message(), terms))
    assert reserved(house)


def test_a_unique_name_held_until_the_start_is_let_go_by_the_claim(house: House) -> None:
    """``unique_until="start"``: the next message may queue while this one runs."""
    terms = Terms(max_crashes=3, retention=60.0, release_unique="start")
    house.store.schedule(message(), due_at=house.clock.at, unique=Unique(message().id, 60.0))
    house.custody(message(), terms)
    assert not reserved(house)


# -- a store that is away ----------------------------------------------------------------------------------------------


def test_a_store_that_comes_back_is_waited_for(house: House) -> None:
    """With growing pauses; the delivery is settled as if nothing had been."""
    house.store.silent_for = 4
    house.custody(message())
    assert len(house.pauses) == 4
    for pause, expected in zip(house.pauses, (0.05, 0.1, 0.2, 0.4), strict=True):
        assert expected / 2 <= pause <= expected * 1.5


def test_patience_ends(clock: ManualClock) -> None:
    """Then StoreUnavailable leaves the gate, once told, and no pause was longer than three seconds."""
    house = House(clock, patience=10)
    house.store.silent_for = 10_000
    with pytest.raises(errors.StoreUnavailable):
        house.enter(message())
    assert house.told == ["store_unavailable"]
    assert 3 < sum(house.pauses) < 18
    assert max(house.pauses) <= 3.0


def test_an_exit_whose_reply_was_lost_is_repeated_without_harm(clock: ManualClock) -> None:
    """The step was made and the answer lost: the second time it is recognised, and the run is told it completed."""
    house = House(clock)
    custody = house.custody(message())
    house.store.forgets = 1
    assert house.gate.complete(custody, 7, result=b"7") == Completed(7)
    assert house.record(message()).result == b"7"


# -- any order of things -----------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["deliver", "duplicate", "complete", "crash", "late", "retry"]),
        st.integers(0, 5),
    ),
    max_size=25,
)


@given(STEPS)
def test_whatever_happens_one_run_holds_and_one_completes(steps: list[tuple[str, int]]) -> None:
    """Deliveries, duplicates, lost leases, crashes, retries in any order: never two tokens, nor two completions."""
    house, runs, completed = House(ManualClock()), [], 0
    newest = message()
    for number, (step, pick) in enumerate(steps):
        match step:
            case "deliver" | "duplicate":
                envelope = newest if step == "deliver" else message(task_id="task-2")
                entered = house.enter(envelope, Terms(max_crashes=99, retention=1e6), holder=f"w/{number}")
                if isinstance(entered, Custody):
                    runs.append(entered)
            case "late":
                house.clock.advance(LEASE + 1)
            case _ if not runs:
                continue
            case "crash":
                run = runs[pick % len(runs)]
                lost = Attempt(at=house.clock.at, worker="w", outcome="crash")
                house.store.crash(Hold(run.envelope.id, run.holder), run.envelope, attempt=lost)
            case "complete":
                run = runs[pick % len(runs)]
                completed += house.gate.complete(run, 1, result=b"1") == Completed(1) and not run.lost
                runs.remove(run)
            case "retry":
                run = runs[pick % len(runs)]
                following = next_attempt(run.envelope, retries=run.envelope.retries + 1)
                if isinstance(house.gate.retry(run, following, due_at=house.clock.at, error=None), Retried):
                    newest = following
                    runs.remove(run)
        assert sum(house.store.holds(run.envelope.id, run.token) for run in runs) <= 1
    assert completed <= 1
