"""Dead letters: kept whole, found again, requeued, purged; and how many messages there are in each state."""

from __future__ import annotations

import pytest

from taskguard.custody import Buried, Claimed, Completed, Depth, Dropped
from taskguard.envelope import Envelope
from taskguard.ports import MessageStore
from taskguard.record import Reason, State
from tests.clocks import ManualClock
from tests.contracts.messages import DAY, ask, attempt, existing, failure, hold, message, run


def bury(store: MessageStore, envelope: Envelope) -> str:
    """Run the message into a dead letter. Returns its id."""
    assert store.bury(envelope.id, run(store, envelope), failure=failure(), attempt=attempt("dead"))
    return envelope.id


def test_a_message_that_was_never_claimed_can_be_buried(store: MessageStore, clock: ManualClock) -> None:
    """An unknown task or a reused key becomes a dead letter beside its key's record."""
    envelope = message(body=b"\xff not json", task_id="task-2")
    token = run(store, message())
    id = store.bury_message(envelope, failure=failure(Reason.KEY_REUSED), history=attempt("retry").to_json())
    assert id == envelope.copy_id
    record = existing(store, id)
    assert record.wire is not None
    assert Envelope.from_wire(record.wire) == envelope
    assert (record.state, record.primary, record.failure) == (State.DEAD, False, failure(Reason.KEY_REUSED).to_json())
    assert record.attempts == [attempt("retry")]
    assert (record.due_at, record.expires_at, record.updated_at) == (None, None, clock())
    assert store.holds(message().id, token)


def test_burying_a_message_again_changes_nothing(store: MessageStore, clock: ManualClock) -> None:
    """A crash after the dead-lettering cannot produce two dead letters, nor touch the first."""
    id = store.bury_message(message(), failure=failure())
    before = existing(store, id)
    clock.advance(60)
    assert store.bury_message(message(), failure=failure(Reason.EXPIRED, "later")) == id
    assert existing(store, id) == before
    assert store.depths()[State.DEAD].count == 1


def test_a_message_at_rest_can_be_buried(store: MessageStore, clock: ManualClock) -> None:
    """A relay buries what is past its deadline: the delayed message becomes the dead letter."""
    store.schedule(message(), due_at=clock())
    leased = store.take_due(limit=10, lease=30)
    id = store.bury_message(message(), failure=failure(Reason.EXPIRED))
    assert (id, existing(store, id).state) == (leased[0].id, State.DEAD)
    clock.advance(30)
    assert store.take_due(limit=10, lease=30) == []


def test_a_requeued_letter_is_due_with_all_its_chances_back(store: MessageStore, clock: ManualClock) -> None:
    """Requeue is a change of state; the relay does the rest. The history stays and says who did it."""
    run(store, message(), "worker-1/a")
    store.crash(hold(message()), message(), attempt=attempt("crash"))
    id = bury(store, message())
    clock.advance(60)
    edited = message(sequence=1, body=b"[43]", fingerprint="edited")
    assert store.requeue(id, edited, due_at=clock() + 5)
    record = existing(store, id)
    assert record.wire is not None
    assert Envelope.from_wire(record.wire) == edited
    assert (record.state, record.crashes, record.failure, record.due_at) == (State.PENDING, 0, "", clock() + 5)
    assert [a.outcome for a in record.attempts] == ["crash", "dead", "requeue"]
    clock.advance(5)
    assert store.remove(store.take_due(limit=10, lease=30)) == 1
    answer = ask(store, edited, "worker-2/b")
    assert isinstance(answer, Claimed)
    assert answer.crashes == 0
    assert store.complete(id, answer.token, result=b"1", retention=DAY)


def test_a_requeued_letter_outranks_old_copies_and_old_runs(store: MessageStore, clock: ManualClock) -> None:
    """A late redelivery of the dead attempt does not run beside the requeued one."""
    stale = run(store, message())
    store.bury(message().id, stale, failure=failure(), attempt=None)
    store.requeue(message().id, message(sequence=1), due_at=clock())
    assert not isinstance(ask(store, message(sequence=0), "worker-2/b"), Claimed)
    token = run(store, message(sequence=1), "worker-2/c")
    assert token > stale
    assert not store.holds(message().id, stale)


