"""Bootsteps: what runs beside the pool in every worker's parent process, the heartbeat and the relay."""

from __future__ import annotations

import threading
import time
from typing import Any

from celery import Celery, bootsteps, signals

from taskguard.celery.broker import BrokerPublisher
from taskguard.celery.redis_broker.connection import SCHEMES
from taskguard.celery.runtime import Runtime, new_holder, runtime_of
from taskguard.celery.settle import announce
from taskguard.celery.teller import Teller
from taskguard.clock import wall_clock
from taskguard.envelope import Envelope
from taskguard.errors import ConfigurationError, StoreError
from taskguard.events import Event
from taskguard.gate import Custody, Terms
from taskguard.heartbeat import Heartbeat
from taskguard.ports import MessageStore
from taskguard.relay import Relay
from taskguard.settlement import DeadLettered, Discarded

CELERY_VISIBILITY_TIMEOUT = 3600

OF_A_LEASE = 0.75
"""The lease of a Redis channel, as a share of a run's. Its end is seen a beat later, and the messages have yet to be
taken again: with all of it, what was never started came back later than what was."""

REAP_EVERY = 0.5
"""Seconds between two looks for dead children, where something turns the event loop."""
REAP_AFTER = (0.05, 0.5)
"""Seconds after which a dead child is looked for once more. The pool looks when a child's pipe closes, a moment before
the kernel lets it be waited for; what the pool misses then, it would find five seconds later."""


class Beating(bootsteps.StartStopStep):  # type: ignore[misc]
    """The heartbeat: begins before the first message, ends after the last run."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        runtime = runtime_of(worker.app)
        prefork = "prefork" in getattr(worker.pool_cls, "__module__", "")
        try:
            runtime.check_worker(shared_memory=not prefork)
        except (ConfigurationError, StoreError) as exc:
            raise SystemExit(f"taskguard: {exc}") from None
        fit_transport(worker.app)
        self._runs_here = not prefork
        self._reaper: Reaper | None = None
        if prefork:
            signals.worker_process_init.connect(lambda **_: runtime.learn_limits(), weak=False)

    def start(self, worker: Any) -> None:
        """Begin to beat. It stops with the worker's last signal: runs that finish in a warm shutdown need it."""
        runtime = runtime_of(worker.app)
        settings = runtime.settings
        heartbeat = Heartbeat(
            lambda: runtime.store, lease=settings.lease, keep=settings.early_ack, notify=runtime.observers
        )
        teller = Teller(runtime.observers)
        runtime.heartbeat, runtime.teller = heartbeat, teller
        heartbeat.start()
        teller.start()
        if self._runs_here:
            runtime.learn_limits()
        detail = f"store {runtime.shown_store}, namespace {settings.namespace}, lease {settings.lease:g} s"
        runtime.observers(Event(name="started", detail=f"{detail}, {'with a' if settings.relay else 'no'} relay"))

        def stop(**_: Any) -> None:
            teller.stop()
            heartbeat.stop()

        signals.worker_shutdown.connect(stop, weak=False)

    def register_with_event_loop(self, worker: Any, hub: Any) -> None:
        """Celery's event loop is there, perhaps anew. This is called before the pool's own."""
        pool: Any = getattr(worker.pool, "_pool", None)
        exited = getattr(type(pool), "_event_process_exit", None)
        if exited is None:
            return

        def reaped(hub: Any, process: Any) -> None:
            exited(pool, hub, process)
            for seconds in REAP_AFTER:
                hub.call_later(seconds, pool.maintain_pool)

        pool._event_process_exit = reaped
        if hasattr(hub, "_waker"):
            self._reaper = self._reaper or Reaper(pool)
            hub.on_tick.add(self._reaper)
        else:  # before kombu 5.7 nothing else turns an idle loop that has got a signal, or a call from another thread
            hub.call_repeatedly(REAP_EVERY, pool.maintain_pool)


