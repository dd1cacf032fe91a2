"""An application on stage: for the time of a test its store, broker, results and clock are this process's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from typing import Any

from celery import Celery, _state, current_app
from celery.app.utils import find_app
from kombu.pools import ProducerPool

from taskguard.celery.runtime import Runtime
from taskguard.celery.task import ReliableTask
from taskguard.clock import driven_by, wall_clock
from taskguard.downstream.desk import Desk, use
from taskguard.errors import ConfigurationError
from taskguard.events import Event, Observers
from taskguard.gate import Gate
from taskguard.limiter.limiter import Limiter
from taskguard.limiter.rulebook import FixedRules
from taskguard.ports import MessageStore, PermitStore
from taskguard.retry import BudgetKeeper
from taskguard.stores.memory import MemoryPermits
from taskguard.testing.broker import Broker
from taskguard.testing.clock import ManualClock
from taskguard.testing.results import Results

POOL = 20
"""Connections to a broker that costs nothing: a task that sends while it is being sent needs more than one."""


class StageRuntime(Runtime):
    """The application's runtime over a store of the test's own; its other settings are the application's."""

    def __init__(self, before: Runtime, store: MessageStore, events: list[Event]) -> None:
        super().__init__(before.app, {**before._given, "store": "memory://"})
        self.observers = Observers(*before.observers._observers, events.append)
        self.refusal = before.refusal
        self._own = store
        self._own_permits = MemoryPermits()

    def _open(self) -> tuple[MessageStore, Gate]:
        if self._gate is None:
            self._gate = Gate(self._own, self.settings, notify=self.observers)
        return self._own, self._gate

    @property
    def permits(self) -> PermitStore:
        """Permits of the test's own: nothing is used up, and every circuit is closed."""
        return self._own_permits

    @property
    def limiter(self) -> Limiter:
        """Goes by no rules: those of a store are not the test's."""
        if self._limiter is None:
            self._limiter = Limiter(FixedRules(), self.permits)
        return self._limiter

    def lend_permits(self) -> None:
        """As everywhere, and on the test's clock."""
        use(lambda: Desk(self.permits, notify=self.observers, clock=wall_clock), notify=self.observers)


def named_app(name: str) -> Celery:
    """The application at ``package.module:app``, or the current one. Raises ConfigurationError where there is none."""
    if not name:
        return current_app._get_current_object()
    try:
        return find_app(name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise ConfigurationError(
            f"taskguard_app: {name!r} cannot be imported: {exc}; write package.module:app"
        ) from exc


def runtime_before(app: Any) -> Runtime:
    """The runtime of the user's application, its tasks imported as a worker imports them.

    Raises ConfigurationError for what is no application, or has no reliable task.
    """
    if not isinstance(app, Celery):
        raise ConfigurationError(f"{app!r} is no Celery application; give the one your tasks are declared on")
    runtime = getattr(app, "taskguard", None)
    if isinstance(runtime, StageRuntime):
        return runtime
    app.loader.import_default_modules()
    app.finalize()
    runtime = getattr(app, "taskguard", None)
    if not isinstance(runtime, Runtime):
        raise ConfigurationError(
            f"{app!r} has no ReliableTask; import your tasks in the test, or name their application in pytest's "
            "configuration: taskguard_app = package.module:app"
        )
    return runtime


@contextmanager
def on_stage(
    app: Celery, *, store: MessageStore, broker: Broker, clock: ManualClock, events: list[Event]
) -> Iterator[None]:
    """Put everything in place of the application's own, and take it away again."""
    before = runtime_before(app)
    runtime = StageRuntime(before, store, events)
    with ExitStack() as stack:
        stack.enter_context(driven_by(clock))
        _ = app.conf.task_always_eager  # loads the configuration: its signals must find the application as it is
        stack.enter_context(_swapped(app, "taskguard", runtime))
        stack.callback(before.lend_permits)
        runtime.lend_permits()
        stack.enter_context(_swapped(app, "_backend_cache", Results(app=app)))
        stack.enter_context(_swapped(app, "now", lambda: datetime.fromtimestamp(clock(), app.timezone)))
        stack.enter_context(_swapped(app, "_connection", lambda url, **options: broker.connect()))
        connections = broker.connect().Pool(POOL)
        stack.callback(connections.force_close_all)
        stack.enter_context(_swapped(app, "_pool", connections))
        stack.enter_context(_swapped(app.amqp, "_producer_pool", ProducerPool(connections, POOL)))
        stack.enter_context(_configured(app.conf, "task_always_eager", False))
        stack.enter_context(_swapped(_state._tls, "current_app", app))
        for task in app.tasks.values():
            if isinstance(task, ReliableTask) and task.effective_retry.budget is not None:
                keeper = BudgetKeeper(task.effective_retry.budget, clock=clock)
                stack.enter_context(_swapped(type(task), "_budget", keeper))
        yield


@contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    own, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def _configured(conf: Any, name: str, value: Any) -> Iterator[None]:
    own, before = name in conf.changes, conf.changes.get(name)
    conf.changes[name] = value
    try:
        yield
    finally:
        if own:
            conf.changes[name] = before
        else:
            del conf.changes[name]
