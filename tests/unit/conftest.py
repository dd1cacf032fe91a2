"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from celery import _state

from taskguard.stores.sql import administration
from tests.clocks import ManualClock
from tests.unit.gatehouse import House
from tests.unit.terminal import Run, type_in
from tests.unit.transactionalshop import Shop


@pytest.fixture
def house(clock: ManualClock) -> House:
    """A gate of this test's own."""
    return House(clock)


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    """A shop with a database of its own."""
    shop = Shop(tmp_path / "shop.sqlite3")
    yield shop
    shop.close()


@pytest.fixture(autouse=True)
def no_shared_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery gives each application the tasks of every other in the process; a test's application has its own."""
    own = {each for each in _state._on_app_finalizers if each.__module__ == "celery.app.builtins"}
    monkeypatch.setattr(_state, "_on_app_finalizers", own)


@pytest.fixture(params=["memory", "sqlite", "redis"])
def store_url(request: pytest.FixtureRequest) -> str:
    """The URL of each backend in turn."""
    if request.param == "memory":
        return "memory://"
    url: str = request.getfixturevalue(f"{request.param}_url")
    if request.param == "sqlite":
        administration.create(url)  # a worker has used it
    return url


@pytest.fixture
def run(request: pytest.FixtureRequest, store_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Type a command at this store: of the module's ``COMMAND``, if it has one."""
    monkeypatch.setenv("TASKGUARD_STORE", store_url)
    monkeypatch.setenv("TASKGUARD_NAMESPACE", namespace)
    monkeypatch.setenv("LOGNAME", "ann")
    return partial(type_in, *getattr(request.module, "COMMAND", ()))