class Reaper:
    """Looks for dead children as the loop turns: a grandchild may hold the pipe open that would tell of one."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._looked_at = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._looked_at >= REAP_EVERY:
            self._looked_at = now
            self._pool.maintain_pool()


class Relaying(bootsteps.StartStopStep):  # type: ignore[misc]
    """The relay, in every worker unless told otherwise."""

    requires = (Beating,)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._relay: Relay | None = None

    def include_if(self, worker: Any) -> bool:
        """Whether this worker relays."""
        return runtime_of(worker.app).settings.relay

    def start(self, worker: Any) -> None:
        """Begin to relay."""
        self._relay = make_relay(worker.app)
        self._thread = threading.Thread(target=self._relay.run, args=(self._stop,), name="taskguard-relay", daemon=True)
        self._thread.start()

    def stop(self, worker: Any) -> None:
        """Finish the batch and stop."""
        self._stop.set()
        if self._thread is not None and self._relay is not None:
            self._relay.ring()
            self._thread.join(timeout=10)


def make_relay(app: Celery, *, store: MessageStore | None = None, **options: Any) -> Relay:
    """A relay over the application's broker and *store*, or its own. *options* are those of `Relay`."""
    runtime = runtime_of(app)
    publisher = BrokerPublisher(app)

    def at_rest() -> MessageStore:
        return runtime.store if store is None else store

    return Relay(
        at_rest,
        publisher,
        outbox=lambda: getattr(at_rest(), "outbox", None),
        dispatch=publisher.dispatch,
        retention=runtime.settings.outbox_retention,
        expire=lambda envelope: expire(app, runtime, envelope),
        notify=runtime.observers,
        **{"lease": runtime.settings.lease, **options},
    )


def expire(app: Celery, runtime: Runtime, envelope: Envelope) -> bool:
    """Settle a message at rest whose deadline has passed. False: it is not that simple, let a worker see it."""
    if not envelope.key:
        return False  # its key is made by a worker that knows the task
    task = app.tasks.get(envelope.task)
    terms = getattr(task, "terms", None)
    if not isinstance(terms, Terms):
        terms = Terms(max_crashes=runtime.settings.max_crashes, retention=runtime.settings.retention)
    entered = runtime.gate.enter(envelope, terms, holder=new_holder(None))
    if isinstance(entered, Custody):
        deadline = envelope.deadline_at
        if deadline is None or deadline > wall_clock():
            return False
        entered = runtime.gate.expire(entered)
    if not isinstance(entered, (DeadLettered, Discarded)):
        return False
    settlement = entered
    try:
        runtime.tell(lambda: announce(app, envelope, settlement))
    except Exception as exc:  # noqa: BLE001 (result backends raise what their drivers raise; the letter is kept)
        runtime.observers(Event(name="announce_failed", task=envelope.task, task_id=envelope.task_id, detail=repr(exc)))
    return True


def fit_transport(app: Celery) -> None:
    """Choose what depends on the tasks there are, before the worker connects.

    Where every task has custody, a Redis channel holds what it takes under a lease of its own. Where plain tasks run,
    which custody does not cover, Celery gets its visibility timeout back.
    """
    from taskguard.celery.install import VISIBILITY_TIMEOUT

    options = dict(app.conf.broker_transport_options or {})
    if not _has_plain_tasks(app):
        if _is_redis(app):
            options.setdefault("owner_lease", OF_A_LEASE * runtime_of(app).settings.lease)
    elif runtime_of(app).chose_visibility_timeout and options.get("visibility_timeout") == VISIBILITY_TIMEOUT:
        options["visibility_timeout"] = CELERY_VISIBILITY_TIMEOUT
    app.conf.broker_transport_options = options


def _has_plain_tasks(app: Celery) -> bool:
    from taskguard.celery.task import ReliableTask

    return any(
        not isinstance(task, ReliableTask) and not task.name.startswith("celery.") for task in app.tasks.values()
    )


def _is_redis(app: Celery) -> bool:
    """Other transports take options they do not know for their connections' own."""
    return all(end().transport_cls in SCHEMES for end in (app.connection_for_read, app.connection_for_write))
