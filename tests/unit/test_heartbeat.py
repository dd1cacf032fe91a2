"""The heartbeat: renewed leases, early acknowledgement, and the last copy let go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from taskguard.custody import Hold
from taskguard.envelope import Envelope
from taskguard.errors import StoreError, StoreUnavailable
from taskguard.events import Event
from taskguard.heartbeat import Heartbeat
from taskguard.record import State
from taskguard.stores.memory import MemoryStore
from tests.clocks import ManualClock
from tests.contracts.messages import DAY, LEASE, existing, hold, message, run

SOON = 10.0
"""Seconds within which a thread does what it must; only a broken one needs them."""

SILENCE = StoreUnavailable("the store does not answer")


class Shelf(MemoryStore):
    """Process memory that can fail, and shows when a renewal is under way."""

    broken: Exception | None = None
    renewals = 0

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.during_renewal: Callable[[], None] = lambda: None
        self.renewed = threading.Event()

    def renew(self, holds: Sequence[Hold], *, lease: float, keep: bool) -> list[bool]:
        self.renewals += 1
        if self.broken is not None:
            raise self.broken
        answer = super().renew(holds, lease=lease, keep=keep)
        self.during_renewal()
        self.renewed.set()
        return answer

    def finish(self, holds: Sequence[Hold]) -> None:
        if self.broken is not None:
            raise self.broken
        super().finish(holds)


@pytest.fixture
def shelf(clock: ManualClock) -> Shelf:
    """A store of this test's own."""
    return Shelf(clock)


@pytest.fixture
def events() -> list[Event]:
    """What the heartbeat told."""
    return []


@pytest.fixture
def heartbeat(shelf: Shelf, events: list[Event]) -> Heartbeat:
    """A heartbeat whose rounds the test makes."""
    return Heartbeat(lambda: shelf, lease=LEASE, keep=True, notify=events.append)


class Listener:
    """Counts how often a run was acknowledged early."""

    def __init__(self) -> None:
        self.calls = 0
        self.called = threading.Event()

    def __call__(self) -> None:
        self.calls += 1
        self.called.set()


def due_at(shelf: Shelf, envelope: Envelope) -> float | None:
    return existing(shelf, envelope.id).due_at


def test_a_round_prolongs_every_running_lease_in_one_call(
    heartbeat: Heartbeat, shelf: Shelf, clock: ManualClock
) -> None:
    """A hundred runs cost one round trip."""
    messages = [message(f"order-{n}", task_id=f"task-{n}") for n in range(100)]
    for envelope in messages:
        run(shelf, envelope, f"worker-1/{envelope.key}")
        heartbeat.watch(hold(envelope, f"worker-1/{envelope.key}"), on_renewed=Listener())
    clock.advance(LEASE - 1)
    assert heartbeat.beat()
    assert shelf.renewals == 1
    assert {due_at(shelf, envelope) for envelope in messages} == {clock.at + LEASE}


def test_the_first_renewal_and_no_other_is_the_acknowledgement(heartbeat: Heartbeat, shelf: Shelf) -> None:
    """From then on the store's record is the only copy, and says so."""
    run(shelf, message())
    listener = Listener()
    heartbeat.watch(hold(message()), on_renewed=listener)
    for _ in range(3):
        heartbeat.beat()
    assert listener.calls == 1
    assert existing(shelf, message().id).kept


def test_a_run_that_has_not_claimed_yet_is_not_acknowledged(heartbeat: Heartbeat, shelf: Shelf) -> None:
    """The store does not hold the message; the broker must. The round after the claim acknowledges."""
    listener = Listener()
    heartbeat.watch(hold(message()), on_renewed=listener)
    heartbeat.beat()
    assert listener.calls == 0
    run(shelf, message())
    heartbeat.beat()
    assert listener.calls == 1


def test_without_early_acknowledgement_the_broker_keeps_its_copy(shelf: Shelf, clock: ManualClock) -> None:
    """The lease is renewed all the same."""
    heartbeat = Heartbeat(lambda: shelf, lease=LEASE, keep=False, notify=lambda event: None)
    run(shelf, message())
    listener = Listener()
    heartbeat.watch(hold(message()), on_renewed=listener)
    clock.advance(5)
    heartbeat.beat()
    assert (listener.calls, due_at(shelf, message())) == (0, clock.at + LEASE)
    assert not existing(shelf, message().id).kept


