"""Being told by Redis of what comes due and of paused queues: over outages, and where a user may not listen."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from redis import Redis

from taskguard.stores.redis import RedisStore
from taskguard.stores.redis.permits import RedisPermits
from tests.contracts.messages import message
from tests.integration.servers import PrivateRedis

Told = Callable[[bool], None]


@contextmanager
def listening(watch: Callable[..., None]) -> Iterator[queue.Queue[bool]]:
    """What is told, in its order, while the block is open."""
    told: queue.Queue[bool] = queue.Queue()
    over = threading.Event()
    threading.Thread(target=watch, args=(told.put,), kwargs={"stop": over.is_set}, daemon=True).start()
    try:
        yield told
    finally:
        over.set()


def test_a_lost_line_is_told_of_and_made_again(own: PrivateRedis) -> None:
    """Until it is, whoever listens looks by itself."""
    store = RedisStore.from_url(own.url, namespace="n", timeout=1)
    with listening(store.watch_due) as told:
        assert told.get(timeout=10)
        own.kill()
        assert not told.get(timeout=10)
        own.start()
        while not told.get(timeout=10):
            pass
        store.schedule(message(), due_at=store.now())
        assert told.get(timeout=10)
    store.close()


def test_a_silent_line_is_told_of(own: PrivateRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut cable says nothing."""
    monkeypatch.setattr("taskguard.stores.redis.subscription.SILENCE", 0.2)
    permits = RedisPermits.from_url(own.url, namespace="n", timeout=0.2)
    with listening(permits.watch_paused) as told:
        assert told.get(timeout=10)
        with own.frozen():
            assert not told.get(timeout=10)
        while not told.get(timeout=10):
            pass
    permits.close()


def test_who_may_not_publish_is_not_told(own: PrivateRedis) -> None:
    """Its own scripts could not tell either, and it looks by itself; what they do is done all the same."""
    with Redis.from_url(own.url) as admin:
        admin.acl_setuser("quiet", enabled=True, nopass=True, keys=["*"], commands=["+@all"], reset_channels=True)
    url = own.url.replace("redis://", "redis://quiet:@", 1)
    store = RedisStore.from_url(url, namespace="n", timeout=5)
    with listening(store.watch_due) as told:
        assert not told.get(timeout=10)
        store.schedule(message(), due_at=store.now())
        due_in: Any = store.due_in()
        assert due_in <= 0
        with pytest.raises(queue.Empty):
            told.get(timeout=0.5)
    store.close()


def test_many_that_listen_do_not_ring_each_other(own: PrivateRedis) -> None:
    """After a restart all subscribe anew, and each would wake all."""
    store = RedisStore.from_url(own.url, namespace="n", timeout=5)
    with listening(store.watch_due) as first:
        assert first.get(timeout=10)
        with listening(store.watch_due) as second:
            assert second.get(timeout=10)
            store.schedule(message(), due_at=store.now())
            assert second.get(timeout=10)
            assert first.get(timeout=10)
        assert first.empty()
    store.close()
