"""A claim that asks for permits in the same step is a claim and then a question: the same answers and records."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from dataclasses import replace

import pytest
from redis import Redis

from taskguard.custody import Claimed, Entered, Resting
from taskguard.envelope import Envelope
from taskguard.errors import StoreError
from taskguard.permits import Ask, CircuitAsk, Permit, RateAsk, Refusal, SlotAsk
from taskguard.policies import CircuitBreaker, SlidingLog, TokenBucket
from taskguard.ports import JointStore, MessageStore, PermitStore
from taskguard.record import State
from taskguard.stores import open_permits, open_store
from tests.contracts.messages import LEASE, attempt, message
from tests.contracts.permits import MicroClock
from tests.unit.downstreamhouse import StepByStep

STEPS = 400
RATES = {"bank": TokenBucket(3, per=2, burst=2), "log": SlidingLog(4, per=3)}
CIRCUIT = CircuitBreaker(minimum_calls=2, wait_in_open=1)


class House:
    """Both stores of one namespace, which know no time but the clock's."""

    def __init__(self, url: str, namespace: str, clock: MicroClock) -> None:
        self.clock = clock
        self.store: MessageStore = open_store(url, namespace=namespace, clock=clock)
        self.permits: PermitStore = open_permits(url, namespace=namespace, clock=clock, timeout=30)

    @property
    def joint(self) -> JointStore:
        """Both in one."""
        joint = self.store.joined_with(self.permits)
        assert joint is not None
        return joint

    def close(self) -> None:
        """Give the connections back."""
        self.store.close()
        self.permits.close()


@pytest.fixture
def clock() -> MicroClock:
    """The clock of both houses."""
    return MicroClock()


@pytest.fixture
def house(redis_url: str, namespace: str, clock: MicroClock) -> Iterator[House]:
    """The house that does it in one step."""
    house = House(redis_url, namespace, clock)
    yield house
    house.close()


@pytest.fixture
def other(redis_url: str, namespace: str, clock: MicroClock) -> Iterator[House]:
    """The house that does it in two or three."""
    house = House(redis_url, f"{namespace}-other", clock)
    yield house
    house.close()


def entered(
    joint: JointStore, envelope: Envelope, ask: Ask, *, holder: str = "w/1", resting: Resting | None = None
) -> Entered:
    """Claim and ask."""
    return joint.claim(envelope, holder=holder, lease=LEASE, max_crashes=3, ask=ask, resting=resting)


def following(envelope: Envelope) -> Envelope:
    """Its next delivery."""
    return envelope.replace(sequence=envelope.sequence + 1, headers={**envelope.headers, "retries": 1})


