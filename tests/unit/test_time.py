"""Frozen time moves deadlines, leases, delays and retention, in whatever store; nothing waits for a real second.

The gate, the relay and the heartbeat are given no clock of their own here: they read the process's, as in a worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from celery import Celery
from freezegun import freeze_time
from freezegun.api import FrozenDateTimeFactory

from taskguard import ReliableTask
from taskguard.clock import wall_clock
from taskguard.custody import Unique
from taskguard.envelope import Envelope
from taskguard.gate import Custody, Gate, Terms
from taskguard.headers import next_attempt
from taskguard.ports import MessageStore
from taskguard.record import Failure, Reason, State
from taskguard.relay import Relay
from taskguard.settings import Settings
from taskguard.settlement import DeadLettered, Deferred, Discarded, Drop, Replayed, Settlement
from taskguard.stores import open_store
from tests.contracts.messages import LEASE, existing, hold, message
from tests.unit.relayhouse import Broker

NOW = "2026-01-02 03:04:05"
RETENTION = 3600.0
TERMS = Terms(max_crashes=2, retention=RETENTION)


@pytest.fixture
def time() -> Iterator[FrozenDateTimeFactory]:
    """Time stands still, and is moved by ``tick``."""
    with freeze_time(NOW) as frozen:
        yield frozen


@pytest.fixture(params=["memory", "sqlite", "redis"])
def store(request: pytest.FixtureRequest, namespace: str) -> Iterator[MessageStore]:
    """A store that goes by the process's clock, not by its server's."""
    url = "memory://" if request.param == "memory" else request.getfixturevalue(f"{request.param}_url")
    store = open_store(url, namespace=namespace, clock=wall_clock)
    yield store
    store.close()


class Shift:
    """A worker's gate and a relay over one store, with the clocks they have by default."""

    def __init__(self, store: MessageStore, **settings: object) -> None:
        self.store = store
        read = Settings.read({"namespace": "shop", "lease": LEASE, **settings}, {}, {})
        self.gate = Gate(store, read, notify=lambda event: None)
        self.broker = Broker()
        self.relay = Relay(
            lambda: store, self.broker, expire=self._expire, notify=lambda event: None, lease=LEASE
        )  # fmt: skip

    def _expire(self, envelope: Envelope) -> bool:
        return isinstance(self.enter(envelope, holder="relay/r"), DeadLettered)

    def enter(self, envelope: Envelope, terms: Terms = TERMS, *, holder: str = "worker-1/a") -> Custody | Settlement:
        return self.gate.enter(envelope, terms, holder=holder)

    def custody(self, envelope: Envelope, *, holder: str = "worker-1/a") -> Custody:
        entered = self.enter(envelope, holder=holder)
        assert isinstance(entered, Custody), entered
        return entered


@pytest.fixture
def shift(time: FrozenDateTimeFactory, store: MessageStore) -> Shift:
    """Under frozen time."""
    return Shift(store)


# -- deadlines ---------------------------------------------------------------------------------------------------------


def test_a_message_is_worth_running_until_the_instant_of_its_deadline(
    shift: Shift, time: FrozenDateTimeFactory
) -> None:
    """A second before it is run; at the instant itself the next one is a dead letter."""
    early, late = (message(key, task_id=key).replace(deadline_at=wall_clock() + 60) for key in ("early", "late"))
    time.tick(59)
    assert shift.custody(early)
    time.tick(1)
    settled = shift.enter(late)
    assert isinstance(settled, DeadLettered)
    assert settled.failure.reason is Reason.EXPIRED


def test_a_retry_that_could_only_start_past_the_deadline_is_buried_now(
    shift: Shift, time: FrozenDateTimeFactory
) -> None:
    """Nobody waits for an attempt that must not begin."""
    custody = shift.custody(message().replace(deadline_at=wall_clock() + 60))
    time.tick(40)
    following = next_attempt(custody.envelope, retries=1)
    settled = shift.gate.retry(custody, following, due_at=wall_clock() + 20, error=OSError("bank down"))
    assert isinstance(settled, DeadLettered)
    assert settled.failure.reason is Reason.EXPIRED


def test_what_is_due_after_its_deadline_is_settled_by_the_relay(shift: Shift, time: FrozenDateTimeFactory) -> None:
    """It rested until too late: a dead letter, and the broker never sees it."""
    shift.store.schedule(message().replace(deadline_at=wall_clock() + 30), due_at=wall_clock() + 20)
    time.tick(31)
    assert shift.relay.step() == 1
    assert shift.broker.queue == []
    assert existing(shift.store, message().id).state is State.DEAD


def test_remaining_shrinks_while_the_body_runs(time: FrozenDateTimeFactory, namespace: str) -> None:
    """What the task hands on as a timeout is what is left."""
    app = Celery(namespace, broker="memory://", set_as_current=False)
    left = []

    @app.task(base=ReliableTask, bind=True, deadline=timedelta(minutes=5), shared=False)
    def charge(self: Any) -> None:
        for _ in range(3):
            left.append(self.remaining())
            time.tick(200)

    charge.apply()
    assert left == [300, 100, 0]


# -- leases ------------------------------------------------------------------------------------------------------------


