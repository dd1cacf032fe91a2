"""The relay over an outbox: what it tells, how it paces itself, and when it looks."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from taskguard.custody import Leased
from taskguard.envelope import Envelope
from taskguard.events import Event
from taskguard.handover import MAX_TRIES, Dispatch, Handed, Outgoing, backoff
from taskguard.relay import CAREFUL_BATCH, OUTBOX_BATCH, Relay
from taskguard.stores.memory import MemoryStore
from tests.clocks import ManualClock
from tests.contracts.messages import message
from tests.unit.relayhouse import House


class Rows:
    """An outbox that answers as told, and remembers how it was asked."""

    def __init__(self) -> None:
        self.answers: list[Handed | Exception] = []
        self.limits: list[int] = []
        self.waits: list[float] = []
        self.stop = threading.Event()
        self.told = False

    def hand_over(self, dispatch: Dispatch, *, limit: int, lease: float, retention: float) -> Handed:
        self.limits.append(limit)
        if not self.answers:
            self.stop.set()
            return Handed()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        if len(self.waits) >= 8:
            self.stop.set()
        return self.told

    def due_in(self) -> float | None:
        return 0.0 if self.answers else None


class Timed(Rows):
    """An empty outbox whose waiting moves a clock, and that tells what a test says; then the relay is stopped."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self.clock = clock
        self.tells: list[bool] = []

    def hand_over(self, dispatch: Dispatch, *, limit: int, lease: float, retention: float) -> Handed:
        self.limits.append(limit)
        return Handed()

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.clock.advance(seconds)
        told = self.tells.pop(0)
        if not self.tells:
            self.stop.set()
        return told


def unasked(rows: Sequence[Outgoing]) -> list[Exception | None]:
    """The rows answer by themselves."""
    raise AssertionError("the rows answer by themselves")


def relay_of(rows: Rows, events: list[Event], clock: ManualClock, *, poll: float = 0.01) -> Relay:
    """A relay over *rows*, with nothing else at rest."""
    return Relay(
        lambda: MemoryStore(clock),
        publisher=None,  # type: ignore[arg-type]
        expire=lambda envelope: False,
        notify=events.append,
        poll=poll,
        clock=clock,
        outbox=lambda: rows,
        dispatch=unasked,
    )


