"""`install`: what is wired, what is set where the user set nothing, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery, Task
from celery.worker.consumer import Consumer as CeleryConsumer

import taskguard
from taskguard import ConfigurationError, ReliableTask, StoreUnavailable
from taskguard.celery.consumer import Consumer
from taskguard.celery.install import CONSUMER, VISIBILITY_TIMEOUT
from taskguard.celery.runtime import Runtime, runtime_of


class OwnConsumer(Consumer):
    """A user's consumer, derived from ours."""


def fresh(broker: str = "memory://", **conf: Any) -> Celery:
    """An application that nobody has touched."""
    app = Celery("fresh", broker=broker, set_as_current=False)
    app.conf.update(conf)
    return app


def test_safe_settings_are_made_where_there_are_none() -> None:
    """Prefetch one, a short visibility timeout, the consumer that keeps what Celery drops."""
    app = fresh("redis://localhost")
    taskguard.install(app, store="memory://")
    assert app.conf.worker_consumer == CONSUMER
    assert app.conf.worker_prefetch_multiplier == 1
    assert app.conf.broker_transport_options["visibility_timeout"] == VISIBILITY_TIMEOUT
    assert app.conf.broker_connection_retry_on_startup is True


def test_what_the_user_set_stays() -> None:
    """Whether the configuration is read before or after."""
    given = {
        "worker_prefetch_multiplier": 4,
        "broker_transport_options": {"visibility_timeout": 900, "priority_steps": [0]},
        "worker_consumer": f"{__name__}:OwnConsumer",
        "broker_connection_retry_on_startup": False,
    }
    for early in (True, False):
        app = fresh("redis://localhost", **(given if early else {}))
        if early:
            assert app.conf.worker_prefetch_multiplier == 4
        taskguard.install(app, store="memory://")
        if not early:
            app.conf.update(given)
        options = app.conf.broker_transport_options
        assert options["visibility_timeout"] == 900
        assert options["priority_steps"] == [0]
        assert {name: app.conf[name] for name in given} == given | {"broker_transport_options": options}


def test_rabbitmq_confirms_what_is_published() -> None:
    """An unconfirmed message can be lost with its connection."""
    app = fresh("amqp://localhost")
    taskguard.install(app, store="memory://")
    assert app.conf.broker_transport_options["confirm_publish"] is True


@pytest.mark.parametrize(
    ("broker", "conf", "named"),
    [
        ("amqp://localhost", {"broker_transport_options": {"confirm_publish": False}}, "confirm_publish"),
        ("memory://", {"task_protocol": 1}, "task_protocol"),
        ("memory://", {"worker_consumer": CeleryConsumer}, "worker_consumer"),
    ],
)
def test_what_would_lose_work_is_refused(broker: str, conf: dict[str, Any], named: str) -> None:
    """At once where the configuration is known, else at the first message or the start of a worker."""
    app = fresh(broker, **conf)
    app.conf.task_protocol  # noqa: B018 (reads the configuration)
    with pytest.raises(ConfigurationError, match=named):
        taskguard.install(app, store="memory://")
    lazy = fresh(broker, **conf)
    taskguard.install(lazy, store="memory://")
    with pytest.raises(ConfigurationError, match=named):
        lazy.send_task("anything")
    with pytest.raises(ConfigurationError, match=named):
        runtime_of(lazy).check_worker(shared_memory=True)


@pytest.mark.parametrize("option", ["acks_late", "acks_on_failure", "acks_on_timeout", "acks_on_failure_or_timeout"])
def test_a_task_that_would_lose_its_message_is_refused(option: str) -> None:
    """In the class body, and at the decorator's line."""
    app = fresh()
    taskguard.install(app, store="memory://")
    with pytest.raises(ConfigurationError, match=option):
        app.task(base=ReliableTask, **{option: False})(lambda: None)
    with pytest.raises(ConfigurationError, match=option):
        type("Charge", (ReliableTask,), {option: False})


