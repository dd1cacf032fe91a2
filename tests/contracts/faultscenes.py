"""One call of every method of the message store, and the right answer to it, written by hand.

A scene may be played many times in one namespace. What it expects holds however often the call was made, and whichever
of its replies were lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from taskguard.custody import Claimed, Entered, Hold, Leased, Unique
from taskguard.permits import Ask, RateAsk
from taskguard.policies import TokenBucket
from taskguard.ports import MessageStore
from taskguard.record import State
from taskguard.stores.memory import MemoryPermits
from taskguard.stores.redis.messages import RedisStore
from taskguard.stores.redis.permits import RedisPermits
from tests.contracts.messages import DAY, LEASE, ask, attempt, existing, failure, hold, message, run

AGREED = 60.0
"""Seconds by which the clocks of two stores may differ, and a call and its repeat may last, on a busy machine."""

Call = Callable[[MessageStore], Any]
Scene = Callable[[MessageStore, str], tuple[Call, Callable[[Any, MessageStore], None]]]
"""Prepares the store for a key; returns the call, and a check of its answer and of what the store then holds."""

SCENES: dict[str, Scene] = {}


def scene(prepare: Scene) -> Scene:
    """Of the method that the function is named after."""
    SCENES[prepare.__name__.removeprefix("of_")] = prepare
    return prepare


def methods() -> set[str]:
    """Every operation of the port. `watch_due` does not end, and outlives whatever becomes of its connection."""
    public = {name for name, value in vars(MessageStore).items() if callable(value) and not name.startswith("_")}
    return public - {"watch_due"}


def ended(state: State, id: str) -> Callable[[Any, MessageStore], None]:
    """The answer is True, and the record is in *state*."""

    def check(answer: Any, store: MessageStore) -> None:
        assert answer is True
        assert existing(store, id).state is state

    return check


@scene
def of_claim(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    def check(answer: Any, store: MessageStore) -> None:
        assert isinstance(answer, Claimed)
        assert answer.crashes == 0
        assert store.holds(message(key).id, answer.token)

    return lambda s: ask(s, message(key)), check


@scene
def of_joined_with(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    """A claim that asks for permits too, where a store has that."""
    asked = Ask(rates=(RateAsk(f"bank {key}", TokenBucket(5, per=DAY)),), book=True)

    def call(store: MessageStore) -> Entered | None:
        if not isinstance(store, RedisStore):
            assert store.joined_with(MemoryPermits()) is None
            return None
        namespace = store._partition.decode().split(":")[1]
        joint = store.joined_with(RedisPermits(store._connections, namespace=namespace))
        assert joint is not None
        return joint.claim(message(key), holder="worker-1/a", lease=LEASE, max_crashes=3, ask=asked, resting=None)

    def check(answer: Any, store: MessageStore) -> None:
        if answer is not None:
            assert isinstance(answer.claim, Claimed)
            assert answer.claim.repeated == (answer.answer is None)
            assert store.holds(message(key).id, answer.claim.token)

    return call, check


@scene
def of_renew(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    run(store, message(key))
    holds = [hold(message(key)), Hold("nobody", "no")]

    def check(answer: Any, store: MessageStore) -> None:
        assert answer == [True, False]
        assert existing(store, message(key).id).kept

    return lambda s: s.renew(holds, lease=LEASE, keep=True), check


@scene
def of_holds(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    token = run(store, message(key))
    return lambda s: s.holds(message(key).id, token), ended(State.RUNNING, message(key).id)


@scene
def of_complete(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    token = run(store, message(key))
    call = lambda s: s.complete(message(key).id, token, result=b"7", retention=DAY)  # noqa: E731
    return call, ended(State.DONE, message(key).id)


@scene
def of_writes_results_to(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    return lambda s: s.writes_results_to("no.such.host.invalid", 1), same(False)


@scene
def of_rest(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    token = run(store, message(key))
    following, line = message(key, sequence=1), attempt("retry")

    def check(answer: Any, store: MessageStore) -> None:
        ended(State.PENDING, following.id)(answer, store)
        record = existing(store, following.id)
        assert (record.sequence, [a.outcome for a in record.attempts]) == (1, ["retry"])

    return lambda s: s.rest(following.id, token, following, due_at=s.now() + DAY, attempt=line), check


@scene
def of_bury(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    token = run(store, message(key))

    def check(answer: Any, store: MessageStore) -> None:
        ended(State.DEAD, message(key).id)(answer, store)
        assert len(existing(store, message(key).id).attempts) == 1

    return lambda s: s.bury(message(key).id, token, failure=failure(), attempt=attempt("dead")), check


@scene
def of_discard(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    token = run(store, message(key))
    call = lambda s: s.discard(message(key).id, token, reason="expired", retention=DAY)  # noqa: E731
    return call, ended(State.DISCARDED, message(key).id)


@scene
def of_crash(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    run(store, message(key))

    def check(answer: Any, store: MessageStore) -> None:
        record = existing(store, message(key).id)
        assert (record.state, record.crashes) == (State.PENDING, 1), "counted once, however often it was told"
        assert answer in (True, False), "False: the run had ended already, by the very same crash"

    return lambda s: s.crash(hold(message(key)), message(key), attempt=attempt("crash")), check


@scene
def of_finish(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    token = run(store, message(key))
    store.renew([hold(message(key))], lease=LEASE, keep=True)
    store.complete(message(key).id, token, result=b"7", retention=DAY)

    def check(answer: Any, store: MessageStore) -> None:
        assert not existing(store, message(key).id).kept

    return lambda s: s.finish([hold(message(key))]), check


@scene
def of_schedule(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    envelope = message(key, task_id=key)

    def check(answer: Any, store: MessageStore) -> None:
        assert answer == key
        assert existing(store, envelope.copy_id).state is State.PENDING

    return lambda s: s.schedule(envelope, due_at=s.now() + DAY, unique=Unique(key, DAY)), check


@scene
def of_bury_message(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    def check(answer: Any, store: MessageStore) -> None:
        assert answer == message(key).copy_id
        assert existing(store, answer).state is State.DEAD

    return lambda s: s.bury_message(message(key), failure=failure()), check


@scene
def of_take_due(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    envelope = message(key)
    store.schedule(envelope, due_at=1.0)

    def check(answer: Any, store: MessageStore) -> None:
        # A lost answer leaves the message leased to nobody and still at rest: it comes due when that lease ends.
        record = existing(store, envelope.copy_id)
        assert (record.state, record.wire) == (State.PENDING, envelope.to_wire())
        assert record.lease
        assert record.due_at is not None
        assert abs(record.due_at - store.now() - DAY) < AGREED, "a lease as long as was asked for"

    return lambda s: s.take_due(limit=100, lease=DAY), check


@scene
def of_due_in(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    due_in = min(store.due_in() or 0.0, 0.0) - 1000.0
    store.schedule(message(key), due_at=store.now() + due_in)

    def check(answer: Any, _: MessageStore) -> None:
        assert abs(answer - due_in) < AGREED

    return lambda s: s.due_in(), check


@scene
def of_remove(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    store.schedule(message(key), due_at=store.now() + DAY, lease="mine")

    def check(answer: Any, store: MessageStore) -> None:
        assert store.find(message(key).copy_id) is None
        assert answer in (0, 1), "0: not leased to the caller any more, because it was removed"

    return lambda s: s.remove([Leased(message(key).copy_id, "mine", b"")]), check


@scene
def of_release_unique(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    store.schedule(message(key, task_id=key), due_at=store.now() + DAY, unique=Unique(key, DAY))

    def check(answer: Any, store: MessageStore) -> None:
        assert answer in (True, False), "False: held no more, because it was released"
        other = message(key, task_id="another")
        assert store.schedule(other, due_at=store.now() + DAY, unique=Unique(key, DAY)) == "another"

    return lambda s: s.release_unique(key, key), check


@scene
def of_revoke(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    def check(answer: Any, store: MessageStore) -> None:
        assert getattr(ask(store, message(key, task_id=key)), "reason", None) == "revoked"

    return lambda s: s.revoke([key, f"{key}-2"], retention=DAY), check


@scene
def of_find(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    run(store, message(key))
    return lambda s: s.find(message(key).id), same(existing(store, message(key).id))


@scene
def of_scan(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    before = [record.id for record in store.scan(State.DEAD)]
    store.bury_message(message(key), failure=failure())
    return lambda s: {record.id for record in s.scan(State.DEAD)}, same({*before, message(key).copy_id})


@scene
def of_depths(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    expected = {state: depth.count + (state is State.DEAD) for state, depth in store.depths().items()}
    store.bury_message(message(key), failure=failure())
    return lambda s: {state: depth.count for state, depth in s.depths().items()}, same(expected)


@scene
def of_requeue(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    id = store.bury_message(message(key), failure=failure())

    def check(answer: Any, store: MessageStore) -> None:
        record = existing(store, id)
        assert (record.state, len(record.attempts)) == (State.PENDING, 1)
        assert answer in (True, False), "False: no dead letter any more, because it was requeued"

    return lambda s: s.requeue(id, message(key, sequence=1), due_at=s.now() + DAY), check


@scene
def of_purge(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    id = store.bury_message(message(key), failure=failure())

    def check(answer: Any, store: MessageStore) -> None:
        assert store.find(id) is None
        assert answer in (True, False), "False: none there, because it was purged"

    return lambda s: s.purge(id, retention=DAY), check


@scene
def of_expire(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    token = run(store, message(key))
    store.complete(message(key).id, token, result=b"7", retention=0.0)

    def check(answer: Any, store: MessageStore) -> None:
        assert answer >= 0, "a record that a lost connection still locks is passed over, and goes the next time"
        assert store.find(message(key).id) is None

    return lambda s: s.expire(limit=10), check


@scene
def of_now(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    def check(answer: Any, store: MessageStore) -> None:
        assert abs(answer - store.now()) < AGREED

    return lambda s: s.now(), check


@scene
def of_ping(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    return lambda s: s.ping(), same(None)


@scene
def of_close(store: MessageStore, key: str) -> tuple[Call, Callable[[Any, MessageStore], None]]:
    return lambda s: s.close(), same(None)


def same(expected: Any) -> Callable[[Any, MessageStore], None]:
    """The answer is *expected*."""

    def check(answer: Any, store: MessageStore) -> None:
        assert answer == expected

    return check
