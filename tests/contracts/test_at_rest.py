"""Messages at rest: schedule, take_due, remove, and what a newer write does to a relay's lease."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from taskguard.custody import Claimed, Leased, Unique
from taskguard.envelope import Envelope
from taskguard.ports import MessageStore
from taskguard.record import State
from taskguard.relay import TOLD_ONCE
from tests.clocks import ManualClock
from tests.contracts.messages import DAY, LEASE, ask, attempt, existing, failure, hold, message, run


def take(store: MessageStore, *, limit: int = 10) -> list[Leased]:
    """Lease what is due, for thirty seconds."""
    return store.take_due(limit=limit, lease=30)


def task_ids(leased: list[Leased]) -> list[str]:
    """Whose messages these are, in order."""
    return [Envelope.from_wire(item.wire).task_id for item in leased]


def test_a_scheduled_message_rests_whole_beside_its_keys_record(store: MessageStore, clock: ManualClock) -> None:
    """A delayed message does not touch the custody of its key."""
    envelope = message(body=b"\x80").replace(deadline_at=clock() + 99)
    assert store.schedule(envelope, due_at=clock() + 60) == "task-1"
    record = existing(store, envelope.copy_id)
    assert record.wire is not None
    assert Envelope.from_wire(record.wire) == envelope
    assert (record.state, record.primary, record.due_at) == (State.PENDING, False, clock() + 60)
    assert (record.expires_at, record.created_at) == (None, clock())
    assert (record.lease, record.waits_on) == ("", "")
    assert store.find(envelope.id) is None


def test_a_scheduled_message_is_due_at_its_moment_and_not_before(store: MessageStore, clock: ManualClock) -> None:
    """`countdown` and `eta` rest in the store; the due moment publishes."""
    store.schedule(message(), due_at=clock() + 60)
    assert store.due_in() == 60
    clock.advance(59.75)
    assert take(store) == []
    clock.advance(0.25)
    assert task_ids(take(store)) == ["task-1"]


def test_scheduling_again_changes_nothing(store: MessageStore, clock: ManualClock) -> None:
    """A call repeated after a lost reply neither moves nor doubles the message."""
    store.schedule(message(), due_at=clock() + 60)
    before = existing(store, message().copy_id)
    clock.advance(5)
    assert store.schedule(message(), due_at=clock() + 600) == "task-1"
    assert existing(store, message().copy_id) == before


def test_scheduling_what_a_relay_has_leased_voids_the_lease(store: MessageStore, clock: ManualClock) -> None:
    """The message was published and has come back to rest before the relay removed it: now it is the only copy."""
    store.schedule(message(), due_at=clock())
    leased = take(store)
    store.schedule(message(sequence=1), due_at=clock() + 60)
    assert store.remove(leased) == 0
    clock.advance(60)
    assert [Envelope.from_wire(item.wire).sequence for item in take(store)] == [1]


def test_the_longest_due_is_taken_first_and_no_more_than_asked(store: MessageStore, clock: ManualClock) -> None:
    """Batches are bounded, and nothing starves."""
    for n in (3, 1, 2, 0):
        store.schedule(message(f"key-{n}", task_id=f"task-{n}"), due_at=clock() + n)
    store.schedule(message("key-9", task_id="task-9"), due_at=clock() + 100)
    clock.advance(10)
    assert task_ids(take(store, limit=3)) == ["task-0", "task-1", "task-2"]
    assert task_ids(take(store, limit=3)) == ["task-3"]
    assert take(store, limit=3) == []


def test_a_leased_message_is_given_to_no_second_relay(store: MessageStore, clock: ManualClock) -> None:
    """While one relay publishes, the others pass the message over; when it dies, they take it."""
    store.schedule(message(), due_at=clock())
    assert len(take(store)) == 1
    clock.advance(29.75)
    assert take(store) == []
    clock.advance(0.25)
    assert len(take(store)) == 1


def test_a_published_copy_is_gone(store: MessageStore, clock: ManualClock) -> None:
    """The broker has it now."""
    store.schedule(message(), due_at=clock())
    assert store.remove(take(store)) == 1
    assert store.find(message().copy_id) is None
    assert store.due_in() is None


def test_remove_counts_only_what_was_still_leased(store: MessageStore, clock: ManualClock) -> None:
    """A relay that was too slow learns it: the message was given to another."""
    for n in range(3):
        store.schedule(message(f"key-{n}", task_id=f"task-{n}"), due_at=clock() + n)
    clock.advance(5)
    slow = take(store)
    clock.advance(30)
    fast = take(store, limit=2)
    assert store.remove(slow) == 1
    assert store.remove(fast) == 2
    assert store.remove(fast) == 0


def test_a_lease_of_another_name_removes_nothing(store: MessageStore, clock: ManualClock) -> None:
    """Nor does an empty one, which is what a record that is not leased has."""
    store.schedule(message(), due_at=clock() + 60)
    assert store.remove([Leased(message().copy_id, "", b""), Leased(message().copy_id, "guess", b"")]) == 0
    assert store.find(message().copy_id) is not None


def test_a_published_retry_leaves_its_counters_behind(store: MessageStore, clock: ManualClock) -> None:
    """The message is the broker's, the crash count and the newest sequence stay for the next claim."""
    store.crash(hold(message()), message(sequence=2), attempt=attempt("crash"))
    assert store.remove(take(store)) == 1
    record = existing(store, message().id)
    assert (record.state, record.wire, record.due_at, record.crashes) == (State.PUBLISHED, None, None, 1)
    assert record.sequence == 2
    assert record.expires_at is not None
    assert record.expires_at > clock() + DAY
    assert record.updated_at == clock()
    answer = ask(store, message(sequence=2))
    assert isinstance(answer, Claimed)
    assert answer.crashes == 1


