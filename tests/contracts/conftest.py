"""The `store` fixture: the same tests over every backend."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import pytest

from taskguard.clock import Clock
from taskguard.ports import MessageStore, PermitStore
from taskguard.stores import open_permits, open_store
from tests.clocks import ManualClock
from tests.contracts.permits import MicroClock

BACKENDS = ("memory", "redis", "sqlite", "postgresql", "mariadb")

OpenStore = Callable[[str, Clock | None], MessageStore]


@pytest.fixture(params=BACKENDS)
def store_url(request: pytest.FixtureRequest) -> str:
    """The URL of each backend in turn."""
    if request.param == "memory":
        return "memory://"
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def store(store_url: str, namespace: str, clock: ManualClock) -> Iterator[MessageStore]:
    """An empty store that goes by the manual clock."""
    store = open_store(store_url, namespace=namespace, clock=clock)
    yield store
    store.close()


@pytest.fixture
def new_store(store_url: str, namespace: str) -> Iterator[Callable[[Clock], MessageStore]]:
    """Open as many empty stores of one backend as a test needs."""
    opened: list[MessageStore] = []

    def open_empty(clock: Clock) -> MessageStore:
        store = open_store(store_url, namespace=f"{namespace}-{uuid.uuid4().hex[:8]}", clock=clock)
        opened.append(store)
        return store

    yield open_empty
    for store in opened:
        store.close()


@pytest.fixture
def micros() -> MicroClock:
    """A clock of whole microseconds that moves only when the test says so."""
    return MicroClock()


@pytest.fixture
def permits(store_url: str, namespace: str, micros: MicroClock) -> Iterator[PermitStore]:
    """An empty permit store that goes by `micros`."""
    permits = open_permits(store_url, namespace=namespace, timeout=30, clock=micros)
    yield permits
    permits.close()