def test_a_run_holds_its_key_until_its_lease_ends(shift: Shift, time: FrozenDateTimeFactory) -> None:
    """A duplicate is turned away up to that instant, and from then on has the key; the old run's outcome is void."""
    first = shift.custody(message())
    time.tick(LEASE - 0.5)
    assert shift.enter(message(), holder="worker-2/b") == Discarded(Drop.IN_CUSTODY)
    time.tick(0.5)
    second = shift.custody(message(), holder="worker-2/b")
    assert (second.crashes, second.attempt) == (1, 2)
    assert shift.gate.complete(first, 1, result=b"1") == Discarded(Drop.CUSTODY_LOST)
    assert existing(shift.store, message().id).state is State.RUNNING


def test_a_heartbeat_moves_the_end_of_the_lease(shift: Shift, time: FrozenDateTimeFactory) -> None:
    """For as long as it beats, no relay takes the run away."""
    shift.custody(message())
    for _ in range(5):
        time.tick(LEASE - 1)
        assert shift.store.renew([hold(message())], lease=LEASE, keep=False) == [True]
        assert shift.relay.step() == 0
    time.tick(LEASE)
    assert shift.relay.step() == 1
    assert shift.broker.keys == [message().key]
    assert existing(shift.store, message().id).crashes == 1


def test_a_run_whose_leases_end_again_and_again_is_poison(shift: Shift, time: FrozenDateTimeFactory) -> None:
    """``max_crashes`` leases, and no more."""
    for run in range(TERMS.max_crashes):
        shift.custody(message(), holder=f"worker-{run}/x")
        time.tick(LEASE)
    settled = shift.enter(message(), holder="worker-9/x")
    assert isinstance(settled, DeadLettered)
    assert settled.failure.reason is Reason.POISON


def test_a_relays_lease_ends_too(shift: Shift, time: FrozenDateTimeFactory) -> None:
    """What a relay leased and never removed, because it died, the next one publishes."""
    shift.store.schedule(message(), due_at=wall_clock())
    assert len(shift.store.take_due(limit=9, lease=LEASE)) == 1
    time.tick(LEASE - 1)
    assert shift.relay.step() == 0
    time.tick(1)
    assert shift.relay.step() == 1


def test_a_waiting_duplicate_looks_again_when_the_lease_it_waits_for_ends(
    shift: Shift, time: FrozenDateTimeFactory
) -> None:
    """Another message with the key rests until then, and not a second longer, should nobody wake it."""
    shift.custody(message())
    time.tick(5)
    settled = shift.enter(message(task_id="task-2"), holder="worker-2/b")
    assert isinstance(settled, Deferred)
    (waiting,) = shift.store.scan(State.PENDING)
    assert waiting.due_at is not None
    assert waiting.due_at > wall_clock()
    time.tick(waiting.due_at - wall_clock())
    assert "task-2" in {Envelope.from_wire(item.wire).task_id for item in shift.store.take_due(limit=9, lease=LEASE)}


# -- delays ------------------------------------------------------------------------------------------------------------


def test_a_delayed_retry_goes_out_at_its_moment(shift: Shift, time: FrozenDateTimeFactory) -> None:
    """Ten minutes pass in no time."""
    custody = shift.custody(message())
    following = next_attempt(message(), retries=1)
    shift.gate.retry(custody, following, due_at=wall_clock() + 600, error=OSError("bank down"))
    time.tick(599.75)
    assert shift.relay.step() == 0
    time.tick(0.25)
    assert shift.relay.step() == 1
    assert shift.broker.queue == [following]


# -- retention ---------------------------------------------------------------------------------------------------------


def test_a_result_is_told_to_duplicates_until_its_retention_is_over(shift: Shift, time: FrozenDateTimeFactory) -> None:
    """Then the key is new again, and the record is swept."""
    shift.gate.complete(shift.custody(message()), 1, result=b"1")
    time.tick(RETENTION - 1)
    assert shift.enter(message(), holder="worker-2/b") == Replayed(b"1")
    time.tick(1)
    assert shift.store.find(message().id) is None
    assert shift.store.expire(limit=9) == 1
    assert shift.custody(message(), holder="worker-2/b").crashes == 0


def test_a_dead_letter_outlives_every_retention(shift: Shift, time: FrozenDateTimeFactory) -> None:
    """Only an operator lets it go."""
    shift.store.bury_message(message(), failure=Failure(reason=Reason.UNKNOWN_TASK))
    time.tick(timedelta(days=3650))
    assert shift.store.expire(limit=9) == 0
    assert existing(shift.store, message().copy_id).state is State.DEAD
    assert shift.store.purge(message().copy_id, retention=RETENTION)
    assert shift.store.find(message().copy_id) is None


def test_a_revocation_is_kept_for_its_retention(shift: Shift, time: FrozenDateTimeFactory) -> None:
    """A day later the id means nothing any more."""
    shift.store.revoke(["task-1"], retention=RETENTION)
    time.tick(RETENTION - 1)
    assert shift.enter(message()) == Discarded(Drop.REVOKED)
    shift.store.revoke(["task-2"], retention=RETENTION)
    time.tick(RETENTION)
    assert shift.custody(message("order-2", task_id="task-2"))


def test_a_unique_name_is_held_for_its_seconds(shift: Shift, time: FrozenDateTimeFactory) -> None:
    """And not longer, whatever became of the task."""
    unique = Unique("charge:1", 60)
    first, second = message("1", task_id="t1"), message("2", task_id="t2")
    assert shift.store.schedule(first, due_at=wall_clock(), unique=unique) == "t1"
    time.tick(59)
    assert shift.store.schedule(second, due_at=wall_clock(), unique=unique) == "t1"
    time.tick(1)
    assert shift.store.schedule(second, due_at=wall_clock(), unique=unique) == "t2"
