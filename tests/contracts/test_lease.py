"""The lease: how it is renewed, when it lapses, and how a lapsed run is rescued."""

from __future__ import annotations

import pytest

from taskguard.custody import Claimed, InProgress, Poisoned
from taskguard.envelope import Envelope
from taskguard.ports import MessageStore
from taskguard.record import State
from tests.clocks import ManualClock
from tests.contracts.messages import DAY, LEASE, ask, existing, failure, hold, message, run


def test_a_renewed_lease_holds_from_the_moment_of_renewal(store: MessageStore, clock: ManualClock) -> None:
    """The heartbeat prolongs the lease from now, not from its old end."""
    run(store, message())
    clock.advance(10)
    assert store.renew([hold(message())], lease=LEASE, keep=False) == [True]
    assert existing(store, message().id).due_at == clock() + LEASE
    clock.advance(LEASE - 1)
    assert ask(store, message(), "worker-2/b") == InProgress(True, "task-1", 1.0)


def test_renewal_answers_for_each_run_in_order(store: MessageStore) -> None:
    """One call renews all runs of a worker and says which of them are lost."""
    first, ended, second, stranger = message("1"), message("2"), message("3"), message("4")
    for envelope in (first, ended, second):
        run(store, envelope, "worker-1/a")
    run(store, stranger, "worker-2/b")
    store.complete(ended.id, existing(store, ended.id).token, result=b"", retention=DAY)
    unclaimed = message("5")
    holds = [hold(envelope, "worker-1/a") for envelope in (first, ended, second, stranger, unclaimed)]
    assert store.renew(holds, lease=LEASE, keep=False) == [True, False, True, False, False]


def test_renewing_nothing_is_no_error(store: MessageStore) -> None:
    """A worker without runs has a heartbeat too."""
    assert store.renew([], lease=LEASE, keep=True) == []
    store.finish([])
    assert store.remove([]) == 0


def test_a_lapsed_lease_that_nobody_took_is_still_the_holders(store: MessageStore, clock: ManualClock) -> None:
    """A worker that was frozen for a while goes on when no other run began."""
    token = run(store, message())
    clock.advance(LEASE * 3)
    assert store.renew([hold(message())], lease=LEASE, keep=False) == [True]
    assert store.holds(message().id, token)
    assert store.take_due(limit=10, lease=30) == []


def test_a_run_that_was_taken_over_is_not_renewed(store: MessageStore, clock: ManualClock) -> None:
    """The frozen worker learns that custody is lost, and does not disturb the new run's lease."""
    run(store, message(), "worker-1/a")
    clock.advance(LEASE)
    run(store, message(), "worker-2/b")
    clock.advance(5)
    assert store.renew([hold(message(), "worker-1/a")], lease=LEASE, keep=True) == [False]
    record = existing(store, message().id)
    assert (record.due_at, record.kept) == (clock() + LEASE - 5, False)


def test_a_run_that_a_relay_rescued_is_not_renewed(store: MessageStore, clock: ManualClock) -> None:
    """Once the message is on its way to another worker, custody is lost."""
    run(store, message())
    clock.advance(LEASE)
    store.take_due(limit=10, lease=30)
    assert store.renew([hold(message())], lease=LEASE, keep=False) == [False]


def test_keeping_is_not_undone_by_a_plain_renewal(store: MessageStore) -> None:
    """The broker's copy was acknowledged once; it does not come back."""
    token = run(store, message())
    store.renew([hold(message())], lease=LEASE, keep=True)
    store.renew([hold(message())], lease=LEASE, keep=False)
    assert existing(store, message().id).kept
    assert store.complete(message().id, token, result=b"", retention=DAY)
    assert existing(store, message().id).wire is not None


def test_a_lease_lapses_at_its_end_and_not_before(store: MessageStore, clock: ManualClock) -> None:
    """To the millisecond."""
    run(store, message())
    clock.advance(LEASE - 0.25)
    assert store.take_due(limit=10, lease=30) == []
    assert ask(store, message(), "worker-2/b") == InProgress(True, "task-1", 0.25)
    clock.advance(0.25)
    assert len(store.take_due(limit=10, lease=30)) == 1


