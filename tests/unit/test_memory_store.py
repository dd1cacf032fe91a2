"""What the memory store promises beyond the contract."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from taskguard.custody import Claimed, InProgress
from taskguard.envelope import Envelope
from taskguard.errors import ConfigurationError
from taskguard.ports import MessageStore
from taskguard.stores import open_store
from taskguard.stores.memory import MemoryStore
from tests.clocks import ManualClock

ENVELOPE = Envelope(task="shop.charge", task_id="task-1", key="order-1", body=b"[]")
THREADS = 8


def test_a_process_has_one_store_per_namespace(namespace: str) -> None:
    """The producer and the eager task meet in it."""
    assert open_store("memory://", namespace=namespace) is open_store("memory://", namespace=namespace)
    assert open_store("memory://", namespace=namespace) is not open_store("memory://", namespace=f"{namespace}-other")


def test_a_store_with_a_clock_is_new(namespace: str, clock: ManualClock) -> None:
    """A test's clock does not get into another test's store."""
    one, other = (open_store("memory://", namespace=namespace, clock=clock) for _ in range(2))
    assert one is not other


def test_threads_race_for_one_key(namespace: str) -> None:
    """The threads pool and gevent: exactly one is given custody."""
    store: MessageStore = MemoryStore()
    start = threading.Barrier(THREADS)

    def ask(number: int) -> type:
        start.wait(10)
        return type(store.claim(ENVELOPE, holder=f"thread-{number}", lease=15, max_crashes=3))

    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(ask, range(THREADS)))
    assert (answers.count(Claimed), answers.count(InProgress)) == (1, THREADS - 1)


def test_an_exception_leaves_nothing_behind(clock: ManualClock) -> None:
    """A batch that fails half way is as if it never was."""
    store = MemoryStore(clock)
    token = store.claim(ENVELOPE, holder="worker/a", lease=15, max_crashes=3)
    assert isinstance(token, Claimed)
    before = store.find(ENVELOPE.id)
    with pytest.raises(AttributeError):
        store.rest(ENVELOPE.id, token.token, None, due_at=0, attempt=None)  # type: ignore[arg-type]
    assert store.find(ENVELOPE.id) == before


@pytest.mark.parametrize("url", ["", "memory", "amqp://localhost", "http://localhost", "redsi://localhost"])
def test_a_url_of_no_store_is_refused_with_the_known_schemes(url: str) -> None:
    """What, the value, and the way out."""
    with pytest.raises(ConfigurationError, match="is not a store URL; use one of redis://"):
        open_store(url)
