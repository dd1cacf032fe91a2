"""The relay: what is due is published, confirmed, and only then removed; killed anywhere, it loses nothing."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskguard import relay as relay_module
from taskguard.custody import Leased
from taskguard.envelope import Envelope
from taskguard.errors import StoreUnavailable
from taskguard.events import Event
from taskguard.headers import AHEAD, next_attempt
from taskguard.record import State
from taskguard.stores import open_store
from taskguard.stores.memory import MemoryStore
from tests.clocks import ManualClock
from tests.contracts.messages import DAY, LEASE, existing, message, run
from tests.unit.relayhouse import Broker, House, running


@pytest.fixture
def house(clock: ManualClock) -> House:
    """A house of this test's own."""
    return House(clock)


def test_what_is_due_goes_out_as_it_was_sent_the_longest_due_first(house: House) -> None:
    """Bytes in, the same message out; nothing stays behind."""
    messages = house.rests("a", "b", "c")
    assert house.relay().step() == 3
    assert house.broker.queue == messages
    assert house.store.due_in() is None
    assert [event.name for event in house.events] == ["published"] * 3


def test_what_is_not_due_stays(house: House) -> None:
    """Until its moment, and then no longer."""
    house.rests("a", due_in=60)
    relay = house.relay()
    assert relay.step() == 0
    house.clock.advance(60)
    assert relay.step() == 1


def test_a_waiting_retry_leaves_its_crash_count_and_history_behind(house: House) -> None:
    """The record of a key outlives the publishing; the claim that follows goes on from it."""
    first = message()
    token = run(house.store, first)
    house.store.rest(first.id, token, next_attempt(first, retries=1), due_at=house.clock.at, attempt=None)
    house.relay().step()
    record = existing(house.store, first.id)
    assert (record.state, record.wire, record.sequence) == (State.PUBLISHED, None, 1)


def test_a_run_whose_lease_ended_is_rescued_and_counted(house: House) -> None:
    """Its worker is gone: the message goes out again, ahead of those that have not queued yet, one crash the richer."""
    run(house.store, message())
    house.clock.advance(LEASE + 1)
    assert house.relay().step() == 1
    assert house.broker.queue == [message().replace(properties={**message().properties, AHEAD: True})]
    assert existing(house.store, message().id).crashes == 1


def test_a_batch_is_bounded(house: House) -> None:
    """Two at a time, if told so."""
    house.rests("a", "b", "c")
    relay = house.relay(batch=2)
    assert [relay.step(), relay.step(), relay.step()] == [2, 1, 0]


def test_what_was_confirmed_before_a_failure_is_not_published_again(house: House) -> None:
    """The others stay leased and come due when the lease ends."""
    house.rests("a", "b", "c")
    house.broker.gone_after = 2
    assert house.relay().step() == 2
    house.broker.gone_after = None
    assert house.relay().step() == 0
    house.clock.advance(LEASE)
    assert house.relay().step() == 1
    assert house.broker.keys == ["a", "b", "c"]


def test_a_broker_that_is_away_costs_nothing_but_time(house: House) -> None:
    """The error is the caller's to wait out; every message is still there."""
    house.rests("a", "b")
    house.broker.gone_after = 0
    with pytest.raises(OSError, match="away"):
        house.relay().step()
    house.broker.gone_after = None
    house.clock.advance(LEASE)
    assert house.relay().step() == 2


def test_a_message_the_broker_refuses_does_not_hold_up_the_others(house: House) -> None:
    """Batch after batch the others go out; what is refused is told, each by its id."""
    house.rests(*"abcdefg")
    house.broker.refused = {"b", "c"}
    relay = house.relay(batch=2)
    assert [relay.step() for _ in range(4)] == [1, 1, 2, 1]
    assert house.broker.keys == ["a", "d", "e", "f", "g"]
    failed = [(event.task_id, event.detail) for event in house.events if event.name == "relay_failed"]
    assert failed == [("task-b", "ValueError: b: no route"), ("task-c", "ValueError: c: no route")]


