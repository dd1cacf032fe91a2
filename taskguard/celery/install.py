"""Wiring: `install` prepares an application so that its workers take custody and its producers stamp their messages.

It sets Celery settings only where the user has set none, and refuses those that would lose work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.utils.imports import symbol_by_name

from taskguard.celery.publishing import delaying
from taskguard.celery.runtime import Runtime, runtime_of
from taskguard.errors import ConfigurationError

VISIBILITY_TIMEOUT = 60
"""Seconds until Redis hands out a message again that its worker neither settled nor acknowledged. Custody makes a
short one safe: a run in progress is recognised, and a renewed run is acknowledged long before."""

RESTORE_INTERVAL = 5
"""Seconds between two looks for such messages; kombu's own hundred would make the timeout above meaningless."""

CONSUMER = "taskguard.celery.consumer:Consumer"


def install(app: Celery, **settings: Any) -> Runtime:
    """Wire taskguard into *app*: store, permits, worker consumer, heartbeat, relay, publishing, durable revoking.

    The permits become those of every `Downstream` in this process that names no store.

    *settings* are those of `taskguard.Settings`; what is not given is read from ``taskguard_*`` in Celery's
    configuration and ``TASKGUARD_*`` in the environment. Calling it again with settings replaces them.
    Raises ConfigurationError for an unknown setting or store at once, and for a Celery setting that would lose work
    when the configuration is loaded.
    """
    from taskguard.celery.pausing import Pauser
    from taskguard.celery.worker import Beating, Relaying
    from taskguard.settings import Settings
    from taskguard.stores import room_of

    given = Settings.read(settings, {}, {})
    for url in filter(None, (given.store, given.permits)):
        room_of(url)
    runtime = getattr(app, "taskguard", None)
    if isinstance(runtime, Runtime) and not settings:
        return runtime
    already = isinstance(runtime, Runtime)
    runtime = Runtime(app, settings)
    app.taskguard = runtime
    runtime.lend_permits()
    if already:
        return runtime
    app.amqp_cls = _mixed(app.amqp_cls, "taskguard.celery.redis_broker.connection:ConnectingMixin")
    app.amqp_cls = _mixed(app.amqp_cls, "taskguard.celery.publishing:PublishingMixin")
    app.control_cls = _mixed(app.control_cls, "taskguard.celery.control:DurableControlMixin")
    for made in ("amqp", "control"):
        app.__dict__.pop(made, None)
    app.steps["worker"].update((Beating, Relaying))
    app.steps["consumer"].add(Pauser)
    _check_when_declared(app)
    app.send_task = delaying(app)
    if app.configured:
        _configure(app)
    else:
        app.on_after_configure.connect(_on_configured, weak=False)
    return runtime


def _check_when_declared(app: Celery) -> None:
    """Make ``@app.task`` check a reliable task at its own line; Celery builds the task much later, in the worker."""
    from taskguard.celery.task import ReliableTask

    decorate = app.task

    def task(*args: Any, **options: Any) -> Any:
        base = symbol_by_name(options.get("base") or app.task_cls)
        reliable = isinstance(base, type) and issubclass(base, ReliableTask)
        meant = sorted(ReliableTask.options() & options.keys())
        if meant and not reliable:
            raise ConfigurationError(f"{meant[0]}= has no effect on a plain task; add base=ReliableTask")
        if args or not reliable:
            return decorate(*args, **options)

        def declared(function: Callable[..., Any]) -> Any:
            body = function if options.get("bind") else staticmethod(function)
            type(function.__name__, (base,), {"run": body, **{k: v for k, v in options.items() if k != "base"}})
            return decorate(**options)(function)

        return declared

    app.task = task


def _mixed(base: Any, mixin: str) -> type:
    base_class = symbol_by_name(base)
    return type(base_class.__name__, (symbol_by_name(mixin), base_class), {"__module__": base_class.__module__})


def _on_configured(sender: Celery, **_: Any) -> None:
    # Celery swallows what a signal's receiver raises: the refusal is kept and raised at the first publish or start.
    try:
        _configure(sender)
    except ConfigurationError as exc:
        runtime_of(sender).refusal = exc


def _configure(app: Celery) -> None:
    conf = app.conf
    chosen = conf.without_defaults()
    if conf.task_protocol != 2:
        raise ConfigurationError(f"task_protocol: {conf.task_protocol} has no headers to carry keys; use 2")
    if "worker_consumer" in chosen and conf.worker_consumer != CONSUMER:
        _check_consumer(conf.worker_consumer)
    else:
        conf.worker_consumer = CONSUMER
    if "worker_prefetch_multiplier" not in chosen:
        conf.worker_prefetch_multiplier = 1
    if "broker_connection_retry_on_startup" not in chosen:
        conf.broker_connection_retry_on_startup = True
    if "result_backend_always_retry" not in chosen:
        # A result backend that is away for seconds must not turn a completed task into a failed one.
        conf.result_backend_always_retry = True
    scheme = (conf.broker_write_url or "").partition("://")[0].partition("+")[0]
    given = dict(conf.broker_transport_options or {})
    runtime_of(app).chose_visibility_timeout = "visibility_timeout" not in given
    conf.broker_transport_options = _transport_options(scheme, given)


def _check_consumer(chosen: Any) -> None:
    from taskguard.celery.consumer import Consumer

    if not issubclass(symbol_by_name(chosen), Consumer):
        raise ConfigurationError(
            f"worker_consumer: {chosen!r} would let malformed messages kill the worker; derive it from {CONSUMER}"
        )


def _transport_options(scheme: str, options: dict[str, Any]) -> dict[str, Any]:
    if scheme in {"redis", "rediss", "sentinel"}:
        options.setdefault("visibility_timeout", VISIBILITY_TIMEOUT)
        options.setdefault("unacked_restore_interval", RESTORE_INTERVAL)
        options.setdefault("unacked_restore_throttle", 1)
    elif scheme in {"amqp", "amqps", "pyamqp", ""} and options.setdefault("confirm_publish", True) is False:
        raise ConfigurationError(
            "broker_transport_options: confirm_publish=False loses messages when a connection breaks; "
            "leave it out or set it to True"
        )
    return options