def test_a_run_that_ended_before_any_renewal_is_forgotten(heartbeat: Heartbeat, shelf: Shelf) -> None:
    """Short runs, nearly all there are, cost the heartbeat nothing."""
    run(shelf, message())
    heartbeat.watch(hold(message()), on_renewed=Listener())
    heartbeat.end(hold(message()))
    heartbeat.beat()
    assert shelf.renewals == 0


def test_the_kept_message_of_an_ended_run_is_let_go(heartbeat: Heartbeat, shelf: Shelf, clock: ManualClock) -> None:
    """When links, result and acknowledgement are through, not when the body returned."""
    token = run(shelf, message())
    heartbeat.watch(hold(message()), on_renewed=Listener())
    heartbeat.beat()
    shelf.complete(message().id, token, result=b"7", retention=DAY)
    assert due_at(shelf, message()) == clock.at + LEASE
    heartbeat.end(hold(message()))
    heartbeat.beat(renew=False)
    record = existing(shelf, message().id)
    assert (record.state, record.kept, record.due_at, record.wire) == (State.DONE, False, None, None)


def test_a_run_that_ends_during_its_first_renewal_is_finished_and_not_acknowledged(
    heartbeat: Heartbeat, shelf: Shelf
) -> None:
    """The renewal kept a message whose broker copy is gone already: only the heartbeat can let it go."""
    token = run(shelf, message())
    listener = Listener()
    heartbeat.watch(hold(message()), on_renewed=listener)

    def ends() -> None:
        shelf.complete(message().id, token, result=b"7", retention=DAY)
        heartbeat.end(hold(message()))

    shelf.during_renewal = ends
    heartbeat.beat()
    assert listener.calls == 0
    assert existing(shelf, message().id).due_at is None


def test_the_end_of_an_unknown_run_is_nothing(heartbeat: Heartbeat) -> None:
    """A request that was never watched may end."""
    heartbeat.end(hold(message()))
    assert heartbeat.beat()


@pytest.mark.parametrize("renewed", [False, True], ids=["before", "after"])
def test_a_run_that_is_left_is_found_by_a_relay_when_its_lease_ends(
    heartbeat: Heartbeat, shelf: Shelf, clock: ManualClock, renewed: bool
) -> None:
    """What follows it is not done: neither renewed any more nor let go, before its first renewal and after."""
    run(shelf, message())
    heartbeat.watch(hold(message()), on_renewed=Listener())
    if renewed:
        heartbeat.beat()
    heartbeat.leave(hold(message()))
    heartbeat.end(hold(message()))
    clock.advance(LEASE)
    assert heartbeat.beat()
    assert shelf.renewals == int(renewed)
    assert [taken.wire for taken in shelf.take_due(limit=9, lease=LEASE)] == [message().to_wire()]


def test_a_completed_run_that_is_left_keeps_its_only_copy(
    heartbeat: Heartbeat, shelf: Shelf, clock: ManualClock
) -> None:
    """Its links are not sent, and the broker has nothing to give back: a relay sends it to be told its result."""
    token = run(shelf, message())
    heartbeat.watch(hold(message()), on_renewed=Listener())
    heartbeat.beat()
    shelf.complete(message().id, token, result=b"7", retention=DAY)
    heartbeat.leave(hold(message()))
    assert heartbeat.beat()
    clock.advance(LEASE)
    assert [taken.wire for taken in shelf.take_due(limit=9, lease=LEASE)] == [message().to_wire()]


def test_leaving_an_unknown_run_is_nothing(heartbeat: Heartbeat) -> None:
    """A request that was never watched may be given back."""
    heartbeat.leave(hold(message()))
    assert heartbeat.beat()


def test_a_run_that_lost_its_lease_is_not_renewed(heartbeat: Heartbeat, shelf: Shelf, clock: ManualClock) -> None:
    """The lease is the new holder's, and the loser's message is not acknowledged on its strength."""
    run(shelf, message())
    listener = Listener()
    heartbeat.watch(hold(message()), on_renewed=listener)
    clock.advance(LEASE + 1)
    run(shelf, message(), "worker-2/b")
    due = due_at(shelf, message())
    clock.advance(1)
    heartbeat.beat()
    assert (due_at(shelf, message()), listener.calls) == (due, 0)