def test_a_batch_of_refused_messages_gives_way_to_the_next(house: House) -> None:
    """Their lease keeps them out of the way; when it ends they are tried again."""
    house.rests("a", "b")
    house.broker.refused = {"a", "b"}
    relay = house.relay(batch=2)
    with pytest.raises(ValueError, match="a: no route"):
        relay.step()
    house.rests("c")
    assert relay.step() == 1
    house.broker.refused = set()
    house.clock.advance(LEASE)
    assert relay.step() == 2
    assert sorted(house.broker.keys) == ["a", "b", "c"]
    assert house.store.due_in() is None


def test_a_broker_that_goes_away_fails_all_that_are_left(house: House) -> None:
    """Each is told, each stays, and each goes out once it is back."""
    house.rests("a", "b", "c", "d")
    house.broker.gone_after = 1
    assert house.relay().step() == 1
    failed = [event.task_id for event in house.events if event.detail == "OSError: the broker is away"]
    assert failed == ["task-b", "task-c", "task-d"]
    house.broker.gone_after = None
    house.clock.advance(LEASE)
    assert house.relay().step() == 3
    assert sorted(house.broker.keys) == ["a", "b", "c", "d"]


def test_two_relays_never_take_the_same_message(house: House) -> None:
    """The lease is taken in the same step as the message."""
    house.rests("a", "b", "c", "d")
    first, second = house.relay(batch=2), house.relay(batch=2)
    assert first.step() + second.step() == 4
    assert sorted(house.broker.keys) == ["a", "b", "c", "d"]


def test_what_is_past_its_deadline_is_settled_and_not_published(house: House) -> None:
    """Stale work does not reach the broker a second time."""
    late = message().replace(deadline_at=house.clock.at)
    house.store.schedule(late, due_at=house.clock.at)
    settled: list[Envelope] = []

    def settle(envelope: Envelope) -> bool:
        settled.append(envelope)
        return True

    assert house.relay(expire=settle).step() == 1
    assert (settled, house.broker.queue) == ([late], [])
    assert house.store.due_in() is None


def test_what_is_past_its_deadline_and_cannot_be_settled_goes_to_a_worker(house: House) -> None:
    """The worker's gate settles it; resting for ever would be silence."""
    late = message().replace(deadline_at=house.clock.at - 1)
    house.store.schedule(late, due_at=house.clock.at)
    house.relay(expire=lambda envelope: False).step()
    assert house.broker.queue == [late]


def test_what_was_settled_is_removed_also_when_the_broker_is_away(house: House) -> None:
    """One message's end does not depend on another's publishing."""
    late = message("late").replace(deadline_at=house.clock.at)
    house.store.schedule(late, due_at=house.clock.at)
    house.rests("a")
    house.broker.gone_after = 0
    assert house.relay(expire=lambda envelope: True).step() == 1
    assert house.store.find(late.copy_id) is None
    assert [event.name for event in house.events] == ["relay_failed"]


def test_a_record_that_cannot_be_read_does_not_stop_the_others(house: House) -> None:
    """It is told with its id, and stays for an operator."""
    broken, _ = house.rests("broken", "b")
    record = existing(house.store, broken.copy_id)
    house.store.records[record.id] = replace(record, wire=b"not a message")
    house.relay().step()
    assert house.broker.keys == ["b"]
    assert [event.name for event in house.events] == ["relay_failed", "published"]
    assert record.id in house.events[0].detail
    assert house.store.find(record.id) is not None


def test_a_message_settled_anew_while_it_was_published_is_not_removed(house: House) -> None:
    """A newer write voids the relay's lease: otherwise the only copy would go."""
    first = message()
    token = run(house.store, first)
    second = next_attempt(first, retries=1)
    house.store.rest(first.id, token, second, due_at=house.clock.at, attempt=None)
    third = next_attempt(second, retries=2)

    class SwiftWorker(Broker):
        def publish(self, envelopes: Sequence[Envelope]) -> list[Exception | None]:
            done = super().publish(envelopes)
            if envelopes == [second]:
                newer = run(house.store, second, "worker-2/b")
                house.store.rest(second.id, newer, third, due_at=house.clock.at, attempt=None)
            return done

    house.broker = SwiftWorker()
    house.relay().step()
    assert existing(house.store, first.id).wire == third.to_wire()
    house.relay().step()
    assert house.broker.queue == [second, third]