def test_a_claimed_message_voids_the_relays_lease(store: MessageStore, clock: ManualClock) -> None:
    """The worker may claim before the relay removes: the relay must not touch the run."""
    token = run(store, message())
    store.rest(message().id, token, message(sequence=1), due_at=clock(), attempt=None)
    leased = take(store)
    token = run(store, message(sequence=1), "worker-2/b")
    before = existing(store, message().id)
    assert store.remove(leased) == 0
    assert existing(store, message().id) == before
    assert store.holds(message().id, token)


SETTLED: dict[str, Callable[[MessageStore, int], bool]] = {
    "complete": lambda store, token: store.complete(message().id, token, result=b"1", retention=DAY),
    "rest": lambda store, token: store.rest(message().id, token, message(sequence=2), due_at=2e9, attempt=None),
    "bury": lambda store, token: store.bury(message().id, token, failure=failure(), attempt=None),
    "discard": lambda store, token: store.discard(message().id, token, reason="expired", retention=DAY),
}


@pytest.mark.parametrize("ending", SETTLED)
def test_a_settlement_between_lease_and_remove_voids_the_relays_lease(
    store: MessageStore, clock: ManualClock, ending: str
) -> None:
    """Published, claimed and settled before the relay's remove: the newer write stands, or the only copy is deleted."""
    token = run(store, message())
    store.rest(message().id, token, message(sequence=1), due_at=clock(), attempt=None)
    leased = take(store)
    assert SETTLED[ending](store, run(store, message(sequence=1), "worker-2/b"))
    before = existing(store, message().id)
    assert store.remove(leased) == 0
    assert existing(store, message().id) == before


def test_a_crash_between_lease_and_remove_voids_the_relays_lease(store: MessageStore, clock: ManualClock) -> None:
    """The message that was made due by a crash is not deleted by the relay that published it before."""
    token = run(store, message())
    store.rest(message().id, token, message(sequence=1), due_at=clock(), attempt=None)
    leased = take(store)
    run(store, message(sequence=1), "worker-2/b")
    store.crash(hold(message(), "worker-2/b"), message(sequence=1), attempt=attempt("crash"))
    assert store.remove(leased) == 0
    assert len(take(store)) == 1


def test_a_letter_buried_between_lease_and_remove_is_kept(store: MessageStore, clock: ManualClock) -> None:
    """A copy published and dead-lettered before the relay's remove stays a dead letter."""
    store.schedule(message(), due_at=clock())
    leased = take(store)
    id = store.bury_message(message(), failure=failure())
    assert store.remove(leased) == 0
    assert existing(store, id).state is State.DEAD


def test_a_message_scheduled_under_a_lease_is_the_callers_to_publish(store: MessageStore, clock: ManualClock) -> None:
    """The producer publishes at once and removes; no relay touches the message while it may still do so."""
    assert store.schedule(message(), due_at=clock() + 30, lease="mine") == "task-1"
    assert take(store) == []
    assert store.remove([Leased(message().copy_id, "mine", b"")]) == 1
    assert store.find(message().copy_id) is None


def test_a_message_whose_producer_died_before_it_published_is_taken_over(
    store: MessageStore, clock: ManualClock
) -> None:
    """When the producer's time is over a relay publishes, and the producer's lease is void."""
    store.schedule(message(), due_at=clock() + 30, lease="mine")
    clock.advance(30)
    assert task_ids(take(store)) == ["task-1"]
    assert store.remove([Leased(message().copy_id, "mine", b"")]) == 0
    assert store.find(message().copy_id) is not None


def test_a_message_waits_for_a_record_that_has_not_ended(store: MessageStore, clock: ManualClock) -> None:
    """Until the outcome, or until its own moment, whichever comes first."""
    run(store, message())
    store.schedule(message(task_id="task-2"), due_at=clock() + 5, waits_on=message().id)
    assert take(store) == []
    clock.advance(5)
    assert task_ids(take(store)) == ["task-2"]


@pytest.mark.parametrize("ending", ["complete", "bury", "discard"])
def test_a_message_that_waits_for_an_ended_record_is_due_at_once(
    store: MessageStore, clock: ManualClock, ending: str
) -> None:
    """The outcome came between the claim's answer and the schedule: nobody would wake the message later."""
    SETTLED[ending](store, run(store, message()))
    store.schedule(message(task_id="task-2"), due_at=clock() + 3600, waits_on=message().id)
    assert task_ids(take(store)) == ["task-2"]


