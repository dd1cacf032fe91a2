"""How a run ends: complete, rest, bury, discard, crash and finish, each one step, each refused to a stale token."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from taskguard.custody import Claimed, Completed, InProgress
from taskguard.envelope import Envelope
from taskguard.ports import MessageStore
from taskguard.record import HISTORY_LIMIT, State
from tests.clocks import ManualClock
from tests.contracts.messages import DAY, LEASE, ask, attempt, existing, failure, hold, message, run

ENDINGS: dict[str, Callable[[MessageStore, int], bool]] = {
    "complete": lambda store, token: store.complete(message().id, token, result=b"1", retention=DAY),
    "rest": lambda store, token: store.rest(message().id, token, message(sequence=1), due_at=9e9, attempt=None),
    "bury": lambda store, token: store.bury(message().id, token, failure=failure(), attempt=None),
    "discard": lambda store, token: store.discard(message().id, token, reason="expired", retention=DAY),
}


def test_complete_keeps_the_result_and_lets_the_message_go(store: MessageStore, clock: ManualClock) -> None:
    """A completed record holds the result for its retention; the payload is not kept longer than it is needed."""
    token = run(store, message())
    clock.advance(2)
    assert store.complete(message().id, token, result=b"receipt", retention=60)
    record = existing(store, message().id)
    assert (record.state, record.result, record.wire) == (State.DONE, b"receipt", None)
    assert (record.due_at, record.expires_at, record.updated_at) == (None, clock() + 60, clock())
    assert store.due_in() is None


def test_rest_puts_the_next_delivery_to_rest(store: MessageStore, clock: ManualClock) -> None:
    """From RUNNING to PENDING in one step; what rests is the next delivery, whole."""
    token = run(store, message())
    following = message(sequence=1, body=b"[2]", fingerprint="two").replace(queue="slow")
    clock.advance(2)
    assert store.rest(message().id, token, following, due_at=clock() + 30, attempt=attempt("retry", error="timeout"))
    record = existing(store, message().id)
    assert record.wire is not None
    assert Envelope.from_wire(record.wire) == following
    assert (record.state, record.sequence, record.queue) == (State.PENDING, 1, "slow")
    assert (record.due_at, record.expires_at, record.holder) == (clock() + 30, None, "")
    assert record.attempts == [attempt("retry", error="timeout")]
    assert record.updated_at == clock()


def test_a_deferral_costs_no_line_of_history(store: MessageStore, clock: ManualClock) -> None:
    """A message deferred a thousand times keeps the history of its real attempts."""
    token = run(store, message())
    store.rest(message().id, token, message(sequence=1), due_at=clock(), attempt=attempt("retry"))
    token = run(store, message(sequence=1), "worker-2/b")
    store.rest(message().id, token, message(sequence=2), due_at=clock(), attempt=None)
    assert [a.outcome for a in existing(store, message().id).attempts] == ["retry"]


def test_history_keeps_the_newest_twenty_lines(store: MessageStore, clock: ManualClock) -> None:
    """A record does not grow with every retry."""
    for n in range(HISTORY_LIMIT + 3):
        token = run(store, message(sequence=n), f"worker-1/{n}")
        store.rest(
            message().id, token, message(sequence=n + 1), due_at=clock(), attempt=attempt("retry", error=f"no. {n}\n")
        )
    lines = existing(store, message().id).attempts
    assert [a.error for a in lines] == [f"no. {n}\n" for n in range(3, HISTORY_LIMIT + 3)]


def test_bury_keeps_the_whole_message_and_its_failure(store: MessageStore, clock: ManualClock) -> None:
    """A dead letter holds what is needed to understand it and to run it again, for ever."""
    envelope = message(body=b"[42]")
    token = run(store, envelope)
    clock.advance(2)
    assert store.bury(envelope.id, token, failure=failure(), attempt=attempt("dead", error="card refused"))
    record = existing(store, envelope.id)
    assert record.wire is not None
    assert Envelope.from_wire(record.wire) == envelope
    assert (record.state, record.failure) == (State.DEAD, failure().to_json())
    assert record.attempts == [attempt("dead", error="card refused")]
    assert (record.due_at, record.expires_at, record.updated_at) == (None, None, clock())


def test_discard_keeps_the_reason_for_its_retention(store: MessageStore, clock: ManualClock) -> None:
    """A discarded message leaves a stone, not a payload."""
    token = run(store, message())
    assert store.discard(message().id, token, reason="expired", retention=60)
    record = existing(store, message().id)
    assert (record.state, record.failure, record.wire) == (State.DISCARDED, "expired", None)
    assert (record.due_at, record.expires_at) == (None, clock() + 60)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_ends_once(store: MessageStore, ending: str) -> None:
    """A token settles one time. The same step repeated, its reply lost, says yes and changes nothing; others say no."""
    token = run(store, message())
    assert ENDINGS[ending](store, token)
    before = existing(store, message().id)
    for name, again in ENDINGS.items():
        assert again(store, token) is (name == ending)
    assert existing(store, message().id) == before


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_that_was_taken_over_cannot_settle(store: MessageStore, clock: ManualClock, ending: str) -> None:
    """A stale token changes nothing and returns False."""
    stale = run(store, message(), "worker-1/a")
    clock.advance(LEASE)
    token = run(store, message(), "worker-2/b")
    before = existing(store, message().id)
    assert not ENDINGS[ending](store, stale)
    assert existing(store, message().id) == before
    assert (store.holds(message().id, stale), store.holds(message().id, token)) == (False, True)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_that_a_relay_rescued_cannot_settle(store: MessageStore, clock: ManualClock, ending: str) -> None:
    """Once a relay has counted the run as crashed, its outcome comes too late."""
    stale = run(store, message())
    clock.advance(LEASE)
    assert len(store.take_due(limit=10, lease=30)) == 1
    before = existing(store, message().id)
    assert not ENDINGS[ending](store, stale)
    assert existing(store, message().id) == before


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_settles_after_its_lease_when_nobody_took_over(
    store: MessageStore, clock: ManualClock, ending: str
) -> None:
    """A late outcome is an outcome while the token is the newest: work done is not thrown away."""
    token = run(store, message())
    clock.advance(LEASE * 10)
    assert ENDINGS[ending](store, token)


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_unknown_record_cannot_be_settled(store: MessageStore, ending: str) -> None:
    """No record, no custody."""
    assert not ENDINGS[ending](store, 1)
    assert not store.holds(message().id, 1)
    assert store.find(message().id) is None


def test_a_crash_makes_the_message_due_now_and_counts(store: MessageStore, clock: ManualClock) -> None:
    """A dead child is settled by its parent at once, without waiting for the lease."""
    token = run(store, message(), "worker-1/a")
    clock.advance(2)
    assert store.crash(hold(message()), message(), attempt=attempt("crash", at=clock(), error="signal 9"))
    record = existing(store, message().id)
    assert (record.state, record.crashes, record.due_at) == (State.PENDING, 1, clock())
    assert record.attempts == [attempt("crash", at=clock(), error="signal 9")]
    assert not store.holds(message().id, token)
    assert [item.id for item in store.take_due(limit=10, lease=30)] == [message().id]


def test_a_crash_is_counted_once(store: MessageStore) -> None:
    """The hooks of a hard time limit fire twice; the second changes nothing."""
    run(store, message(), "worker-1/a")
    assert store.crash(hold(message()), message(), attempt=attempt("timeout"))
    before = existing(store, message().id)
    assert not store.crash(hold(message()), message(), attempt=attempt("timeout"))
    assert existing(store, message().id) == before


def test_a_crash_of_another_holder_changes_nothing(store: MessageStore) -> None:
    """A parent speaks only for the runs of its own children."""
    token = run(store, message(), "worker-1/a")
    assert not store.crash(hold(message(), "worker-2/b"), message(), attempt=attempt("crash"))
    assert store.holds(message().id, token)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_child_that_dies_after_it_settled_has_not_crashed(store: MessageStore, ending: str) -> None:
    """The outcome stands; the message is not run again."""
    ENDINGS[ending](store, run(store, message(), "worker-1/a"))
    before = existing(store, message().id)
    assert not store.crash(hold(message()), message(), attempt=attempt("crash"))
    assert existing(store, message().id) == before


def test_a_child_that_dies_before_it_claims_is_counted(store: MessageStore, clock: ManualClock) -> None:
    """A body that kills its process while it is unpickled must not come back for ever."""
    assert store.crash(hold(message()), message(), attempt=attempt("crash"))
    record = existing(store, message().id)
    assert record.wire is not None
    assert Envelope.from_wire(record.wire) == message()
    assert (record.state, record.primary, record.crashes, record.due_at) == (State.PENDING, True, 1, clock())


def test_a_child_that_dies_before_it_claims_is_counted_every_time(store: MessageStore) -> None:
    """The second delivery of such a message is counted as the first was, or the loop has no bound."""
    assert store.crash(hold(message(), "worker-1/a"), message(), attempt=attempt("crash"))
    assert store.remove(store.take_due(limit=10, lease=30)) == 1
    assert store.crash(hold(message(), "worker-2/b"), message(), attempt=attempt("crash"))
    record = existing(store, message().id)
    assert (record.state, record.crashes) == (State.PENDING, 2)
    assert record.wire is not None


def test_a_kept_message_stays_until_all_that_follows_is_done(store: MessageStore, clock: ManualClock) -> None:
    """After an early acknowledgement the record is the only copy: completing alone must not let it go.

    Links and chain steps are published after the result is stored. When the worker dies in between, the lease ends,
    the message is delivered again, is answered with its result, and its links are published then.
    """
    token = run(store, message())
    store.renew([hold(message())], lease=LEASE, keep=True)
    assert store.complete(message().id, token, result=b"1", retention=DAY)
    record = existing(store, message().id)
    assert record.wire is not None
    assert record.kept
    assert record.due_at == clock() + LEASE
    clock.advance(LEASE)
    leased = store.take_due(limit=10, lease=30)
    assert [Envelope.from_wire(item.wire) for item in leased] == [message()]
    assert store.remove(leased) == 1
    assert ask(store, message(), "worker-2/b") == Completed(b"1")
    record = existing(store, message().id)
    assert (record.state, record.kept, record.due_at, record.wire) == (State.DONE, False, None, None)


def test_finish_lets_a_kept_message_go(store: MessageStore, clock: ManualClock) -> None:
    """When links, result and acknowledgement are done, nothing is left to rescue."""
    token = run(store, message())
    store.renew([hold(message())], lease=LEASE, keep=True)
    store.complete(message().id, token, result=b"1", retention=DAY)
    store.finish([hold(message())])
    record = existing(store, message().id)
    assert (record.state, record.kept, record.due_at, record.wire) == (State.DONE, False, None, None)
    clock.advance(LEASE)
    assert store.take_due(limit=10, lease=30) == []


def test_finish_leaves_a_dead_letter_whole(store: MessageStore) -> None:
    """A dead letter keeps its message after all that follows is done."""
    token = run(store, message())
    store.renew([hold(message())], lease=LEASE, keep=True)
    store.bury(message().id, token, failure=failure(), attempt=None)
    store.finish([hold(message())])
    record = existing(store, message().id)
    assert record.wire is not None
    assert (record.state, record.kept, record.due_at) == (State.DEAD, False, None)


def test_finish_does_not_end_a_run(store: MessageStore) -> None:
    """A worker that finishes a run it has not settled, or another worker's, changes nothing."""
    token = run(store, message(), "worker-1/a")
    store.renew([hold(message())], lease=LEASE, keep=True)
    store.finish([hold(message())])
    assert store.holds(message().id, token)
    store.complete(message().id, token, result=b"1", retention=DAY)
    store.finish([hold(message(), "worker-2/b"), hold(message("order-9"))])
    assert existing(store, message().id).kept