class Draw:
    """What is done next, at random."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._sequences: dict[str, int] = {}

    def envelope(self, clock: MicroClock) -> Envelope:
        draw = self._draw
        key = f"order-{draw.randrange(200)}"
        task_id = draw.choice((key, f"{key}-again"))
        deadline_at = draw.choice((None, None, clock() + draw.uniform(0.1, 3)))
        made = message(key, task_id=task_id, sequence=draw.choice((0, 0, self._sequences.get(task_id, 0))))
        return made.replace(deadline_at=deadline_at, fingerprint=draw.choice(("same", "same", "same", "other")))

    def ask(self) -> Ask:
        draw = self._draw
        names = draw.sample(list(RATES), draw.choice((0, 1, 1, 2)))
        holder = draw.choice(("h1", "h2", "h3"))
        return Ask(
            rates=tuple(RateAsk(name, RATES[name], draw.choice((1, 1, 2, 30))) for name in names),
            slot=SlotAsk("places", 2, holder, 1.5) if draw.random() < 0.3 else None,
            circuit=CircuitAsk("bank", CIRCUIT, holder) if draw.random() < 0.3 else None,
            book=draw.random() < 0.8,
            booked=draw.random() < 0.3,
        )

    def holder(self) -> str:
        return self._draw.choice(("w/1", "w/2"))

    def rests(self) -> bool:
        return self._draw.random() < 0.7

    def came_to(self, found: Entered, envelope: Envelope) -> None:
        if found.due_at is not None:
            self._sequences[envelope.task_id] = envelope.sequence + 1

    def ends(self) -> float:
        return self._draw.random()

    def advance(self, clock: MicroClock) -> None:
        clock.advance(us=self._draw.choice((0, 1000, self._draw.randrange(300_000), self._draw.randrange(3_000_000))))


@pytest.mark.parametrize("seed", range(6))
def test_one_step_is_what_its_steps_are(house: House, other: House, clock: MicroClock, seed: int) -> None:
    """Over claims of every outcome, refusals of every kind, messages that rest and those that come too late."""
    seed = seed or uuid.uuid4().int % 10**6  # one of them is new each time
    draw, given, refused, rested = Draw(seed), 0, 0, 0
    for number in range(STEPS):
        draw.advance(clock)
        envelope, ask, holder = draw.envelope(clock), draw.ask(), draw.holder()
        resting = Resting(following(envelope), attempt("defer", at=clock())) if draw.rests() else None
        found = entered(house.joint, envelope, ask, holder=holder, resting=resting)
        expected = entered(StepByStep(other.store, other.permits), envelope, ask, holder=holder, resting=resting)
        assert found == expected, (seed, number)
        draw.came_to(found, envelope)
        if isinstance(found.claim, Claimed) and found.due_at is None and (chance := draw.ends()) < 0.7:
            for each in (house, other):
                if chance < 0.3:
                    each.store.complete(envelope.id, found.claim.token, result=b"1", retention=3)
                else:
                    each.store.rest(
                        envelope.id, found.claim.token, following(envelope), due_at=clock() + 1, attempt=None
                    )
        given += isinstance(found.answer, Permit)
        refused += isinstance(found.answer, Refusal)
        rested += found.due_at is not None
        assert house.store.find(envelope.id) == other.store.find(envelope.id), (seed, number)
    assert given > 10
    assert refused > rested > 2


def test_what_gets_no_custody_is_asked_nothing(house: House) -> None:
    """A duplicate of what is done, of what runs, and one told again: none of them takes a permit."""
    ask = Ask(rates=(RateAsk("bank", TokenBucket(1, per=100)),), book=True)
    first = entered(house.joint, message(), ask)
    assert isinstance(first.answer, Permit)
    again = entered(house.joint, message(), Ask(rates=(RateAsk("other", TokenBucket(1, per=100)),)))
    assert again == Entered(first.claim)
    assert isinstance(again.claim, Claimed)
    assert again.claim.repeated
    assert isinstance(house.permits.admit(Ask(rates=(RateAsk("other", TokenBucket(1, per=100)),))), Permit)


def test_a_refused_message_rests_with_its_next_delivery(house: House, clock: MicroClock) -> None:
    """Its run is over, its slot is its due time, and its history says why."""
    ask = Ask(rates=(RateAsk("bank", TokenBucket(1, per=10)),), book=True)
    entered(house.joint, message("first", task_id="first"), ask)
    late = message("late", task_id="late").replace(deadline_at=clock() + 10)
    second = message("second", task_id="second").replace(deadline_at=clock() + 10.001)
    found = entered(house.joint, second, ask, resting=Resting(following(second), attempt("defer")))
    assert found.due_at == clock() + 10
    record = house.store.find(second.id)
    assert record is not None
    assert (record.state, record.due_at, record.sequence) == (State.PENDING, clock() + 10, 1)
    assert record.attempts[-1].outcome == "defer"
    assert Envelope.from_wire(record.wire or b"") == following(second)
    found = entered(house.joint, late, ask, resting=Resting(following(late), attempt("defer")))
    assert found.due_at is None
    assert isinstance(found.claim, Claimed)
    assert house.store.holds(late.id, found.claim.token)


def test_only_stores_of_one_server_and_namespace_are_one(
    house: House, redis_url: str, namespace: str, clock: MicroClock
) -> None:
    """Elsewhere each is asked by itself."""
    elsewhere = [
        open_permits("memory://", namespace=namespace, clock=clock),
        open_permits(redis_url, namespace="another", clock=clock),
        open_permits(redis_url, namespace=namespace),
        open_permits(f"{redis_url.rstrip('0')}7", namespace=namespace, clock=clock),
    ]
    assert [house.store.joined_with(permits) for permits in elsewhere] == [None] * 4
    memory = open_store("memory://", namespace=namespace, clock=clock)
    assert memory.joined_with(house.permits) is None


def test_a_script_that_the_server_does_not_know_is_loaded(house: House) -> None:
    """After a restart or a flush."""
    ask = Ask(rates=(RateAsk("bank", TokenBucket(9)),))
    assert isinstance(entered(house.joint, message(), ask).answer, Permit)
    log = replace(ask, rates=(RateAsk("log", SlidingLog(9, per=10)),))
    assert isinstance(entered(house.joint, message("other", task_id="other"), log).answer, Permit)


def test_permits_that_fail_leave_the_claim_alone(house: House, redis_url: str) -> None:
    """A state that nobody can read fails each question. The run asks by itself then, and what is declared decides."""
    with Redis.from_url(redis_url) as client:
        client.set(f"{house.permits.partition.decode()}:permit:bucket:bank", "garbage")  # type: ignore[attr-defined]
    ask = Ask(rates=(RateAsk("bank", TokenBucket(10)),), book=True)
    found = entered(house.joint, message(), ask)
    assert isinstance(found.claim, Claimed)
    assert found.answer is None
    assert house.store.holds(message().id, found.claim.token)
    with pytest.raises(StoreError):
        house.permits.admit(ask)