@pytest.mark.parametrize("state", ["absent", "running", "done", "requeued", "purged"])
def test_only_a_dead_letter_is_requeued_or_purged(store: MessageStore, clock: ManualClock, state: str) -> None:
    """Two operators at once, or an operator too late: the second changes nothing and learns it."""
    id = message().id
    match state:
        case "running":
            run(store, message())
        case "done":
            store.complete(id, run(store, message()), result=b"1", retention=DAY)
        case "requeued":
            store.requeue(bury(store, message()), message(sequence=1), due_at=clock())
        case "purged":
            store.purge(bury(store, message()), retention=DAY)
    before = store.find(id)
    assert not store.requeue(id, message(sequence=2), due_at=clock())
    assert not store.purge(id, retention=DAY)
    assert store.find(id) == before


def test_a_buried_message_is_requeued_as_a_copy(store: MessageStore, clock: ManualClock) -> None:
    """A letter that was never claimed goes back to the broker and leaves nothing behind."""
    id = store.bury_message(message(), failure=failure(Reason.UNKNOWN_TASK))
    assert store.requeue(id, message(sequence=1), due_at=clock())
    leased = store.take_due(limit=10, lease=30)
    assert [Envelope.from_wire(item.wire) for item in leased] == [message(sequence=1)]
    assert store.remove(leased) == 1
    assert store.find(id) is None
    assert isinstance(ask(store, message(sequence=1)), Claimed)


def test_a_purged_letter_leaves_a_stone(store: MessageStore, clock: ManualClock) -> None:
    """An old copy that is still in a queue stays dead for the retention; the payload is gone."""
    id = bury(store, message())
    assert store.purge(id, retention=60)
    record = existing(store, id)
    assert (record.state, record.wire, record.expires_at) == (State.DISCARDED, None, clock() + 60)
    assert isinstance(ask(store, message(), "worker-2/b"), Dropped)
    assert store.depths()[State.DEAD].count == 0


def test_a_purged_copy_leaves_nothing(store: MessageStore) -> None:
    """A letter beside its key's record has no stone to leave."""
    id = store.bury_message(message(), failure=failure())
    assert store.purge(id, retention=60)
    assert store.find(id) is None


def test_a_letter_displaced_by_another_message_is_kept(store: MessageStore, clock: ManualClock) -> None:
    """The key is used anew while its first message is dead: the letter moves aside, whole, and stays a letter."""
    first = message(task_id="task-1", body=b"[1]")
    id = bury(store, first)
    letter = existing(store, id)
    clock.advance(5)
    token = run(store, message(task_id="task-2"), "worker-2/b")
    moved = existing(store, first.copy_id)
    assert (moved.state, moved.primary, moved.wire) == (State.DEAD, False, letter.wire)
    assert (moved.failure, moved.history, moved.updated_at) == (letter.failure, letter.history, letter.updated_at)
    assert [record.id for record in store.scan(State.DEAD)] == [first.copy_id]
    assert store.complete(id, token, result=b"2", retention=DAY)


def test_a_displaced_letter_can_be_requeued(store: MessageStore, clock: ManualClock) -> None:
    """It meets the outcome of the message that took its key."""
    first = message(task_id="task-1")
    id = bury(store, first)
    store.complete(id, run(store, message(task_id="task-2"), "worker-2/b"), result=b"2", retention=DAY)
    assert store.requeue(first.copy_id, first.replace(sequence=1), due_at=clock())
    assert store.remove(store.take_due(limit=10, lease=30)) == 1
    assert ask(store, first.replace(sequence=1), "worker-3/c") == Completed(b"2")


def test_a_revoked_message_does_not_destroy_the_letter_of_its_key(store: MessageStore) -> None:
    """A claim that is dropped as revoked must not cost the dead letter of another message."""
    first = message(task_id="task-1")
    bury(store, first)
    store.revoke(["task-2"], retention=DAY)
    assert ask(store, message(task_id="task-2"), "worker-2/b") == Dropped("revoked")
    letters = list(store.scan(State.DEAD))
    assert [letter.task_id for letter in letters] == ["task-1"]
    assert letters[0].wire is not None