def test_a_silent_store_is_told_and_nothing_is_forgotten(
    heartbeat: Heartbeat, shelf: Shelf, events: list[Event]
) -> None:
    """Renewals and endings are made up for when it answers."""
    token = run(shelf, message())
    heartbeat.watch(hold(message()), on_renewed=Listener())
    heartbeat.beat()
    shelf.complete(message().id, token, result=b"7", retention=DAY)
    heartbeat.end(hold(message()))
    shelf.broken = SILENCE
    assert not heartbeat.beat()
    assert [event.name for event in events] == ["store_unavailable"]
    shelf.broken = None
    assert heartbeat.beat()
    assert [event.name for event in events] == ["store_unavailable", "store_back"]
    assert not existing(shelf, message().id).kept
    heartbeat.beat()
    assert len(events) == 2


def test_a_listener_that_fails_costs_no_other_run_its_lease(
    heartbeat: Heartbeat, shelf: Shelf, clock: ManualClock, events: list[Event]
) -> None:
    """The broker may refuse an acknowledgement; the runs behind it are renewed and acknowledged all the same."""

    def refuses() -> None:
        raise OSError("the channel is closed")

    listener = Listener()
    for name, on_renewed in (("a", refuses), ("b", listener)):
        run(shelf, message(name, task_id=name), f"worker-1/{name}")
        heartbeat.watch(hold(message(name, task_id=name), f"worker-1/{name}"), on_renewed=on_renewed)
    heartbeat.beat()
    clock.advance(5)
    heartbeat.beat()
    assert listener.calls == 1
    assert due_at(shelf, message("a", task_id="a")) == clock.at + LEASE
    assert [(event.name, event.detail) for event in events] == [
        ("acknowledge_failed", "OSError: the channel is closed")
    ]


# -- the thread --------------------------------------------------------------------------------------------------------


@pytest.fixture
def beating(shelf: Shelf, events: list[Event]) -> Iterator[Heartbeat]:
    """A heartbeat on its own thread, three times in 60 milliseconds."""
    heartbeat = Heartbeat(lambda: shelf, lease=0.06, keep=True, notify=events.append)
    heartbeat.start()
    yield heartbeat
    heartbeat.stop()


def test_the_thread_renews_by_itself(beating: Heartbeat, shelf: Shelf) -> None:
    """Three times in a lease, so that one lost round is no lost lease."""
    run(shelf, message())
    listener = Listener()
    beating.watch(hold(message()), on_renewed=listener)
    assert listener.called.wait(SOON)
    shelf.renewed.clear()
    assert shelf.renewed.wait(SOON)


@pytest.mark.parametrize(
    "error", [SILENCE, StoreError("NOAUTH"), RuntimeError("a bug of ours"), OSError("a driver's")], ids=repr
)
def test_the_thread_outlives_whatever_a_store_raises(
    beating: Heartbeat, shelf: Shelf, events: list[Event], error: Exception
) -> None:
    """It tells, asks again, and the runs are renewed when the store answers: without it every lease is lost."""
    run(shelf, message())
    shelf.broken = error
    listener = Listener()
    beating.watch(hold(message()), on_renewed=listener)
    while shelf.renewals < 3:
        assert not listener.called.wait(0.01)
    shelf.broken = None
    assert listener.called.wait(SOON)
    missed = [event for event in events if event.name != "store_back"]
    assert {event.name for event in missed} == {"store_unavailable"}
    assert all(str(error) in event.detail for event in missed)


def test_stopping_finishes_what_has_ended(shelf: Shelf) -> None:
    """A warm shutdown leaves no kept message behind that another worker would run again."""
    heartbeat = Heartbeat(lambda: shelf, lease=3600.0, keep=True, notify=lambda event: None)
    token = run(shelf, message())
    heartbeat.watch(hold(message()), on_renewed=Listener())
    heartbeat.beat()
    heartbeat.start()
    shelf.complete(message().id, token, result=b"7", retention=DAY)
    heartbeat.end(hold(message()))
    heartbeat.stop()
    assert not existing(shelf, message().id).kept


def test_a_heartbeat_that_never_began_can_be_stopped(heartbeat: Heartbeat) -> None:
    """A worker that fails at start stops cleanly."""
    heartbeat.stop()