def test_an_unknown_setting_is_refused_at_once() -> None:
    """With those there are."""
    with pytest.raises(ConfigurationError, match=r"leese.*lease"):
        taskguard.install(fresh(), leese=10)


def test_installing_twice_wires_once() -> None:
    """Without settings it changes nothing; with settings it replaces them."""
    app = fresh()
    first = taskguard.install(app, store="memory://", lease=10)
    assert taskguard.install(app) is first
    kinds = app.amqp_cls, app.control_cls
    second = taskguard.install(app, store="memory://", lease=20)
    assert runtime_of(app) is second
    assert (second.settings.lease, app.amqp_cls, app.control_cls) == (20, *kinds)


def test_a_task_wires_its_application_by_itself() -> None:
    """``base=ReliableTask`` is enough."""
    app = fresh(taskguard_store="memory://", taskguard_lease=7)

    @app.task(base=ReliableTask, shared=False, name="shop.charge")
    def charge() -> None: ...

    app.finalize()
    assert isinstance(app.tasks["shop.charge"].guard, Runtime)
    assert runtime_of(app).settings.lease == 7


def test_settings_come_from_the_configuration_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument before the configuration before the environment."""
    monkeypatch.setenv("TASKGUARD_LEASE", "30s")
    monkeypatch.setenv("TASKGUARD_NAMESPACE", "environment")
    app = fresh(taskguard_lease=20, taskguard_max_crashes=7)
    runtime = taskguard.install(app, max_crashes=2)
    assert (runtime.settings.max_crashes, runtime.settings.lease) == (2, 20)
    assert runtime.settings.namespace == "environment"


def test_an_application_without_taskguard_is_named() -> None:
    """The message says what to call."""
    with pytest.raises(ConfigurationError, match=r"taskguard\.install"):
        runtime_of(fresh())


@pytest.mark.parametrize(
    ("store", "shared", "named"), [(None, True, "TASKGUARD_STORE"), ("memory://", False, "not shared")]
)
def test_a_worker_without_a_store_it_can_use_does_not_start(store: str | None, shared: bool, named: str) -> None:
    """One line with the way out."""
    runtime = taskguard.install(fresh(), **({"store": store} if store else {}))
    with pytest.raises(ConfigurationError, match=named) as caught:
        runtime.check_worker(shared_memory=shared)
    assert "\n" not in str(caught.value)


def test_a_worker_whose_store_is_away_does_not_start() -> None:
    """Rather than take messages it cannot keep."""
    runtime = taskguard.install(fresh(), store="redis://127.0.0.1:1/0", store_timeout=0.5)
    with pytest.raises(StoreUnavailable):
        runtime.check_worker(shared_memory=True)


def test_a_worker_in_one_process_may_use_its_memory() -> None:
    """Solo, threads and gevent share it."""
    taskguard.install(fresh(), store="memory://").check_worker(shared_memory=True)


@pytest.mark.parametrize("app_wide", [True, False])
def test_a_template_that_names_no_argument_fails_at_its_line(app_wide: bool) -> None:
    """Celery builds the task much later; the mistake must not wait for the worker."""
    app = Celery("fresh", broker="memory://", set_as_current=False, task_cls=ReliableTask if app_wide else Task)
    taskguard.install(app, store="memory://")
    with pytest.raises(ConfigurationError, match="missing"):

        @app.task(idempotency_key="x:{missing}", **({} if app_wide else {"base": ReliableTask}))
        def charge(order_id: int) -> None: ...


def test_plain_tasks_are_left_alone() -> None:
    """What is declared for Celery's Task is Celery's business."""
    app = fresh()
    taskguard.install(app, store="memory://")

    @app.task(shared=False, acks_late=False)
    def plain(x: int) -> int:
        return x

    @app.task
    def bare(x: int) -> int:
        return x

    assert plain(3) == bare(3) == 3
    assert not isinstance(plain, ReliableTask)