def test_a_finished_relay_copy_is_not_removed_twice(store: MessageStore, clock: ManualClock) -> None:
    """The worker finishes while a relay publishes the kept message: the relay's lease is void."""
    token = run(store, message())
    store.renew([hold(message())], lease=LEASE, keep=True)
    store.complete(message().id, token, result=b"1", retention=DAY)
    clock.advance(LEASE)
    leased = store.take_due(limit=10, lease=30)
    store.finish([hold(message())])
    assert store.remove(leased) == 0
    assert ask(store, message(), "worker-2/b") == Completed(b"1")


@pytest.mark.parametrize("ending", ["complete", "bury", "discard"])
def test_an_ended_run_wakes_the_duplicates_that_wait_for_it(
    store: MessageStore, clock: ManualClock, ending: str
) -> None:
    """Duplicates are due when the outcome is known, not when their patience ends."""
    token = run(store, message())
    waiting = message(task_id="task-2")
    assert ask(store, waiting, "worker-2/b") == InProgress(False, "task-1", LEASE)
    store.schedule(waiting, due_at=clock() + 3600, waits_on=message().id)
    clock.advance(5)
    assert store.take_due(limit=10, lease=30) == []
    assert ENDINGS[ending](store, token)
    assert [Envelope.from_wire(item.wire) for item in store.take_due(limit=10, lease=30)] == [waiting]


def test_a_retry_does_not_wake_the_duplicates_that_wait_for_it(store: MessageStore, clock: ManualClock) -> None:
    """A retry is no outcome: the duplicates go on waiting."""
    token = run(store, message())
    store.schedule(message(task_id="task-2"), due_at=clock() + 3600, waits_on=message().id)
    store.rest(message().id, token, message(sequence=1), due_at=clock() + 600, attempt=None)
    assert store.take_due(limit=10, lease=30) == []
    assert isinstance(ask(store, message(sequence=1), "worker-2/b"), Claimed)
