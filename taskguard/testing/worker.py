"""The worker of a rehearsal: taskguard's own consumer and requests, without an event loop, a pool or a connection.

A delivery goes the way it goes in production: consumer, strategy, request, tracer, gate, body, result, links,
acknowledgement. Only what needs processes is missing: time limits are not enforced, and no heartbeat beats, because
the clock stands still while a task runs.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from billiard.einfo import ExceptionInfo
from celery import Celery
from celery.app.trace import build_tracer
from celery.exceptions import InvalidTaskError, TaskRevokedError
from celery.utils.objects import Bunch
from celery.worker import state
from kombu.exceptions import ContentDisallowed, DecodeError

from taskguard.celery.consumer import Consumer

HOSTNAME = "rehearsal"


class _Pool:
    """Runs what it is given here and now."""

    def apply_async(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        *,
        accept_callback: Callable[[int, float], None],
        callback: Callable[[Any], None],
        error_callback: Callable[[Any], None],
        **_: Any,
    ) -> None:
        accept_callback(os.getpid(), time.monotonic())
        try:
            answer = target(*args)
        except SystemExit:
            error_callback(ExceptionInfo())  # a pool's child ends, and its parent is told
        else:
            callback(answer)


class Worker(Consumer):
    """Takes one message at a time."""

    def __init__(self, app: Celery) -> None:  # Celery's own wants a pool, a hub and a connection
        self.app = app
        self.hostname = HOSTNAME
        self.pool = _Pool()
        self.strategies: dict[str, Any] = {}
        self.connection_errors = ()
        self.event_dispatcher = None
        self.timer = Bunch(call_at=None)
        self.disable_rate_limits = True
        self.task_buckets: Any = defaultdict(lambda: None)
        self.controller = SimpleNamespace(state=state)
        self.on_task_request = self._run
        self._request: Any = None
        self._traces: list[tuple[Any, Any]] = []

    def call_soon(self, p: Any, *args: Any, **kwargs: Any) -> Any:
        """Now: there is no event loop."""
        return p(*args, **kwargs)

    def receive(self, message: Any) -> None:
        """Do all that is to be done with one message. Raises Crash, and then nothing more is done."""
        self._request = None
        try:
            self._receive(message)
        except BaseException:
            if self._request is not None:
                state.task_ready(self._request)
            raise

    def _receive(self, message: Any) -> None:
        try:
            strategy = self._strategy(message.headers["task"])
        except KeyError as exc:
            self.on_unknown_task(None, message, exc)
            return
        try:
            strategy(message, None, message.ack_log_error, message.reject_log_error, ())
        except (InvalidTaskError, ContentDisallowed) as exc:
            self.on_invalid_task(None, message, exc)
        except DecodeError as exc:
            self.on_decode_error(message, exc)

    def _strategy(self, name: str) -> Any:
        if name not in self.strategies:
            task = self.app.tasks[name]
            self._traces.append((task, task.__trace__))
            task.__trace__ = build_tracer(name, task, self.app.loader, self.hostname, app=self.app)
            self.strategies[name] = self._checked(task.start_strategy(self.app, self), task)
        return self.strategies[name]

    def _run(self, request: Any) -> None:
        self._request = request
        try:
            request.execute_using_pool(self.pool)
        except TaskRevokedError:
            return  # it ended before the pool, and says so

    def close(self) -> None:
        """Give the tasks back as they were."""
        for task, trace in reversed(self._traces):
            task.__trace__ = trace
