"""The one thread of a process that looks after its permits: it renews leases, sends releases and tells outcomes.

A thread per limit, circuit or key would be thousands. Its chores are held weakly, so that what nobody uses any more
ends with its owner. A forked child has no thread until one of its own chores needs it; whatever was under way in the
parent is the parent's to finish.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from typing import Protocol

from taskguard.forks import undisturbed

logger = logging.getLogger(__name__)

IDLE = 60.0
"""Seconds after which it looks again even if nothing is due."""


class Chore(Protocol):
    """Something that is to be done again and again."""

    due_at: float
    """The instant of `time.monotonic` from which it is due; inf: not until somebody says so and wakes the thread."""

    def tend(self) -> None:
        """Do it, and say in ``due_at`` when next. It never takes longer than a store's timeout."""


class Tending:
    """A process has one: `tending`."""

    def __init__(self) -> None:
        self._chores: weakref.WeakSet[Chore] = weakref.WeakSet()
        self._reset()
        os.register_at_fork(after_in_child=self._reset)
        atexit.register(self._finish)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, chore: Chore) -> None:
        """Look after *chore* for as long as somebody else holds it."""
        with self._lock:
            self._chores.add(chore)
        self.wake()

    def wake(self) -> None:
        """A chore is due sooner than it was."""
        if self._thread is None:
            self._start()
        self._wake.set()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="taskguard-tending", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                chores = list(self._chores)
            soonest = min((chore.due_at for chore in chores), default=float("inf"))
            wait = soonest - time.monotonic()
            if wait > 0:
                del chores
                self._wake.wait(min(wait, IDLE))
                self._wake.clear()
                continue
            now = time.monotonic()
            for chore in chores:
                if chore.due_at <= now:
                    self._tend(chore)
            del chores, chore

    def _finish(self) -> None:
        """The process ends: what can still be told and given back is. Children that leave by `os._exit` do not."""
        with self._lock:
            chores = list(self._chores)
        for chore in chores:
            if chore.due_at != float("inf"):
                self._tend(chore)

    def _tend(self, chore: Chore) -> None:
        try:
            with undisturbed:
                chore.tend()
        except Exception:
            logger.exception("%s failed; it is tried again in a second", type(chore).__name__)
            chore.due_at = time.monotonic() + 1.0


tending = Tending()
"""The one of this process."""

_forked: weakref.WeakSet[_Forked] = weakref.WeakSet()


class _Forked(Protocol):
    def after_fork(self) -> None:
        """Begin anew in a child: its parent's threads, locks and counts are not its own."""


def begins_anew(owner: _Forked) -> None:
    """Call ``owner.after_fork()`` in every forked child, as long as somebody holds *owner*."""
    _forked.add(owner)


def _after_fork() -> None:
    for owner in list(_forked):
        owner.after_fork()


os.register_at_fork(after_in_child=_after_fork)
