"""What one Celery application carries of taskguard: settings, store, gate, observers."""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from celery import Celery

from taskguard import forks
from taskguard.downstream.desk import use
from taskguard.errors import ConfigurationError
from taskguard.events import Observers
from taskguard.gate import Gate
from taskguard.observers.logging import log_event
from taskguard.settings import Settings
from taskguard.stores import open_permits, open_store

if TYPE_CHECKING:
    from taskguard.celery.teller import Teller
    from taskguard.heartbeat import Heartbeat
    from taskguard.limiter.limiter import Limiter
    from taskguard.ports import JointStore, MessageStore, PermitStore


LEAST_TIMEOUT = 0.5
"""Seconds a store is given to answer, however short the lease."""


class Runtime:
    """One per application, at ``app.taskguard``. The store is opened on first use, and anew in a forked process."""

    def __init__(self, app: Celery, given: Mapping[str, Any]) -> None:
        self.app = app
        self.observers = Observers(log_event)
        self.heartbeat: Heartbeat | None = None
        self.teller: Teller | None = None
        self.refusal: ConfigurationError | None = None
        self.chose_visibility_timeout = False
        self.broker_checked = False
        self._given = dict(given)
        self._settings: Settings | None = None
        self._store: MessageStore | None = None
        self._gate: Gate | None = None
        self._process: object = None
        self._permits: PermitStore | None = None
        self._permits_process: object = None
        self._joined: tuple[MessageStore, PermitStore, JointStore | None] | None = None
        self._limiter: Limiter | None = None

    @property
    def settings(self) -> Settings:
        """Read once the application's configuration is known."""
        if self._settings is None:
            self._settings = Settings.read(self._given, self.app.conf, os.environ)
        return self._settings

    @cached_property
    def result_serializer(self) -> str:
        """Celery's setting, which takes longer to look up than most results to write."""
        return str(self.app.conf.result_serializer)

    @property
    def shown_store(self) -> str:
        """The store's URL without its password."""
        return re.sub(r"://[^/@]*@", "://***@", self.settings.store or "memory://")

    def _open(self) -> tuple[MessageStore, Gate]:
        if self._store is None or self._gate is None or self._process is not forks.process:
            settings = self.settings
            url = settings.store or "memory://"
            # A heartbeat that waits for one answer longer than a third of a lease has missed its beat.
            timeout = min(settings.store_timeout, max(settings.lease / 3, LEAST_TIMEOUT))
            self._store = open_store(url, namespace=settings.namespace, timeout=timeout)
            self._gate = Gate(self._store, settings, notify=self.observers)
            self._process = forks.process
        return self._store, self._gate

    @property
    def store(self) -> MessageStore:
        """The message store; process memory where none is configured (a worker refuses to start then)."""
        return self._open()[0]

    @property
    def gate(self) -> Gate:
        """The gate over the store."""
        return self._open()[1]

    @property
    def permits(self) -> PermitStore:
        """The permit store; beside the message store unless told otherwise."""
        if self._permits is None or self._permits_process is not forks.process:
            settings = self.settings
            url = settings.permits or settings.store or "memory://"
            self._permits = open_permits(url, namespace=settings.namespace, timeout=settings.permits_timeout)
            self._permits_process = forks.process
        return self._permits

    def joined_with(self, permits: PermitStore) -> JointStore | None:
        """What claims and asks *permits* in one step; None where they are elsewhere."""
        store, joined = self.store, self._joined
        if joined is None or joined[0] is not store or joined[1] is not permits:
            self._joined = joined = store, permits, store.joined_with(permits)
        return joined[2]

    def lend_permits(self) -> None:
        """From now on they are those of every `Downstream` in this process that names no store."""
        use(lambda: self.permits, notify=lambda event: self.observers(event))

    @property
    def limiter(self) -> Limiter:
        """Decides by the rules of the permit store (``taskguard limits``), as they are changed."""
        if self._limiter is None:
            from taskguard.edge.opening import open_limiter

            settings = self.settings
            self._limiter = open_limiter(
                settings.permits or settings.store or "memory://",
                namespace=settings.namespace,
                timeout=settings.permits_timeout,
                notify=self.observers,
            )
        return self._limiter

    def learn_limits(self) -> None:
        """In a process that is about to run tasks: read the rules, if there is one that they limit.

        The first run would wait for them no longer than for a permit, and then go unlimited.
        """
        if any(getattr(task, "_identity", None) is not None for task in self.app.tasks.values()):
            self.limiter.learn()

    @property
    def prompt_gate(self) -> Gate:
        """The gate for a worker's parent process: it asks the store once, because the event loop waits for it."""
        return Gate(self.store, self.settings, notify=self.observers, patience=0.0)

    @property
    def beats_here(self) -> bool:
        """Whether this process is a worker that runs its tasks itself (threads, gevent, solo), and no pool child."""
        return self.heartbeat is not None and self.heartbeat.process is forks.process

    def tell(self, what: Callable[[], None]) -> None:
        """Do *what* talks to the result backend without holding up a worker's event loop; elsewhere, at once."""
        if self.teller is None:
            what()
        else:
            self.teller.tell(what)

    def check_worker(self, *, shared_memory: bool) -> None:
        """Refuse to start a worker that could lose work. Raises ConfigurationError or StoreError."""
        if self.refusal is not None:
            raise self.refusal
        url = self.settings.store
        if url is None:
            raise ConfigurationError(
                "no store is configured, so a crash would lose what runs; set TASKGUARD_STORE, taskguard_store or "
                "taskguard.install(app, store=...), for example redis://localhost:6379/0"
            )
        if url.startswith("memory:") and not shared_memory:
            raise ConfigurationError(
                "store memory:// is not shared by the processes of a prefork pool; use redis://, postgresql+psycopg:// "
                "or sqlite:///, or run the worker with --pool solo or threads"
            )
        self.store.ping()
        from taskguard.celery.transactional import check

        for task in self.app.tasks.values():
            if getattr(task, "transactional", False):
                check(task)


def new_holder(hostname: str | None) -> str:
    """A name for one delivery's run, unique, beginning with the worker that has it."""
    return f"{hostname or socket.gethostname()}/{secrets.token_urlsafe(6)}"


def runtime_of(app: Celery) -> Runtime:
    """The application's runtime; raises ConfigurationError where taskguard was never installed."""
    runtime = getattr(app, "taskguard", None)
    if not isinstance(runtime, Runtime):
        raise ConfigurationError(f"taskguard is not installed on {app!r}; call taskguard.install(app, store=...)")
    return runtime
