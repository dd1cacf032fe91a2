"""A fork waits for the threads that work beside it: a child born inside their locks would wait for those for ever.

A pool's parent forks whenever a child has died, while its relay, its heartbeat and its teller use the store, the broker
and the result backend. Their drivers hold locks of many kinds (SQLite's own, OpenSSL's, those of cached properties, of
imports), and none of them is made anew in a child. So whoever works in such a thread is `undisturbed`, and a fork waits
for the end of that work, but no longer than `PATIENCE`: a thread may be waiting for a network.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

process = object()
"""Stands for this process, and is another in every fork of Python's. Unlike the process's id it costs no system call to
look at. Not for what owns a socket: a fork in C, such as uWSGI's, leaves it as it was."""


def _born() -> None:
    global process
    process = object()


os.register_at_fork(after_in_child=_born)

PATIENCE = 1.0
"""Seconds a fork waits. The parent's event loop waits with it."""


class Undisturbed:
    """A context manager in which this process does not fork. For many threads at once; may be entered again inside."""

    def __init__(self) -> None:
        self._before_fork: list[Callable[[], None]] = []
        self._reset()
        os.register_at_fork(before=self._before, after_in_parent=self._after, after_in_child=self._reset)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._mine = threading.local()
        self._inside = self._forking = 0

    def before_fork(self, prepare: Callable[[], None]) -> Callable[[], None]:
        """Call *prepare* before every fork, when nobody is inside or `PATIENCE` is over. A decorator."""
        self._before_fork.append(prepare)
        return prepare

    def __enter__(self) -> None:
        depth = getattr(self._mine, "depth", 0)
        if not depth:
            with self._changed:
                self._changed.wait_for(lambda: not self._forking)
                self._inside += 1
        self._mine.depth = depth + 1

    def __exit__(self, *_: object) -> None:
        self._mine.depth -= 1
        if not self._mine.depth:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def _before(self) -> None:
        myself = 1 if getattr(self._mine, "depth", 0) else 0
        with self._changed:
            self._forking += 1
            self._changed.wait_for(lambda: self._inside <= myself, timeout=PATIENCE)
        for prepare in self._before_fork:
            prepare()

    def _after(self) -> None:
        with self._changed:
            self._forking -= 1
            self._changed.notify_all()


undisturbed = Undisturbed()
"""The one of this process."""
