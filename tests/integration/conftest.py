"""Sites for the tests: each broker with each message store."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from taskguard.stores.redis.permits import RedisPermits
from tests import services
from tests.contracts.permits import MicroClock
from tests.integration.servers import PrivateRedis
from tests.integration.site import Site
from tests.proof.draw import plays_all, seed

BROKERS = ("redis", "rabbitmq")
STORES = ("redis", "postgresql", "mariadb", "sqlite")
SMOKE_PAIR = (BROKERS[0], STORES[0])


def pairs(*chosen: tuple[str, str]) -> list[Any]:
    """Parameters for `site`. One xdist group a pair, so that tests which share a worker run in one process."""
    return [pytest.param(pair, id="-".join(pair), marks=pytest.mark.xdist_group("-".join(pair))) for pair in chosen]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a matrix, a module plays one store with each broker, drawn by ``PROOF_SEED``; ``PROOF_ALL=1`` plays all.

    So does a test that is named in full. The first pair alone is smoke: the other servers are for the whole suite.
    """
    matrices: dict[str, set[tuple[str, str]]] = {}
    for item in items:
        pair = _pair(item)
        if pair is not None:
            matrices.setdefault(item.path.stem, set()).add(pair)
            if pair != SMOKE_PAIR:
                item.own_markers = [mark for mark in item.own_markers if mark.name != "smoke"]
    if plays_all() or any("[" in each for each in config.args):
        return
    drawn = {module: _drawn(module, matrix) for module, matrix in matrices.items()}
    chosen: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        pair = _pair(item)
        played = pair is None or pair in drawn[item.path.stem] or item.get_closest_marker("smoke") is not None
        (chosen if played else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = chosen


def _pair(item: pytest.Item) -> tuple[str, str] | None:
    callspec = getattr(item, "callspec", None)
    pair = None if callspec is None else callspec.params.get("site")
    return pair if isinstance(pair, tuple) else None


def _drawn(module: str, matrix: set[tuple[str, str]]) -> set[tuple[str, str]]:
    chance = random.Random(f"{seed()} {module}")
    by_broker: dict[str, list[tuple[str, str]]] = {}
    for pair in sorted(matrix):
        by_broker.setdefault(pair[0], []).append(pair)
    return {chance.choice(each) for each in by_broker.values()}


@pytest.fixture(scope="module", params=pairs(*product(BROKERS, STORES)))
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A broker and a store, shared by the module's tests of that pair. What is left on the servers is deleted."""
    broker, store = request.param
    with ExitStack() as stack:
        yield open_site(stack, broker, store, tmp_path_factory.mktemp(f"{broker}-{store}"))


@pytest.fixture
def no_workers(site: Site) -> Iterator[Site]:
    """The site, with none of its workers alive before and after."""
    site.kill_all()
    yield site
    site.kill_all()


def open_site(stack: ExitStack, broker: str, store: str, directory: Path, kind: type[Site] = Site) -> Site:
    """A site in a namespace of its own, closed with *stack*."""
    namespace = f"t{uuid.uuid4().hex[:16]}"
    journal = services.require("redis")
    stack.callback(services.delete_redis_keys, journal, f"*{namespace}*")
    site = kind(
        broker=_broker(stack, broker, namespace),
        store=_store(stack, store, namespace, directory),
        journal=journal,
        namespace=namespace,
        directory=directory,
    )
    stack.callback(site.close)
    return site


def _broker(stack: ExitStack, name: str, namespace: str) -> str:
    url = services.require(name)
    return stack.enter_context(services.rabbitmq_vhost(url, namespace)) if name == "rabbitmq" else url


def _store(stack: ExitStack, name: str, namespace: str, directory: Path) -> str:
    if name == "sqlite":
        return f"sqlite:///{directory / 'taskguard.sqlite3'}"
    url = services.require(name)
    if name != "redis":
        stack.callback(services.delete_rows, url, namespace)
    return url


@pytest.fixture
def permits(redis_url: str, namespace: str) -> Iterator[RedisPermits]:
    """Permits that go by the server's clock."""
    permits = RedisPermits.from_url(redis_url, namespace=namespace, timeout=5)
    yield permits
    permits.close()


@pytest.fixture
def timed(redis_url: str, namespace: str, micros: MicroClock) -> Iterator[RedisPermits]:
    """Permits that go by `micros`."""
    permits = RedisPermits.from_url(redis_url, namespace=namespace, timeout=5, clock=micros)
    yield permits
    permits.close()


@pytest.fixture
def micros() -> MicroClock:
    return MicroClock()


@pytest.fixture
def server(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def own(tmp_path: Path) -> Iterator[PrivateRedis]:
    """A server of this test's own."""
    with PrivateRedis(tmp_path / "redis", "--appendonly", "no") as own:
        yield own
