"""A run that its store has forgotten: a server crashed before it had written that moment down.

And a caller's own step, in a transaction that was undone with it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from taskguard.gate import Custody, Gate, Terms
from taskguard.headers import next_attempt
from taskguard.record import State
from taskguard.settlement import Completed, Deferred, Discarded, Drop, Retried, Settlement
from tests.contracts.messages import LEASE, message
from tests.unit.gatehouse import TERMS, House

LOST = Discarded(Drop.CUSTODY_LOST)
UNDONE = "the store had forgotten the run, and its transaction was undone"
OWN: dict[str, tuple[Callable[[Gate, Custody, Callable[[], bool]], Settlement], Settlement]] = {
    "complete": (lambda gate, custody, step: gate.complete(custody, 7, result=b"json\n7", step=step), Completed(7)),
    "discard": (lambda gate, custody, step: gate.discard(custody, Drop.IGNORED, step=step), Discarded(Drop.IGNORED)),
}
"""The ways out that may be a step of the caller's own, and what each answers when the step was made."""


# -- a run that goes on ------------------------------------------------------------------------------------------------


def test_a_run_that_the_store_has_forgotten_ends_all_the_same(house: House) -> None:
    """A server that crashes may lose its last moment; what was acknowledged by then would be lost with it."""
    custody = house.custody(message())
    house.store.forget(message().id)
    assert house.gate.complete(custody, 7, result=b"json\n7") == Completed(7)
    record = house.record(message())
    assert (record.state, record.result, record.crashes) == (State.DONE, b"json\n7", 0)
    assert house.told == ["reclaimed", "completed"]
    told = house.events[0]
    assert (told.task, told.task_id, told.key) == ("shop.charge", "task-1", "order-1")
    assert told.detail == "the store had forgotten the run"


def test_a_forgotten_run_is_discarded_all_the_same(house: House) -> None:
    """The store's own step can be made again, whichever it is."""
    custody = house.custody(message())
    house.store.forget(message().id)
    assert house.gate.discard(custody, Drop.IGNORED) == Discarded(Drop.IGNORED)
    record = house.record(message())
    assert (record.state, record.failure) == (State.DISCARDED, "ignored")


def test_a_retry_of_a_forgotten_run_rests(house: House) -> None:
    """It is the only copy: the broker's goes with this delivery."""
    custody, following = house.custody(message()), next_attempt(message(), retries=1)
    house.store.forget(message().id)
    assert isinstance(house.gate.retry(custody, following, due_at=house.clock.at + 5, error=None), Retried)
    assert house.record(message()).wire == following.to_wire()


def test_a_forgotten_run_ends_under_a_new_token(house: House) -> None:
    """It is the newest claim of its key, and no longer lost, though it had learned that it was."""
    custody = house.custody(message())
    first = custody.token
    house.store.forget(message().id)
    house.clock.advance(1)
    assert not house.gate.holds(custody)
    assert house.gate.complete(custody, 7, result=b"json\n7") == Completed(7)
    assert (custody.token, custody.lost) == (house.record(message()).token, False)
    assert custody.token > first


# -- a run that is over ------------------------------------------------------------------------------------------------


def test_a_forgotten_run_ends_no_other(house: House) -> None:
    """Whoever has claimed the key since has custody."""
    custody = house.custody(message())
    house.store.forget(message().id)
    house.clock.advance(0.001)
    other = house.custody(message(), holder="worker-2/b")
    assert house.gate.complete(custody, 7, result=b"json\n7") == LOST
    assert house.gate.complete(other, 8, result=b"json\n8") == Completed(8)


def test_a_run_is_not_forgotten_whose_successor_was_kept_no_longer(house: House) -> None:
    """It stalled for longer than its lease; another completed the key, and its result was swept."""
    late = house.custody(message())
    house.clock.advance(LEASE + 1)
    other = house.custody(message(), holder="worker-2/b")
    assert house.gate.complete(other, 8, result=b"json\n8") == Completed(8)
    house.clock.advance(TERMS.retention)
    house.store.expire(limit=10)
    assert house.gate.complete(late, 7, result=b"json\n7") == LOST
    assert house.store.find(message().id) is None


