"""The gate's way in: for every answer of the store one settlement."""

from __future__ import annotations

import pytest

from taskguard import errors
from taskguard.gate import WAIT_FALLBACK, Custody, Terms
from taskguard.headers import next_attempt
from taskguard.record import Reason, State
from taskguard.settlement import DeadLettered, Deferred, Discarded, Drop, Replayed
from tests.contracts.messages import LEASE, existing, message
from tests.unit.gatehouse import House


def test_a_new_message_is_taken_into_custody(house: House) -> None:
    """Token, execution key and attempt are the run's; the store holds the whole message under a lease."""
    custody = house.custody(message())
    assert (custody.key, custody.attempt, custody.crashes) == ("shop:shop.charge:order-1", 1, 0)
    record = house.record(message())
    assert (record.state, record.token, record.holder) == (State.RUNNING, custody.token, "worker-1/a")
    assert record.wire == message().to_wire()
    assert record.due_at == house.clock.at + LEASE


def test_the_attempt_counts_retries_and_crashes(house: House) -> None:
    """A second try that crashed once before is the third run."""
    house.custody(message(sequence=1))
    house.clock.advance(LEASE + 1)
    assert house.custody(message(sequence=1), holder="worker-2/b").attempt == 3


@pytest.mark.parametrize("late_by", [0.0, 0.001, 3600.0])
def test_what_is_past_its_deadline_never_starts(house: House, late_by: float) -> None:
    """At the instant of the deadline it is too late: a dead letter that says why and shows when."""
    late = message().replace(deadline_at=house.clock.at - late_by)
    settled = house.enter(late)
    assert isinstance(settled, DeadLettered)
    assert settled.failure.reason is Reason.EXPIRED
    assert isinstance(settled.error, errors.DeadlineExceeded)
    assert f"{late_by:.1f} s ago" in str(settled.error)
    assert house.record(late).state is State.DEAD


def test_what_is_past_its_deadline_is_discarded_where_so_declared(house: House) -> None:
    """``on_expired="discard"``: a visible end, and no dead letter."""
    late = message().replace(deadline_at=house.clock.at - 1)
    settled = house.enter(late, Terms(max_crashes=3, retention=60.0, on_expired="discard"))
    assert settled == Discarded(Drop.EXPIRED)
    assert house.record(late).state is State.DISCARDED


def test_a_run_that_crashed_too_often_is_buried_as_poison(house: House) -> None:
    """The body does not run a fourth time; the letter carries every crash."""
    for run in range(3):
        house.custody(message(), holder=f"worker-{run}/x")
        house.clock.advance(LEASE + 1)
    settled = house.enter(message(), holder="worker-4/x")
    assert isinstance(settled, DeadLettered)
    assert settled.failure.reason is Reason.POISON
    assert isinstance(settled.error, errors.PoisonedTask)
    record = house.record(message())
    assert record.state is State.DEAD
    assert [attempt.outcome for attempt in record.attempts] == ["crash", "crash", "crash", "dead"]


def test_a_duplicate_of_a_finished_run_is_told_its_result(house: House) -> None:
    """Under its own task id, and without running."""
    house.gate.complete(house.custody(message()), 7, result=b"7")
    assert house.enter(message(task_id="task-2"), holder="worker-2/b") == Replayed(b"7")
    assert house.told == ["completed", "replayed"]


def test_a_second_delivery_of_a_running_message_is_dropped_unseen(house: House) -> None:
    """Custody has the message; nothing may be written under the task's id."""
    house.custody(message())
    settled = house.enter(message(), holder="worker-2/b")
    assert settled == Discarded(Drop.IN_CUSTODY)
    assert not settled.visible


def test_a_duplicate_waits_for_the_outcome_and_is_woken_by_it(house: House) -> None:
    """It rests in the store; the moment the holder ends it is due."""
    custody = house.custody(message())
    second = message(task_id="task-2")
    settled = house.enter(second, holder="worker-2/b")
    assert settled == Deferred(house.clock.at + WAIT_FALLBACK, "waits for task-1")
    assert existing(house.store, second.copy_id).waits_on == message().id
    house.gate.complete(custody, 7, result=b"7")
    assert existing(house.store, second.copy_id).due_at == house.clock.at