def test_scan_reads_all_records_of_a_state_oldest_entry_first(store: MessageStore, clock: ManualClock) -> None:
    """By the moment they entered the state, not by when they were made; in pages, without a gap."""
    for n in range(120):
        store.schedule(message(f"key-{n}", task_id=f"task-{n}"), due_at=clock() + 9999)
    for n in reversed(range(120)):
        clock.advance(1)
        store.bury_message(message(f"key-{n}", task_id=f"task-{n}"), failure=failure())
    assert [record.task_id for record in store.scan(State.DEAD)] == [f"task-{n}" for n in reversed(range(120))]
    assert list(store.scan(State.PENDING)) == []


def test_a_scan_survives_what_it_changes(store: MessageStore) -> None:
    """`dlq purge` and `requeue` change the records they read."""
    for n in range(25):
        store.bury_message(message(f"key-{n}"), failure=failure())
    seen = 0
    for record in store.scan(State.DEAD):
        seen += store.purge(record.id, retention=60)
    assert seen == 25
    assert store.depths()[State.DEAD] == Depth(0, None)


def test_depths_name_every_state_and_its_oldest_entry(store: MessageStore, clock: ManualClock) -> None:
    """The numbers a dashboard shows; an empty state is shown as empty."""
    assert store.depths() == {state: Depth(0, None) for state in State}
    start = clock()
    run(store, message("1"))
    store.schedule(message("2"), due_at=clock() + 60)
    clock.advance(1)
    run(store, message("3"))
    store.complete(message("4").id, run(store, message("4")), result=b"", retention=DAY)
    store.discard(message("5").id, run(store, message("5")), reason="expired", retention=DAY)
    clock.advance(1)
    bury(store, message("6"))
    clock.advance(1)
    store.crash(hold(message("3")), message("3"), attempt=attempt("crash"))
    store.remove(store.take_due(limit=10, lease=30))
    assert store.depths() == {
        State.PENDING: Depth(1, start),
        State.PUBLISHED: Depth(1, start + 3),
        State.RUNNING: Depth(1, start),
        State.DONE: Depth(1, start + 1),
        State.DISCARDED: Depth(1, start + 1),
        State.DEAD: Depth(1, start + 2),
    }


def test_renewal_does_not_hide_how_long_a_run_lasts(store: MessageStore, clock: ManualClock) -> None:
    """The oldest run is as old as its claim, however often its lease was renewed."""
    start = clock()
    run(store, message())
    clock.advance(10)
    store.renew([hold(message())], lease=15, keep=True)
    assert store.depths()[State.RUNNING] == Depth(1, start)


def test_records_whose_time_is_over_are_forgotten(store: MessageStore, clock: ManualClock) -> None:
    """Nothing grows without bound; dead letters and messages at rest are never forgotten."""
    for n in range(3):
        store.complete(message(f"{n}").id, run(store, message(f"{n}")), result=b"", retention=60)
    bury(store, message("dead"))
    store.schedule(message("delayed"), due_at=clock() + DAY)
    clock.advance(59)
    store.expire(limit=100)
    assert store.depths()[State.DONE].count == 3
    clock.advance(1)
    assert store.find(message("0").id) is None
    assert store.expire(limit=2) <= 2
    store.expire(limit=100)
    assert store.expire(limit=100) == 0
    counts = {state: depth.count for state, depth in store.depths().items()}
    assert (counts[State.DONE], counts[State.DEAD], counts[State.PENDING]) == (0, 1, 1)
    assert list(store.scan(State.DONE)) == []


def test_a_dead_message_that_is_sent_again_as_a_newer_attempt_runs(store: MessageStore) -> None:
    """An exported letter that comes back as a new attempt of the same task id is not held dead by its old record."""
    bury(store, message())
    assert isinstance(ask(store, message(), "worker-2/b"), Buried)
    assert isinstance(ask(store, message(sequence=1), "worker-2/b"), Claimed)
    assert list(store.scan(State.DEAD)) == []
