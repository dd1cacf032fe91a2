"""A result entry is written with the completion or not at all, where the result backend is on the store's server."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from redis import Redis

from taskguard.custody import ResultEntry
from taskguard.ports import MessageStore
from taskguard.record import State
from tests.clocks import ManualClock
from tests.contracts.messages import DAY, LEASE, existing, failure, message, run

ELSEWHERE = 10
"""A database that is not the store's."""


@pytest.fixture(params=["the store's", "another"])
def database(request: pytest.FixtureRequest, redis_url: str) -> int:
    """Where results are."""
    return int(urlsplit(redis_url).path.strip("/") or 0) if request.param == "the store's" else ELSEWHERE


@pytest.fixture
def results(redis_url: str, database: int, namespace: str) -> Iterator[Redis]:
    """The result backend's side, emptied of this test's keys afterwards."""
    with Redis.from_url(urlsplit(redis_url)._replace(path=f"/{database}").geturl()) as client:
        yield client
        for key in client.scan_iter(match=f"*{namespace}*", count=1000):
            client.delete(key)


@pytest.fixture
def entry(database: int, namespace: str) -> ResultEntry:
    """The result of ``task-1``, kept for a minute."""
    return ResultEntry(database, f"{namespace}:meta-task-1".encode(), b'{"result": 1}\x00\xff', 60)


on_redis = pytest.mark.parametrize("store_url", ["redis"], indirect=True)


@on_redis
def test_the_entry_is_kept_for_its_seconds_and_told_on_its_channel(
    store: MessageStore, results: Redis, entry: ResultEntry
) -> None:
    """As the result backend does it: the value under its key, its expiry, and the value again as a message."""
    with results.pubsub(ignore_subscribe_messages=True) as listener:
        listener.subscribe(entry.key)
        assert listener.get_message(timeout=5) is None  # the subscription stands
        token = run(store, message())
        assert store.complete(message().id, token, result=b"1", retention=DAY, entry=entry)
        told = listener.get_message(timeout=5)
    assert told is not None
    assert told["data"] == entry.payload
    assert results.get(entry.key) == entry.payload
    assert 30 <= results.ttl(entry.key) <= 60
    assert existing(store, message().id).state is State.DONE


@on_redis
def test_an_entry_without_an_expiry_stays(store: MessageStore, results: Redis, entry: ResultEntry) -> None:
    """``result_expires`` of nothing, or None."""
    forever = ResultEntry(entry.database, entry.key, entry.payload, 0)
    assert store.complete(message().id, run(store, message()), result=b"1", retention=DAY, entry=forever)
    assert results.ttl(entry.key) == -1


@on_redis
def test_an_entry_replaces_what_an_earlier_state_left(store: MessageStore, results: Redis, entry: ResultEntry) -> None:
    """STARTED, or RETRY, gives way."""
    results.set(entry.key, b"STARTED")
    assert store.complete(message().id, run(store, message()), result=b"1", retention=DAY, entry=entry)
    assert results.get(entry.key) == entry.payload


@on_redis
@pytest.mark.parametrize("end", ["taken over", "buried", "discarded", "at rest", "forgotten", "never claimed"])
def test_a_stale_token_writes_no_entry(
    store: MessageStore, clock: ManualClock, results: Redis, entry: ResultEntry, end: str
) -> None:
    """A run that lost its custody, however, tells nobody of its result."""
    id, token = message().id, 1
    if end != "never claimed":
        token = run(store, message(), "worker-1/a")
    match end:
        case "taken over":
            clock.advance(LEASE)
            run(store, message(), "worker-2/b")
        case "buried":
            store.bury(id, token, failure=failure(), attempt=None)
        case "discarded":
            store.discard(id, token, reason="ignored", retention=DAY)
        case "at rest":
            store.rest(id, token, message(sequence=1), due_at=clock() + 60, attempt=None)
        case "forgotten":
            store.discard(id, token, reason="ignored", retention=60)
            clock.advance(60)
    with results.pubsub(ignore_subscribe_messages=True) as listener:
        listener.subscribe(entry.key)
        assert listener.get_message(timeout=5) is None
        assert not store.complete(id, token, result=b"1", retention=DAY, entry=entry)
        results.publish(entry.key, "the end")
        told = listener.get_message(timeout=5)
    assert told is not None
    assert told["data"] == b"the end"
    assert not results.exists(entry.key)


@on_redis
def test_completing_again_writes_no_second_entry(store: MessageStore, results: Redis, entry: ResultEntry) -> None:
    """A call repeated after a lost reply: the entry is there from the first, and may have been forgotten since."""
    token = run(store, message())
    assert store.complete(message().id, token, result=b"1", retention=DAY, entry=entry)
    results.delete(entry.key)
    assert store.complete(message().id, token, result=b"1", retention=DAY, entry=entry)
    assert not results.exists(entry.key)


@on_redis
def test_the_store_stays_in_its_own_database(store: MessageStore, results: Redis, entry: ResultEntry) -> None:
    """A script's change of database ends with the script."""
    first, second = message("order-1"), message("order-2", task_id="task-2")
    for envelope in (first, second):
        assert store.complete(envelope.id, run(store, envelope), result=b"1", retention=DAY, entry=entry)
        assert existing(store, envelope.id).state is State.DONE


def test_a_store_says_which_servers_results_it_writes(store: MessageStore, store_url: str) -> None:
    """Its own, if it is a Redis server; nobody else's."""
    parts = urlsplit(store_url)
    own = (parts.hostname or "localhost", parts.port or 6379)
    assert store.writes_results_to(*own) is store_url.startswith("redis")
    assert not store.writes_results_to("elsewhere", own[1])
    assert not store.writes_results_to(own[0], own[1] + 1)
    assert not store.writes_results_to(*own, "another"), "an access list may refuse the store what the backend may do"