def test_a_duplicate_is_dropped_visibly_where_so_declared(house: House) -> None:
    """``on_duplicate="drop"``: it ends as REVOKED, under its own id."""
    house.custody(message())
    settled = house.enter(message(task_id="task-2"), Terms(max_crashes=3, retention=1.0, on_duplicate="drop"))
    assert settled == Discarded(Drop.DUPLICATE)
    assert isinstance(settled, Discarded)
    assert settled.visible


def test_a_duplicate_fails_where_so_declared(house: House) -> None:
    """``on_duplicate="raise"``: the caller learns who holds the key."""
    house.custody(message())
    settled = house.enter(message(task_id="task-2"), Terms(max_crashes=3, retention=1.0, on_duplicate="raise"))
    assert isinstance(settled, Discarded)
    assert isinstance(settled.error, errors.DuplicateTask)
    assert "task-1" in str(settled.error)


@pytest.mark.parametrize("on_duplicate", ["drop", "raise"])
def test_the_next_attempt_of_the_same_task_is_no_duplicate_to_drop(house: House, on_duplicate: str) -> None:
    """A retry that overtakes the end of its own run waits for it, whatever is declared for duplicates."""
    terms = Terms(max_crashes=3, retention=1.0, on_duplicate=on_duplicate)  # type: ignore[arg-type]
    house.custody(message(), terms)
    assert isinstance(house.enter(message(sequence=1), terms, holder="worker-2/b"), Deferred)


def test_an_old_copy_of_a_retried_message_is_superseded(house: House) -> None:
    """A late redelivery does not run beside the attempt that followed it."""
    first = message()
    following = next_attempt(first, retries=1)
    house.gate.retry(house.custody(first), following, due_at=house.clock.at + 5, error=None)
    assert house.enter(first, holder="worker-2/b") == Discarded(Drop.SUPERSEDED)


def test_a_key_with_other_arguments_becomes_a_dead_letter(house: House) -> None:
    """Nothing is dropped in silence, and the run that holds the key is not touched."""
    custody = house.custody(message())
    other = message(task_id="task-2", fingerprint="other")
    settled = house.enter(other, holder="worker-2/b")
    assert isinstance(settled, DeadLettered)
    assert settled.failure.reason is Reason.KEY_REUSED
    assert isinstance(settled.error, errors.KeyReused)
    assert existing(house.store, other.copy_id).state is State.DEAD
    assert house.gate.holds(custody)


def test_a_redelivered_dead_letter_shows_its_failure_again(house: House) -> None:
    """It does not run, and no second letter is written."""
    house.gate.bury(house.custody(message()), Reason.PERMANENT_ERROR, ValueError("no such card"))
    settled = house.enter(message(), holder="worker-2/b")
    assert isinstance(settled, DeadLettered)
    assert (settled.failure.message, settled.error) == ("no such card", None)
    assert len(list(house.store.scan(State.DEAD))) == 1


def test_a_revoked_message_is_discarded(house: House) -> None:
    """Whenever it comes, and however often."""
    house.store.revoke(["task-1"], retention=60)
    for holder in ("worker-1/a", "worker-2/b"):
        assert house.enter(message(), holder=holder) == Discarded(Drop.REVOKED)


def test_a_message_the_pool_hands_on_after_an_unseen_death_is_charged_with_a_crash(house: House) -> None:
    """The second child has the first one's holder. Without the count a poison task would run once more than allowed."""
    first = house.enter(message(), holder="worker-1/a")
    second = house.enter(message(), holder="worker-1/a")
    assert isinstance(first, Custody)
    assert isinstance(second, Custody)
    assert (first.crashes, second.crashes) == (0, 1)
    assert second.token > first.token
    assert not house.gate.holds(first)