def test_a_rescued_run_is_published_whole_and_counted_as_crashed(store: MessageStore, clock: ManualClock) -> None:
    """The relay is given the very message that was claimed; the record says who was lost."""
    envelope = message(body=b"\xff[1]")
    run(store, envelope, "worker-1/a")
    clock.advance(LEASE + 2)
    leased = store.take_due(limit=10, lease=30)
    assert [Envelope.from_wire(item.wire) for item in leased] == [envelope]
    record = existing(store, envelope.id)
    assert (record.state, record.crashes, record.due_at) == (State.PENDING, 1, clock() + 30)
    assert [(a.at, a.worker, a.outcome) for a in record.attempts] == [(clock(), "worker-1/a", "crash")]


def test_a_rescued_message_runs_again_and_knows_its_crashes(store: MessageStore, clock: ManualClock) -> None:
    """The count survives the way through the broker."""
    first = run(store, message(), "worker-1/a")
    clock.advance(LEASE)
    assert store.remove(store.take_due(limit=10, lease=30)) == 1
    answer = ask(store, message(), "worker-2/b")
    assert isinstance(answer, Claimed)
    assert (answer.crashes, answer.token > first) == (1, True)


def test_rescues_end_in_poison(store: MessageStore, clock: ManualClock) -> None:
    """A message that kills every worker is given out exactly `max_crashes` times, by relays alone."""
    for _ in range(3):
        assert isinstance(ask(store, message(), "worker/a"), Claimed)
        clock.advance(LEASE)
        assert store.remove(store.take_due(limit=10, lease=30)) == 1
    answer = ask(store, message(), "worker/a")
    assert isinstance(answer, Poisoned)
    assert answer.crashes == 3


def test_a_lapsed_run_is_counted_once_however_many_relays_die(store: MessageStore, clock: ManualClock) -> None:
    """A relay that dies after leasing is not a second crash of the task."""
    run(store, message())
    clock.advance(LEASE)
    for _ in range(3):
        assert len(store.take_due(limit=10, lease=30)) == 1
        clock.advance(30)
    assert existing(store, message().id).crashes == 1


@pytest.mark.parametrize("settled", ["retry", "requeue"])
def test_a_rescued_message_has_no_lease_left_after_it_is_settled(
    store: MessageStore, clock: ManualClock, settled: str
) -> None:
    """Whatever writes the record anew begins without the relay's lease, so that the relay cannot delete it."""
    run(store, message(), "worker-1/a")
    clock.advance(LEASE)
    leased = store.take_due(limit=10, lease=30)
    token = run(store, message(), "worker-2/b")
    if settled == "retry":
        store.rest(message().id, token, message(sequence=1), due_at=clock() + 60, attempt=None)
    else:
        store.bury(message().id, token, failure=failure(), attempt=None)
        store.requeue(message().id, message(sequence=1), due_at=clock() + 60)
    assert store.remove(leased) == 0
    record = existing(store, message().id)
    assert (record.state, record.due_at) == (State.PENDING, clock() + 60)
    assert record.wire is not None


def test_a_record_knows_since_when_it_is_there_through_every_run(store: MessageStore, clock: ManualClock) -> None:
    """And since when it is in its state, also where a run begins in the moment in which the one before was lost."""
    began = clock()
    run(store, message())
    clock.advance(LEASE)
    (leased,) = store.take_due(limit=1, lease=30)
    assert (existing(store, leased.id).created_at, existing(store, leased.id).updated_at) == (began, clock())
    token = run(store, message(), "worker-2/b")
    assert (existing(store, leased.id).created_at, existing(store, leased.id).updated_at) == (began, clock())
    clock.advance(1)
    store.complete(message().id, token, result=b"7", retention=DAY)
    assert (existing(store, leased.id).created_at, existing(store, leased.id).updated_at) == (began, clock())
