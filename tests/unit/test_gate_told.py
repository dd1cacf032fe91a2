"""What the gate tells: one event for every way in and out, errors that say what to do, names let go."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from taskguard import errors
from taskguard.custody import ResultEntry, Unique
from taskguard.envelope import Envelope
from taskguard.gate import Custody, Gate, Terms
from taskguard.headers import next_attempt
from taskguard.record import Reason, State
from taskguard.settings import Settings
from taskguard.settlement import DeadLettered, Deferred, Discarded, Drop, Replayed, Retried
from tests.clocks import ManualClock
from tests.contracts.messages import LEASE, message
from tests.unit.gatehouse import House

SECOND = message(task_id="task-2")


def lose(house: House) -> None:
    """Claim, and let the lease end."""
    house.custody(message())
    house.clock.advance(LEASE + 1)


def retried(house: House) -> Custody:
    custody = house.custody(message())
    house.gate.retry(custody, next_attempt(message(), retries=1), due_at=house.clock.at + 5, error=OSError("bank down"))
    return custody


def poisoned(house: House) -> None:
    for run in range(3):
        house.custody(message(), holder=f"worker-{run}/x")
        house.clock.advance(LEASE + 1)
    house.events.clear()
    house.enter(message(), holder="worker-4/x")


TOLD: dict[str, tuple[Callable[[House], object], str, str]] = {
    "rescued": (lambda h: (lose(h), h.custody(message(), holder="w/b")), "rescued", "1 runs ended without an outcome"),
    "poison": (poisoned, "dead_lettered", "poison"),
    "completed": (lambda h: h.gate.complete(h.custody(message()), 7, result=b"7"), "completed", ""),
    "retried": (retried, "retried", "OSError: bank down"),
    "deferred": (
        lambda h: h.gate.defer(h.custody(message()), next_attempt(message(), retries=0), due_at=0.0, why="rate"),
        "deferred",
        "rate",
    ),
    "buried": (
        lambda h: h.gate.bury(h.custody(message()), Reason.PERMANENT_ERROR, ValueError()),
        "dead_lettered",
        "permanent_error",
    ),
    "discarded": (lambda h: h.gate.discard(h.custody(message()), Drop.IGNORED), "discarded", "ignored"),
    "crashed": (lambda h: h.gate.crash(h.custody(message()), SystemExit(3)), "crash", "SystemExit: 3"),
    "in custody": (
        lambda h: (h.custody(message()), h.enter(message(), holder="w/b")),
        "discarded",
        "in_custody",
    ),
    "superseded": (lambda h: (retried(h), h.enter(message(), holder="w/b")), "discarded", "superseded"),
    "key reused": (
        lambda h: (h.custody(message()), h.enter(message(task_id="task-2", fingerprint="other"))),
        "dead_lettered",
        "key_reused",
    ),
    "buried before": (
        lambda h: (
            h.gate.bury(h.custody(message()), Reason.PERMANENT_ERROR, ValueError()),
            h.enter(message(), holder="w/b"),
        ),
        "replayed",
        "",
    ),
    "revoked": (lambda h: (h.store.revoke(["task-1"], retention=60), h.enter(message())), "discarded", "revoked"),
    "waits": (lambda h: (h.custody(message()), h.enter(SECOND, holder="w/b")), "deferred", "duplicate"),
    "dropped": (
        lambda h: (
            h.custody(message()),
            h.enter(SECOND, Terms(max_crashes=3, retention=1.0, on_duplicate="drop")),
        ),
        "discarded",
        "duplicate",
    ),
}


@pytest.mark.parametrize("scene", TOLD)
def test_every_way_in_and_out_is_told_with_its_reason(house: House, scene: str) -> None:
    """Metrics count by name and detail; the event names the task, the message and the key."""
    act, name, detail = TOLD[scene]
    act(house)
    event = house.events[-1]
    assert (event.name, event.detail) == (name, detail)
    assert type(event.detail) is str
    assert (event.task, event.key) == ("shop.charge", "order-1")
    other = scene in ("key reused", "waits", "dropped")
    assert event.task_id == ("task-2" if other else "task-1")


def test_a_run_that_lost_its_custody_is_told_and_so_is_a_store_that_is_away(clock: ManualClock) -> None:
    """The one names the message, the other what the store said."""
    house = House(clock, patience=0.001)
    loser = house.custody(message())
    house.clock.advance(LEASE + 1)
    house.custody(message(), holder="worker-2/b")
    house.gate.discard(loser, Drop.IGNORED)
    assert (house.events[-1].name, house.events[-1].detail) == ("custody_lost", "")
    house.store.silent_for = 99
    with pytest.raises(errors.StoreUnavailable):
        house.enter(message())
    assert (house.events[-1].name, house.events[-1].detail) == ("store_unavailable", "the store does not answer")
    assert len(house.pauses) == 1


# -- what the errors say -----------------------------------------------------------------------------------------------


def failed(house: House, envelope: Envelope, terms: Terms | None = None) -> str:
    """The text of the error that the delivery ends with."""
    settled = house.enter(envelope, *([terms] if terms else []), holder="worker-9/z")
    assert isinstance(settled, (DeadLettered, Discarded))
    return str(settled.error)


def test_poison_says_how_often_and_what_to_do(house: House) -> None:
    """Whoever reads the dead letter knows the way out."""
    poisoned(house)
    assert house.record(message()).attempts[-1].error == (
        "PoisonedTask: shop.charge took its worker process down 3 times; mend it and requeue the dead letter"
    )


def test_a_reused_key_says_whose_it_is_and_what_to_do(house: House) -> None:
    """Key, task, the holder, and the two ways out."""
    house.custody(message())
    assert failed(house, message(task_id="task-2", fingerprint="other")) == (
        "idempotency key 'order-1' of shop.charge belongs to task task-1 with other arguments; send it with a key of "
        "its own, or edit the dead letter"
    )


def test_a_raised_duplicate_says_who_holds_the_key(house: House) -> None:
    """Key, task and holder."""
    house.custody(message())
    terms = Terms(max_crashes=3, retention=1.0, on_duplicate="raise")
    assert failed(house, SECOND, terms) == "idempotency key 'order-1' of shop.charge is held by task task-1"


def test_a_passed_deadline_says_by_how_much(house: House) -> None:
    """Past, and about to be."""
    late = message().replace(deadline_at=house.clock.at - 2.5)
    assert failed(house, late) == "shop.charge: the deadline passed 2.5 s ago"
    first = message("order-2").replace(deadline_at=house.clock.at + 10)
    settled = house.gate.retry(
        house.custody(first), next_attempt(first, retries=1), due_at=house.clock.at + 10, error=None
    )
    assert isinstance(settled, DeadLettered)
    assert settled.failure.message == "shop.charge: the next attempt would start after the deadline"


def test_a_run_called_directly_is_named(house: House) -> None:
    """The task, and what went wrong."""
    with pytest.raises(errors.TaskguardError) as raised:
        house.gate.discard(Custody(message(), "shop", "direct"), Drop.IGNORED)
    assert str(raised.value) == "shop.charge is not in custody; it was called directly"


# -- what is handed to the store ---------------------------------------------------------------------------------------


def test_a_child_that_died_unseen_leaves_its_line_in_the_history(house: House) -> None:
    """Worker, outcome and what is known."""
    house.custody(message())
    house.custody(message())
    lines = house.record(message()).attempts
    assert [(line.at, line.worker, line.outcome, line.error) for line in lines] == [
        (house.clock.at, "worker-1", "crash", "child lost unseen")
    ]


def test_a_claim_whose_reply_was_lost_is_no_crash(house: House) -> None:
    """The same holder asks twice, because it heard no answer: no child died."""
    house.store.forgets = 1
    assert house.custody(message()).crashes == 0
    assert house.record(message()).crashes == 0


def test_a_deferral_has_its_line_in_the_history(house: House) -> None:
    """No error, and no attempt spent."""
    house.gate.defer(house.custody(message()), next_attempt(message(), retries=0), due_at=0.0, why="rate")
    lines = house.record(message()).attempts
    assert [(line.at, line.worker, line.outcome, line.error) for line in lines] == [
        (house.clock.at, "worker-1", "defer", "")
    ]


def test_a_retry_before_the_deadline_is_made(house: House) -> None:
    """A deadline alone is no reason to bury."""
    first = message().replace(deadline_at=house.clock.at + 10)
    due_at = house.clock.at + 9
    settled = house.gate.retry(house.custody(first), next_attempt(first, retries=1), due_at=due_at, error=None)
    assert settled == Retried(due_at, None)
    assert house.record(first).state is State.PENDING


def test_an_error_that_was_never_raised_has_no_traceback(house: House) -> None:
    """Its text stands in the message already."""
    house.gate.bury(house.custody(message()), Reason.POISON, ValueError("no such card"))
    failure = house.store.find(message().id)
    assert failure is not None
    assert "no such card" in failure.failure
    settled = house.enter(message(), holder="worker-2/b")
    assert isinstance(settled, DeadLettered)
    assert settled.failure.traceback == ""


def test_a_traceback_is_kept_as_python_prints_it(house: House) -> None:
    """Nothing between its lines."""
    try:
        raise LookupError("no such card")
    except LookupError as exc:
        settled = house.gate.bury(house.custody(message()), Reason.PERMANENT_ERROR, exc)
    assert isinstance(settled, DeadLettered)
    first, second, *_, last = settled.failure.traceback.rstrip("\n").split("\n")
    assert (first, last) == ("Traceback (most recent call last):", "LookupError: no such card")
    assert second.startswith('  File "')


def test_the_result_for_the_backend_goes_with_the_completion(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step in the store, with what the result backend is to hold, and the task's retention."""
    handed = {}
    complete = house.store.complete

    def spy(id: str, token: int, **rest: object) -> bool:
        handed.update(rest)
        return complete(id, token, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(house.store, "complete", spy)
    entry = object.__new__(ResultEntry)
    house.gate.complete(house.custody(message()), 7, result=b"7", entry=entry)
    assert handed == {"result": b"7", "retention": 60.0, "entry": entry}


def test_a_duplicate_of_a_long_lease_waits_as_long(clock: ManualClock) -> None:
    """It looks again when the lease can have ended, not every 30 seconds."""
    house = House(clock, lease=100.0)
    house.custody(message())
    assert house.enter(SECOND, holder="worker-2/b") == Deferred(clock.at + 100, "waits for task-1")


# -- names let go on the way in ----------------------------------------------------------------------------------------

UNTIL_SUCCESS = Terms(max_crashes=3, retention=60.0, release_unique="success")


@pytest.mark.parametrize("answer", ["replayed", "key_reused", "revoked"])
def test_a_unique_name_is_let_go_by_a_message_that_ends_on_the_way_in(house: House, answer: str) -> None:
    """A duplicate, a reused key and a revoked message end without a run: the name must not outlive them."""
    second = message(task_id="task-2", fingerprint="other" if answer == "key_reused" else "same")
    if answer == "replayed":
        house.gate.complete(house.custody(message()), 7, result=b"7")
    elif answer == "key_reused":
        house.custody(message())
    else:
        house.store.revoke(["task-2"], retention=60)
    name = Unique(second.id, 60.0)
    house.store.schedule(second, due_at=house.clock.at, unique=name)
    assert house.store.schedule(message(task_id="task-3"), due_at=house.clock.at, unique=name) == "task-2"
    settled = house.enter(second, UNTIL_SUCCESS, holder="worker-2/b")
    assert isinstance(settled, (Replayed, DeadLettered, Discarded))
    assert house.store.schedule(message(task_id="task-3"), due_at=house.clock.at, unique=name) == "task-3"


# -- patience ----------------------------------------------------------------------------------------------------------


def test_pauses_are_drawn_around_their_length(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """From half to one and a half of it, and what is waited adds up to the patience, not beyond."""
    drawn = []

    def shortest(low: float, high: float) -> float:
        drawn.append((low, high))
        return low

    monkeypatch.setattr("taskguard.gate.random.uniform", shortest)
    house = House(clock, patience=0.75)
    house.store.silent_for = 99
    with pytest.raises(errors.StoreUnavailable):
        house.enter(message())
    assert set(drawn) == {(0.5, 1.5)}
    assert house.pauses == [0.025, 0.05, 0.1, 0.2]


def test_a_gate_may_have_a_patience_of_its_own(house: House) -> None:
    """A caller that cannot wait, whatever the settings say: none is none."""
    hasty = Gate(
        house.store,
        Settings.read({"namespace": "shop"}, {}, {}),
        notify=house.events.append,
        patience=0.0,
        sleep=house.pauses.append,
    )
    house.store.silent_for = 99
    with pytest.raises(errors.StoreUnavailable):
        hasty.enter(message(), Terms(max_crashes=3, retention=60.0), holder="worker-1/a")
    assert house.pauses == []


def test_a_task_that_declares_no_unique_name_lets_none_go(house: House) -> None:
    """Its end costs no call of the store, and takes nobody's name."""
    name = Unique(message().id, 60.0)
    house.store.schedule(message(), due_at=house.clock.at, unique=name)
    house.gate.complete(house.custody(message()), 7, result=b"7")
    assert house.store.schedule(SECOND, due_at=house.clock.at, unique=name) == "task-1"