def test_a_message_that_waits_for_no_record_is_due_at_once(store: MessageStore, clock: ManualClock) -> None:
    """What it waited for was forgotten."""
    store.schedule(message(task_id="task-2"), due_at=clock() + 3600, waits_on=message().id)
    assert task_ids(take(store)) == ["task-2"]


def test_an_outcome_wakes_all_who_wait_for_it_and_nobody_else(store: MessageStore, clock: ManualClock) -> None:
    """Waiting hangs on one record."""
    first, other = message("order-1"), message("order-2")
    token = run(store, first)
    run(store, other)
    for n in (2, 3):
        store.schedule(message("order-1", task_id=f"task-{n}"), due_at=clock() + 3600, waits_on=first.id)
    store.schedule(message("order-2", task_id="task-4"), due_at=clock() + 3600, waits_on=other.id)
    store.complete(first.id, token, result=b"1", retention=DAY)
    assert sorted(task_ids(take(store))) == ["task-2", "task-3"]


def test_due_in_tells_of_the_earliest_of_leases_and_moments(store: MessageStore, clock: ManualClock) -> None:
    """So that a relay can sleep until there is work."""
    assert store.due_in() is None
    store.schedule(message("late", task_id="task-2"), due_at=clock() + 60)
    run(store, message())
    assert store.due_in() == LEASE
    store.complete(message().id, existing(store, message().id).token, result=b"1", retention=DAY)
    assert store.due_in() == 60
    assert store.take_due(limit=10, lease=30) == []


def test_the_store_goes_by_the_clock_it_was_given(store: MessageStore, clock: ManualClock) -> None:
    """Tests and freezegun move every instant."""
    assert store.now() == clock()
    clock.advance(3600)
    assert store.now() == clock()
    store.ping()


def test_what_the_relay_takes_says_whether_it_was_rescued(store: MessageStore, clock: ManualClock) -> None:
    """One message never ran, the run of the other ended without an outcome: metrics tell them apart."""
    store.schedule(message("order-2", task_id="task-2"), due_at=clock())
    run(store, message())
    clock.advance(LEASE)
    assert {item.id: item.rescued for item in take(store)} == {
        message("order-2", task_id="task-2").copy_id: False,
        message().id: True,
    }


def test_the_holder_of_a_unique_name_may_schedule_again(store: MessageStore, clock: ManualClock) -> None:
    """A retry of the same sender is no duplicate; and a moment already past is not moved to now by an ended record."""
    name = Unique("name", 60.0)
    assert store.schedule(message(), due_at=clock() + 9, unique=name) == "task-1"
    assert store.schedule(message("order-2"), due_at=clock() + 9, unique=name) == "task-1"
    assert store.find(message("order-2").copy_id) is not None
    store.schedule(message("order-3", task_id="task-3"), due_at=clock() - 9, waits_on="nobody")
    waiting = existing(store, message("order-3", task_id="task-3").copy_id)
    assert (waiting.due_at, waiting.waits_on) == (clock() - 9, "")


def test_a_crash_after_the_outcome_changes_nothing(store: MessageStore, clock: ManualClock) -> None:
    """The message is kept and still its holder's, but the run has ended: it must not run again."""
    token = run(store, message())
    store.renew([hold(message())], lease=LEASE, keep=True)
    store.complete(message().id, token, result=b"1", retention=DAY)
    before = existing(store, message().id)
    assert store.crash(hold(message()), message(), attempt=attempt("crash")) is False
    assert existing(store, message().id) == before


def test_a_crash_of_a_published_message_is_not_forgotten(store: MessageStore, clock: ManualClock) -> None:
    """The record was to be forgotten one day; now it holds the only copy, and it has no such day."""
    token = run(store, message())
    store.rest(message().id, token, message(sequence=1), due_at=clock(), attempt=None)
    store.remove(take(store))
    assert existing(store, message().id).expires_at is not None
    assert store.crash(hold(message()), message(sequence=1), attempt=attempt("crash")) is True
    assert existing(store, message().id).expires_at is None


def test_a_watcher_is_told_of_what_is_due_before_all_others(store: MessageStore, clock: ManualClock) -> None:
    """Not of what comes later, nor of a relay's lease. A store that cannot push says so by coming back at once."""
    store.schedule(message("leased", task_id="task-0"), due_at=clock())
    heard: list[float | None] = []

    def told(stands: bool) -> None:
        assert stands
        heard.append(store.due_in())
        time.sleep(TOLD_ONCE + 0.05)  # what comes sooner is not told
        match len(heard):
            case 1:
                store.take_due(limit=1, lease=500)
                store.schedule(message("first", task_id="task-1"), due_at=clock() + 60)
            case 2:
                store.schedule(message("later", task_id="task-2"), due_at=clock() + 120)
                token = run(store, message("runs", task_id="task-3"))
                store.rest(message("runs").id, token, message("runs", sequence=1), due_at=clock() + 10, attempt=None)

    store.watch_due(told, stop=lambda: len(heard) == 3)
    assert heard in ([0, 60, 10], [])
