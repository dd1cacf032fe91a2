"""What `claim` answers: each line of the table in the design, and what it leaves in the record."""

from __future__ import annotations

import pytest

from taskguard.custody import Buried, Claimed, Completed, Conflict, Dropped, InProgress, Poisoned, Superseded
from taskguard.envelope import Envelope
from taskguard.ports import MessageStore
from taskguard.record import State
from tests.clocks import ManualClock
from tests.contracts.messages import DAY, LEASE, ask, existing, failure, hold, message, run


def test_a_new_message_is_claimed_without_earlier_crashes(store: MessageStore) -> None:
    """A key never seen before is the caller's."""
    answer = ask(store, message())
    assert isinstance(answer, Claimed)
    assert (answer.crashes, answer.history) == (0, "")
    assert store.holds(message().id, answer.token)


def test_the_record_of_a_run_keeps_the_whole_message(store: MessageStore, clock: ManualClock) -> None:
    """From the claim on, the broker's copy does not matter: everything it held rests in the record."""
    envelope = message(body=b"\x00\xff\x80 binary").replace(deadline_at=clock() + 60)
    token = run(store, envelope, "worker-1/a")
    record = existing(store, envelope.id)
    assert record.wire is not None
    assert Envelope.from_wire(record.wire) == envelope
    assert (record.task, record.task_id, record.key, record.queue) == ("shop.charge", "task-1", "order-1", "orders")
    assert (record.state, record.primary, record.sequence) == (State.RUNNING, True, 0)
    assert (record.token, record.holder, record.crashes) == (token, "worker-1/a", 0)
    assert (record.due_at, record.expires_at) == (clock() + LEASE, None)
    assert (record.created_at, record.updated_at) == (clock(), clock())


def test_a_token_starts_at_the_milliseconds_of_its_claim(store: MessageStore, clock: ManualClock) -> None:
    """Tokens grow even when the record of an earlier run was forgotten."""
    assert run(store, message()) == round(clock() * 1000)


def test_a_claim_repeated_by_its_holder_gets_the_same_token(store: MessageStore) -> None:
    """A claim whose reply was lost may be asked again."""
    first = ask(store, message(), "worker-1/a")
    assert ask(store, message(), "worker-1/a") == first


def test_a_second_delivery_of_a_running_message_is_in_progress(store: MessageStore, clock: ManualClock) -> None:
    """A redelivery while the task runs is told so, and until when the lease stands."""
    run(store, message(), "worker-1/a")
    clock.advance(5)
    assert ask(store, message(), "worker-2/b") == InProgress(True, "task-1", LEASE - 5)


def test_another_message_with_a_running_key_is_in_progress_elsewhere(store: MessageStore, clock: ManualClock) -> None:
    """A duplicate under its own task id learns whose run it must wait for."""
    run(store, message(task_id="task-1"))
    clock.advance(5)
    assert ask(store, message(task_id="task-2"), "worker-2/b") == InProgress(False, "task-1", LEASE - 5)


def test_another_message_with_a_waiting_key_is_in_progress_elsewhere(store: MessageStore, clock: ManualClock) -> None:
    """While a retry waits, a duplicate does not overtake it."""
    token = run(store, message())
    store.rest(message().id, token, message(sequence=1), due_at=clock() + 60, attempt=None)
    assert ask(store, message(task_id="task-2", sequence=5), "worker-2/b") == InProgress(False, "task-1", 60.0)


def test_another_message_never_takes_over_a_lapsed_run(store: MessageStore, clock: ManualClock) -> None:
    """A run whose lease ended is rescued by its own message only: a duplicate would lose the first task id's result."""
    run(store, message())
    clock.advance(LEASE + 1)
    assert ask(store, message(task_id="task-2"), "worker-2/b") == InProgress(False, "task-1", 0.0)


def test_an_older_attempt_is_superseded(store: MessageStore, clock: ManualClock) -> None:
    """A copy of an attempt that was retried since does not run, not even while the newer one waits."""
    token = run(store, message(sequence=0))
    store.rest(message().id, token, message(sequence=1), due_at=clock() + 60, attempt=None)
    assert ask(store, message(sequence=0), "worker-2/b") == Superseded()
    run(store, message(sequence=1), "worker-2/c")
    assert ask(store, message(sequence=0), "worker-3/d") == Superseded()


def test_the_next_attempt_is_claimed_with_a_larger_token(store: MessageStore, clock: ManualClock) -> None:
    """The retry of a message runs under a token that outranks the first run's."""
    first = run(store, message(sequence=0))
    store.rest(message().id, first, message(sequence=1), due_at=clock(), attempt=None)
    assert run(store, message(sequence=1), "worker-2/b") > first


def test_a_completed_key_answers_with_its_result(store: MessageStore) -> None:
    """The same message and its duplicates get the stored bytes, unchanged."""
    token = run(store, message())
    store.complete(message().id, token, result=b"\x00\xffreceipt", retention=DAY)
    assert ask(store, message(), "worker-2/b") == Completed(b"\x00\xffreceipt")
    assert ask(store, message(task_id="task-2"), "worker-2/c") == Completed(b"\x00\xffreceipt")
    assert ask(store, message(sequence=9), "worker-2/d") == Completed(b"\x00\xffreceipt")


def test_an_empty_result_is_a_result(store: MessageStore) -> None:
    """Zero bytes are an answer, not an absence."""
    store.complete(message().id, run(store, message()), result=b"", retention=DAY)
    assert ask(store, message(), "worker-2/b") == Completed(b"")