@pytest.mark.parametrize("kind", ["memory", "redis", "sqlite"])
def test_a_message_that_rests_anew_while_it_was_published_is_not_removed(
    kind: str, house: House, request: pytest.FixtureRequest, namespace: str
) -> None:
    """A worker may be swifter than the relay: a duplicate that must wait again, or a plain task's next retry."""
    if kind != "memory":
        url = request.getfixturevalue(f"{kind}_url")
        house.store = open_store(url, namespace=namespace, clock=house.clock)  # type: ignore[assignment]
    again = message(sequence=1)

    class SwiftWorker(Broker):
        def publish(self, envelopes: Sequence[Envelope]) -> list[Exception | None]:
            done = super().publish(envelopes)
            if envelopes == [message()]:
                house.store.schedule(again, due_at=house.clock.at)
            return done

    house.broker = SwiftWorker()
    house.store.schedule(message(), due_at=house.clock.at)
    house.relay().step()
    house.relay().step()
    assert house.broker.queue == [message(), again]
    assert house.store.due_in() is None


# -- killed anywhere ---------------------------------------------------------------------------------------------------


class MortalStore(MemoryStore):
    """Process memory that a relay can fail to reach when it wants to remove."""

    cut_off = False

    def remove(self, leased: Sequence[Leased]) -> int:
        if self.cut_off:
            raise StoreUnavailable("killed")
        return super().remove(leased)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=8), st.integers(1, 4))
def test_a_relay_killed_at_any_point_loses_nothing(deaths: list[tuple[int, bool]], batch: int) -> None:
    """Whatever breaks between lease, publish and remove, every message is published, and none rests for ever."""
    house = House(ManualClock())
    house.store = store = MortalStore(house.clock)
    house.rests("a", "b", "c", "d", "e")
    for published, cut_off in deaths:
        house.broker.gone_after, store.cut_off = published, cut_off
        try:
            house.relay(batch=batch).step()
        except (OSError, StoreUnavailable):
            house.clock.advance(LEASE)
    house.broker.gone_after, store.cut_off = None, False
    house.clock.advance(LEASE)
    while house.relay(batch=batch).step():
        pass
    assert set(house.broker.keys) == {"a", "b", "c", "d", "e"}
    assert store.due_in() is None


# -- the loop ----------------------------------------------------------------------------------------------------------


def test_the_loop_outlives_a_broker_that_is_away(house: House) -> None:
    """It tells, waits longer each time, and publishes when the broker is back."""
    house.rests("a")
    house.broker.gone_after = 0
    with running(house.relay(poll=0.01)):
        assert house.broker.asked.acquire(timeout=10)
        house.broker.gone_after = None
        house.clock.advance(LEASE)
        assert house.broker.asked.acquire(timeout=10)
    assert house.broker.keys == ["a"]
    assert [event.name for event in house.events] == ["relay_failed", "published"]
    assert house.events[0].detail == "OSError: the broker is away"


def test_the_loop_outlives_a_store_that_is_away(house: House) -> None:
    """StoreUnavailable is told in its own words."""

    class Absent(MemoryStore):
        absent = True

        def take_due(self, *, limit: int, lease: float) -> list[Leased]:
            if self.absent:
                self.absent = False
                raise StoreUnavailable("no answer within 5 s")
            return super().take_due(limit=limit, lease=lease)

    house.store = Absent(house.clock)
    house.rests("a")
    with running(house.relay(poll=0.01)):
        assert house.broker.asked.acquire(timeout=10)
    assert house.events[0] == Event(name="relay_failed", detail="no answer within 5 s")


def test_the_loop_sweeps_out_what_is_past_its_retention(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing grows without bound in a store that does not forget by itself."""
    monkeypatch.setattr(relay_module, "SWEEP_EVERY", 0.0)
    swept = threading.Event()

    class Swept(MemoryStore):
        def expire(self, *, limit: int) -> int:
            removed = super().expire(limit=limit)
            if removed:
                swept.set()
            return removed

    house.store = Swept(house.clock)
    house.store.complete(message().id, run(house.store, message()), result=b"7", retention=DAY)
    house.clock.advance(DAY)
    with running(house.relay(poll=0.01)):
        assert swept.wait(10)
    assert house.store.records == {}
