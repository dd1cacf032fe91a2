"""Names that outlive a worker's memory: revoked task ids and unique names."""

from __future__ import annotations

import pytest

from taskguard.custody import Claimed, Completed, Dropped, Unique
from taskguard.envelope import Envelope
from taskguard.ports import MessageStore
from taskguard.record import State
from tests.clocks import ManualClock
from tests.contracts.messages import DAY, ask, existing, message, run

ONCE = Unique("charge order-1", 60)


def test_a_revoked_task_is_dropped_and_leaves_a_visible_end(store: MessageStore) -> None:
    """Revocation is a record in the store, not a set in a worker's memory."""
    store.revoke(["task-1"], retention=DAY)
    assert ask(store, message()) == Dropped("revoked")
    record = existing(store, message().id)
    assert (record.state, record.failure, record.wire, record.due_at) == (State.DISCARDED, "revoked", None, None)
    assert record.expires_at is not None


def test_a_revoked_task_is_dropped_however_often_it_comes(store: MessageStore) -> None:
    """Every copy, every attempt."""
    store.revoke(["task-1"], retention=DAY)
    for n in range(3):
        assert ask(store, message(sequence=n), f"worker-{n}/a") == Dropped("revoked")


def test_revoking_names_task_ids_and_not_keys(store: MessageStore) -> None:
    """Another message may use the key of a revoked one."""
    store.revoke(["task-1", "task-3"], retention=DAY)
    assert ask(store, message(task_id="task-1")) == Dropped("revoked")
    assert isinstance(ask(store, message(task_id="task-2"), "worker-2/b"), Claimed)
    assert ask(store, message("order-3", task_id="task-3")) == Dropped("revoked")


def test_a_waiting_retry_can_be_revoked(store: MessageStore, clock: ManualClock) -> None:
    """Its next delivery is dropped; nothing is left to publish."""
    token = run(store, message())
    store.rest(message().id, token, message(sequence=1), due_at=clock() + 60, attempt=None)
    store.revoke(["task-1"], retention=DAY)
    assert ask(store, message(sequence=1), "worker-2/b") == Dropped("revoked")
    clock.advance(60)
    assert store.take_due(limit=10, lease=30) == []


def test_a_running_task_is_not_touched_by_its_revocation(store: MessageStore) -> None:
    """What has begun may end; terminating it is Celery's business."""
    token = run(store, message())
    store.revoke(["task-1"], retention=DAY)
    assert isinstance(ask(store, message()), Claimed)
    assert store.complete(message().id, token, result=b"1", retention=DAY)
    assert ask(store, message(), "worker-2/b") == Completed(b"1")


def test_a_dropped_message_wakes_the_duplicates_that_wait_for_it(store: MessageStore, clock: ManualClock) -> None:
    """They are other tasks and were not revoked."""
    token = run(store, message())
    store.rest(message().id, token, message(sequence=1), due_at=clock() + 60, attempt=None)
    waiting = message(task_id="task-2")
    store.schedule(waiting, due_at=clock() + 3600, waits_on=message().id)
    store.revoke(["task-1"], retention=DAY)
    ask(store, message(sequence=1), "worker-2/b")
    assert [Envelope.from_wire(item.wire) for item in store.take_due(limit=10, lease=30)] == [waiting]


def test_a_revocation_ends_with_its_retention(store: MessageStore, clock: ManualClock) -> None:
    """Nothing grows without bound."""
    store.revoke(["task-1"], retention=60)
    clock.advance(59)
    assert ask(store, message("order-1")) == Dropped("revoked")
    clock.advance(1)
    assert isinstance(ask(store, message("order-2")), Claimed)


def test_revoking_again_prolongs(store: MessageStore, clock: ManualClock) -> None:
    """The newest word counts."""
    store.revoke(["task-1"], retention=60)
    clock.advance(30)
    store.revoke(["task-1"], retention=60)
    clock.advance(45)
    assert ask(store, message()) == Dropped("revoked")


def test_revoking_nobody_is_no_error(store: MessageStore) -> None:
    """`taskguard revoke` with a filter that matches nothing."""
    store.revoke([], retention=60)
    assert isinstance(ask(store, message()), Claimed)


def test_a_unique_name_keeps_the_second_message_out(store: MessageStore, clock: ManualClock) -> None:
    """The second caller is told whose task is queued, and nothing of his is kept."""
    assert store.schedule(message(task_id="task-1"), due_at=clock() + 9, unique=ONCE) == "task-1"
    assert store.schedule(message(task_id="task-2"), due_at=clock() + 9, unique=ONCE) == "task-1"
    assert store.find(message(task_id="task-2").copy_id) is None
    assert store.depths()[State.PENDING].count == 1


def test_a_unique_name_may_be_asked_for_again_by_its_holder(store: MessageStore, clock: ManualClock) -> None:
    """A call repeated after a lost reply is answered as the first was."""
    for _ in range(2):
        assert store.schedule(message(), due_at=clock() + 9, unique=ONCE) == "task-1"
    assert store.depths()[State.PENDING].count == 1


def test_unique_names_do_not_meet(store: MessageStore, clock: ManualClock) -> None:
    """A name holds back only its own."""
    store.schedule(message(task_id="task-1"), due_at=clock(), unique=Unique("a", 60))
    assert store.schedule(message(task_id="task-2"), due_at=clock(), unique=Unique("b", 60)) == "task-2"


def test_a_unique_name_outlives_its_message_until_it_is_released(store: MessageStore, clock: ManualClock) -> None:
    """Published is not done: the name goes when the task begins or succeeds, as declared."""
    store.schedule(message(), due_at=clock(), unique=ONCE)
    store.remove(store.take_due(limit=10, lease=30))
    assert store.schedule(message(task_id="task-2"), due_at=clock(), unique=ONCE) == "task-1"
    assert store.release_unique(ONCE.name, "task-1")
    assert store.schedule(message(task_id="task-2"), due_at=clock(), unique=ONCE) == "task-2"


@pytest.mark.parametrize(("name", "task_id"), [(ONCE.name, "task-2"), ("other", "task-1")])
def test_a_unique_name_is_released_by_its_holder_only(
    store: MessageStore, clock: ManualClock, name: str, task_id: str
) -> None:
    """A late task does not free the name of the next one."""
    store.schedule(message(), due_at=clock(), unique=ONCE)
    assert not store.release_unique(name, task_id)
    assert store.schedule(message(task_id="task-3"), due_at=clock(), unique=ONCE) == "task-1"


def test_a_unique_name_is_released_once(store: MessageStore, clock: ManualClock) -> None:
    """The second release finds nothing."""
    store.schedule(message(), due_at=clock(), unique=ONCE)
    assert store.release_unique(ONCE.name, "task-1")
    assert not store.release_unique(ONCE.name, "task-1")


def test_a_unique_name_ends_with_its_time(store: MessageStore, clock: ManualClock) -> None:
    """A producer that died does not block the name for ever."""
    store.schedule(message(task_id="task-1"), due_at=clock() + 999, unique=ONCE)
    clock.advance(59)
    assert store.schedule(message(task_id="task-2"), due_at=clock(), unique=ONCE) == "task-1"
    clock.advance(1)
    assert not store.release_unique(ONCE.name, "task-1")
    assert store.schedule(message(task_id="task-2"), due_at=clock(), unique=ONCE) == "task-2"