@pytest.mark.parametrize("ending", ["running", "waiting", "completed"])
def test_a_key_with_another_payload_is_a_conflict(store: MessageStore, clock: ManualClock, ending: str) -> None:
    """A key reused for other arguments is never answered with the first one's result."""
    token = run(store, message())
    match ending:
        case "waiting":
            store.rest(message().id, token, message(sequence=1), due_at=clock() + 9, attempt=None)
        case "completed":
            store.complete(message().id, token, result=b"1", retention=DAY)
    stranger = message(task_id="task-2", fingerprint="other")
    assert ask(store, stranger, "worker-2/b") == Conflict("task-1")
    assert existing(store, message().id).task_id == "task-1"


def test_the_same_message_may_change_its_payload_between_attempts(store: MessageStore, clock: ManualClock) -> None:
    """A retry with other arguments (`self.retry(args=…)`, `edit`) is not a reused key."""
    token = run(store, message())
    changed = message(sequence=1, fingerprint="edited")
    store.rest(message().id, token, changed, due_at=clock(), attempt=None)
    assert isinstance(ask(store, changed, "worker-2/b"), Claimed)


def test_a_dead_message_shows_its_failure_again(store: MessageStore) -> None:
    """A late copy of a dead letter does not run; it ends as the dead letter did."""
    store.bury(message().id, run(store, message()), failure=failure(), attempt=None)
    assert ask(store, message(), "worker-2/b") == Buried(failure())


def test_a_dead_key_can_be_used_by_another_message(store: MessageStore) -> None:
    """A failed order may be placed anew, with the same key and even with other arguments."""
    store.bury(message().id, run(store, message()), failure=failure(), attempt=None)
    answer = ask(store, message(task_id="task-2", fingerprint="other"), "worker-2/b")
    assert isinstance(answer, Claimed)
    assert answer.crashes == 0


def test_a_discarded_message_is_dropped_again(store: MessageStore) -> None:
    """A late copy of a discarded message shows the same reason."""
    store.discard(message().id, run(store, message()), reason="expired", retention=DAY)
    assert ask(store, message(), "worker-2/b") == Dropped("expired")


def test_a_discarded_key_can_be_used_by_another_message(store: MessageStore) -> None:
    """A discarded message had no effect, so its key is free."""
    store.discard(message().id, run(store, message()), reason="expired", retention=DAY)
    assert isinstance(ask(store, message(task_id="task-2"), "worker-2/b"), Claimed)


@pytest.mark.parametrize("ending", ["bury", "discard"])
def test_a_token_is_never_given_twice_for_a_key(store: MessageStore, ending: str) -> None:
    """A run that ended cannot settle the next run of its key, even one claimed in the same millisecond."""
    first = run(store, message())
    if ending == "bury":
        store.bury(message().id, first, failure=failure(), attempt=None)
    else:
        store.discard(message().id, first, reason="expired", retention=DAY)
    second = run(store, message(task_id="task-2"), "worker-2/b")
    assert second > first
    assert not store.complete(message().id, first, result=b"late", retention=DAY)


def test_a_lapsed_run_is_claimed_by_the_next_delivery_and_counted(store: MessageStore, clock: ManualClock) -> None:
    """A redelivery after the lease ended takes over, and knows that one run died."""
    first = run(store, message(), "worker-1/a")
    clock.advance(LEASE)
    answer = ask(store, message(), "worker-2/b")
    assert isinstance(answer, Claimed)
    assert answer.token > first
    assert answer.crashes == 1
    lost = existing(store, message().id).attempts
    assert [(a.at, a.worker, a.outcome) for a in lost] == [(clock(), "worker-1/a", "crash")]
    assert "lease ended" in answer.history


def test_a_message_that_took_down_its_worker_too_often_is_poisoned(store: MessageStore, clock: ManualClock) -> None:
    """After `max_crashes` lost runs the claim is given only to bury the message, under a valid token."""
    for n in range(3):
        answer = ask(store, message(), f"worker-{n}/a")
        assert isinstance(answer, Claimed)
        assert answer.crashes == n
        clock.advance(LEASE)
    answer = ask(store, message(), "worker-9/z")
    assert isinstance(answer, Poisoned)
    assert answer.crashes == 3
    assert len(answer.history.split("\n")) == 3
    assert store.bury(message().id, answer.token, failure=failure(), attempt=None)


def test_crashes_are_counted_across_attempts(store: MessageStore, clock: ManualClock) -> None:
    """A retry between two crashes does not give the message its lives back."""
    run(store, message(), "worker-1/a")
    clock.advance(LEASE)
    token = run(store, message(), "worker-2/b")
    store.rest(message().id, token, message(sequence=1), due_at=clock(), attempt=None)
    answer = ask(store, message(sequence=1), "worker-3/c")
    assert isinstance(answer, Claimed)
    assert answer.crashes == 1


def test_a_forgotten_result_lets_the_key_run_again(store: MessageStore, clock: ManualClock) -> None:
    """When the retention is over the key is as new; the token still grows."""
    first = run(store, message())
    store.complete(message().id, first, result=b"1", retention=60)
    clock.advance(59)
    assert ask(store, message(task_id="task-2"), "worker-2/b") == Completed(b"1")
    clock.advance(1)
    answer = ask(store, message(task_id="task-2"), "worker-2/c")
    assert isinstance(answer, Claimed)
    assert answer.token > first


def test_keys_and_tasks_do_not_meet(store: MessageStore) -> None:
    """The execution key is task and key together."""
    run(store, message("order-1"))
    assert isinstance(ask(store, message("order-2")), Claimed)
    assert isinstance(ask(store, message("order-1").replace(task="shop.refund")), Claimed)


def test_a_run_is_found_by_the_holder_its_parent_knows(store: MessageStore) -> None:
    """The parent's ticket and the child's claim name the same run."""
    run(store, message(), "worker-1/a")
    assert store.renew([hold(message(), "worker-1/a")], lease=LEASE, keep=False) == [True]
