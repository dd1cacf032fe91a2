"""Where taskguard's Redis transport is used: by itself for Redis, not where the user chose another."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery, Task
from kombu.connection import Connection as StockConnection
from kombu.transport import redis as stock

import taskguard
from taskguard import ReliableTask
from taskguard.celery.redis_broker.transport import Transport
from taskguard.celery.worker import OF_A_LEASE, fit_transport


def installed(broker: str, **conf: Any) -> Celery:
    """An application with taskguard."""
    app = Celery("shop", broker=broker, set_as_current=False)
    app.conf.update(conf)
    taskguard.install(app, store="memory://", lease=9)
    return app


@pytest.mark.parametrize("url", ["redis://:secret@localhost:1/3", "rediss://localhost:1//", "redis+socket:///tmp/none"])
def test_redis_uses_ours_and_looks_as_before(url: str) -> None:
    """For reading, writing and clones; shown URLs do not change."""
    app = installed(url)
    for connection in (app.connection_for_read(), app.connection_for_write(), app.connection().clone()):
        assert connection.get_transport_cls() is Transport
        assert connection.as_uri() == StockConnection(url).as_uri()
        assert connection.transport.driver_type == "redis"


@pytest.mark.parametrize(
    ("url", "conf", "used"),
    [
        ("redis://localhost:1", {"broker_transport": "redis"}, stock.Transport),
        ("redis://localhost:1", {"broker_transport": "kombu.transport.redis:Transport"}, stock.Transport),
        ("sentinel://localhost:1", {}, stock.SentinelTransport),
    ],
)
def test_another_transport_stays(url: str, conf: dict[str, Any], used: type) -> None:
    """One that the user has named, and Sentinel's."""
    assert installed(url, **conf).connection_for_read().get_transport_cls() is used


def test_other_applications_keep_theirs() -> None:
    """Nothing of kombu's is changed."""
    installed("redis://localhost:1").connection_for_read().get_transport_cls()
    other = Celery("other", broker="redis://localhost:1", set_as_current=False)
    assert other.connection_for_read().get_transport_cls() is stock.Transport


@pytest.mark.parametrize(("base", "lease"), [(ReliableTask, 9 * OF_A_LEASE), (Task, None)])
def test_only_a_worker_of_reliable_tasks_owns_what_it_takes(base: type[Task], lease: float | None) -> None:
    """A plain task that is given back early would run twice."""
    app = installed("redis://localhost:1")

    @app.task(name="shop.sell", base=base, shared=False)
    def sell() -> None: ...

    app.finalize()
    assert "owner_lease" not in app.conf.broker_transport_options, "no owner but a worker"
    fit_transport(app)
    assert app.conf.broker_transport_options.get("owner_lease") == lease