@pytest.fixture
def timed(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> Timed:
    """An empty outbox, and a relay that waits in one go, by the manual clock."""
    monkeypatch.setattr("taskguard.relay.GLANCE", 3600.0)
    monkeypatch.setattr("taskguard.relay.time", SimpleNamespace(monotonic=clock))
    return Timed(clock)


@pytest.fixture
def rows() -> Rows:
    """An empty outbox."""
    return Rows()


def test_a_batch_is_told_in_one_event(rows: Rows, clock: ManualClock) -> None:
    """With its count: an event for each would cost more than the message."""
    events: list[Event] = []
    rows.answers = [Handed(taken=500, published=500)]
    assert relay_of(rows, events, clock).hand_over() == 500
    assert events == [Event(name="published", detail="from the outbox", count=500)]


def test_refusals_are_told_each_and_the_last_as_a_dead_letter(rows: Rows, clock: ManualClock) -> None:
    """By task id, with the reason."""
    events: list[Event] = []
    refused = [Outgoing("1", message("a").to_wire()), Outgoing("2", message("b").to_wire(), tries=MAX_TRIES - 1)]
    rows.answers = [Handed(taken=2, refused=[(row, ValueError("no route")) for row in refused])]
    relay_of(rows, events, clock).hand_over()
    assert [(event.name, event.key, event.detail) for event in events] == [
        ("relay_failed", "a", "ValueError: no route"),
        ("dead_lettered", "b", "ValueError: no route"),
    ]


def test_after_an_outage_batches_begin_small_and_double(rows: Rows, clock: ManualClock) -> None:
    """A broker that comes back is not run over by all relays of a fleet at once."""
    events: list[Event] = []
    relay = relay_of(rows, events, clock)
    rows.answers = [OSError("away"), *[Handed(taken=9, published=9)] * 6]
    with pytest.raises(OSError, match="away"):
        relay.hand_over()
    for _ in range(6):
        relay.hand_over()
    assert rows.limits == [OUTBOX_BATCH, *[min(CAREFUL_BATCH * 2**n, OUTBOX_BATCH) for n in range(6)]]


def test_a_broker_that_goes_away_in_a_batch_is_not_pressed(rows: Rows, clock: ManualClock) -> None:
    """What was published counts; the relay is told to wait."""
    events: list[Event] = []
    relay = relay_of(rows, events, clock)
    rows.answers = [Handed(taken=9, published=4, away=OSError("cut"))]
    assert relay.hand_over() == 0
    assert [(event.name, event.count) for event in events] == [("relay_failed", 1), ("published", 4)]
    relay.hand_over()
    assert rows.limits == [OUTBOX_BATCH, CAREFUL_BATCH]


def test_failures_are_told_and_outlived(rows: Rows, clock: ManualClock) -> None:
    """Whatever is raised, it goes on until it is stopped."""
    events: list[Event] = []
    rows.answers = [OSError("away"), ValueError("odd"), Handed(taken=1, published=1)]
    relay_of(rows, events, clock).run(rows.stop)
    assert [event.detail for event in events] == ["OSError: away", "ValueError: odd", "from the outbox"]


def test_an_idle_relay_waits_longer_each_time_up_to_its_poll(timed: Timed, clock: ManualClock) -> None:
    """It asks when the next is due, and takes nothing in hand."""
    timed.tells = [False] * 8
    relay_of(timed, [], clock, poll=0.25).run(timed.stop)
    assert len(timed.limits) == 1, "the first look only"
    assert timed.waits == pytest.approx([0.02, 0.04, 0.08, 0.16, *[0.25] * 4])


def test_a_relay_that_was_told_a_moment_too_early_looks_again_soon(timed: Timed, clock: ManualClock) -> None:
    """A row's instant is its producer's, and what is due is decided by the database's clock."""
    timed.tells = [*[False] * 6, True, False, False]
    relay_of(timed, [], clock, poll=1.0).run(timed.stop)
    assert len(timed.limits) == 2, "at first, and when it was told"
    assert timed.waits == pytest.approx([0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 0.02, 0.04])


def test_an_idle_relay_wakes_when_the_next_is_due(timed: Timed, clock: ManualClock) -> None:
    """Not at its next look."""
    store = MemoryStore(clock)
    store.schedule(message("later"), due_at=clock() + 0.7)
    timed.tells = [False] * 6
    relay = relay_of(timed, [], clock, poll=1.0)
    relay._store = lambda: store
    relay.run(timed.stop)
    assert timed.waits == pytest.approx([0.02, 0.04, 0.08, 0.16, 0.32, 0.08], rel=1e-3)


def test_what_waits_by_itself_is_told_and_presses_nobody(rows: Rows, clock: ManualClock) -> None:
    """The broker is not away: the next batch is as large, and comes at once."""
    events: list[Event] = []
    relay = relay_of(rows, events, clock)
    rows.answers = [Handed(taken=9, published=4, later=ConnectionError("no backend"))]
    assert relay.hand_over() == 9
    assert [(event.name, event.detail) for event in events] == [
        ("published", "from the outbox"),
        ("relay_failed", "ConnectionError: no backend"),
    ]
    relay.hand_over()
    assert rows.limits == [OUTBOX_BATCH] * 2


def test_a_busy_outbox_starves_nothing_else(rows: Rows, clock: ManualClock) -> None:
    """Delayed tasks, retries and rescues are looked for every poll, also behind a batch that was full."""
    house = House(clock)
    house.rests("delayed")
    rows.answers = [Handed(taken=OUTBOX_BATCH, published=OUTBOX_BATCH)] * 3
    batches: list[int] = []

    def publish(envelopes: Sequence[Envelope]) -> list[Exception | None]:
        batches.append(len(rows.limits))
        return [None] * len(envelopes)

    house.broker.publish = publish  # type: ignore[method-assign]
    house.relay(poll=0.0, outbox=lambda: rows, dispatch=unasked).run(rows.stop)
    assert batches == [1], "after the first batch, and not when the outbox was empty"


def test_what_rests_apart_from_an_outbox_is_looked_for_again_at_once_where_there_is_more(clock: ManualClock) -> None:
    """A whole batch of it means that there may be; the poll is for when there was not."""

    class Quiet(Rows):
        def hand_over(self, dispatch: Dispatch, *, limit: int, lease: float, retention: float) -> Handed:
            return Handed()

        def wait(self, seconds: float) -> bool:
            self.stop.set()
            return False

    house, rows = House(clock), Quiet()
    house.rests(*"abcde")
    house.relay(poll=3600.0, batch=2, outbox=lambda: rows, dispatch=unasked).run(rows.stop)
    assert house.broker.keys == [*"abcde"]


@pytest.mark.parametrize(("tries", "seconds"), [(1, 1.0), (2, 2.0), (7, 64.0), (40, 300.0)])
def test_refused_messages_back_off(tries: int, seconds: float) -> None:
    """Doubling, bounded."""
    assert backoff(tries) == seconds


def test_a_look_that_takes_long_and_finds_nothing_is_not_repeated_at_every_batch(
    rows: Rows, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million rows waited for their broker: each batch of them went out behind a look through all the others."""
    now, looks = [0.0], []

    class Large(MemoryStore):
        def take_due(self, *, limit: int, lease: float) -> list[Leased]:
            looks.append(now[0])
            now[0] += 1.0
            return []

    def hand_over(dispatch: Dispatch, *, limit: int, lease: float, retention: float) -> Handed:
        now[0] += 0.01
        return Rows.hand_over(rows, dispatch, limit=limit, lease=lease, retention=retention)

    relay = relay_of(rows, [], clock)
    relay._store = lambda: Large(clock)
    rows.answers = [Handed(taken=500, published=500)] * 2_000
    monkeypatch.setattr(rows, "hand_over", hand_over)
    monkeypatch.setattr("taskguard.relay.time", SimpleNamespace(monotonic=lambda: now[0]))
    relay.run(rows.stop)
    assert now[0] > 20
    assert len(looks) <= now[0] / 10 + 2