@pytest.mark.parametrize(("early_by", "expected"), [(0.0, LOST), (0.001, Completed(7))])
def test_a_run_counts_as_forgotten_until_a_successors_result_can_be_gone(
    house: House, early_by: float, expected: Settlement
) -> None:
    """The first moment at which another can have ended, and its result been swept, is lease and retention later."""
    custody = house.custody(message())
    house.store.forget(message().id)
    house.clock.advance(LEASE + TERMS.retention - early_by)
    assert house.gate.complete(custody, 7, result=b"json\n7") == expected


def test_a_run_is_not_forgotten_whose_successor_crashed(house: House) -> None:
    """The record is there and due: the next delivery runs it, with both crashes counted."""
    late = house.custody(message())
    house.clock.advance(LEASE + 1)
    house.custody(message(), holder="worker-2/b")
    house.clock.advance(LEASE + 1)
    assert house.gate.complete(late, 7, result=b"json\n7") == LOST
    assert "reclaimed" not in house.told
    assert house.custody(message(), holder="worker-3/c").crashes == 2


def test_a_forgotten_run_that_was_revoked_meanwhile_is_lost(house: House) -> None:
    """The store gives it no custody anew, and keeps why."""
    custody = house.custody(message())
    house.store.forget(message().id)
    house.store.revoke(["task-1"], retention=60)
    assert house.gate.complete(custody, 7, result=b"json\n7") == LOST
    assert custody.lost
    record = house.record(message())
    assert (record.state, record.failure) == (State.DISCARDED, "revoked")
    assert house.told == ["custody_lost"]


@pytest.mark.parametrize("why", ["taken over", "too late", "revoked"])
def test_what_the_store_refuses_a_run_that_is_over_is_not_asked_again(
    house: House, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a run with custody anew has a second chance; any other would be one call more for the same answer."""
    custody, asked = house.custody(message()), []
    match why:
        case "taken over":
            house.clock.advance(LEASE + 1)
            house.custody(message(), holder="worker-2/b")
        case "too late":
            house.store.forget(message().id)
            house.clock.advance(LEASE + TERMS.retention)
        case "revoked":
            house.store.forget(message().id)
            house.store.revoke(["task-1"], retention=60)
    complete = house.store.complete

    def spy(id: str, token: int, **rest: object) -> bool:
        asked.append(token)
        return complete(id, token, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(house.store, "complete", spy)
    assert house.gate.complete(custody, 7, result=b"json\n7") == LOST
    assert asked == [custody.token]


def test_a_run_whose_result_is_not_kept_is_not_forgotten(house: House) -> None:
    """Its record may be gone the moment it has ended: that was the end, and there is no other."""
    custody = house.custody(message(), Terms(max_crashes=3, retention=0.0))
    assert house.gate.complete(custody, 7, result=b"json\n7") == Completed(7)
    assert house.store.find(message().id) is None
    assert house.told == ["completed"]


# -- a step of the caller's own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("exit", OWN)
def test_a_step_of_the_callers_own_stands_for_the_stores(house: House, exit: str) -> None:
    """It has committed the end with the run's writes; the gate writes nothing, and tells it."""
    custody, made = house.custody(message()), []
    before = house.record(message())
    act, expected = OWN[exit]
    assert act(house.gate, custody, lambda: made.append(exit) is None) == expected
    assert made == [exit]
    assert house.record(message()) == before


@pytest.mark.parametrize("exit", OWN)
def test_a_forgotten_run_whose_transaction_was_undone_is_due_again(house: House, exit: str) -> None:
    """Its writes went with the server's last moment, and cannot be made again from here."""
    custody, made = house.custody(message()), []
    house.store.forget(message().id)
    act, _ = OWN[exit]
    assert act(house.gate, custody, lambda: made.append(exit) is not None) == Deferred(house.clock.at, UNDONE)
    assert made == [exit]
    record = house.record(message())
    assert (record.state, record.due_at, record.crashes) == (State.PENDING, house.clock.at, 0)
    assert [(event.name, event.detail) for event in house.events] == [
        ("reclaimed", "the store had forgotten the run"),
        ("deferred", UNDONE),
    ]


@pytest.mark.parametrize("exit", OWN)
def test_a_refused_transaction_of_a_run_that_the_store_knows_is_lost(house: House, exit: str) -> None:
    """Nothing was forgotten: the record stays as it is, for its lease to end."""
    custody = house.custody(message())
    before = house.record(message())
    act, _ = OWN[exit]
    assert act(house.gate, custody, lambda: False) == LOST
    assert custody.lost
    assert house.record(message()) == before
