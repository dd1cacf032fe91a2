"""Threads in which coroutines wait for a store, and what becomes of an answer that nobody waits for any more.

Waiting for a free thread is waiting, and says nothing about the store. A queue that would grow without bound is a queue
that nobody comes out of in time, so past its bound nothing more is taken in, which the caller is told at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Errand(Generic[T]):
    """*work* for a caller who may leave before it ends: what it brings then is given to *undo*, in its own thread."""

    __slots__ = ("_done", "_found", "_left", "_lock", "_undo", "_work", "began")

    def __init__(self, work: Callable[[], T], undo: Callable[[T], None] | None = None) -> None:
        self._work, self._undo = work, undo
        self._lock = threading.Lock()
        self._done = self._left = False
        self._found: list[T] = []
        self.began: float | None = None
        """The instant of `time.monotonic` at which a thread took it up."""

    def __call__(self) -> T:
        self.began = time.monotonic()
        found = self._work()
        with self._lock:
            self._done, left = True, self._left
            self._found.append(found)
        if left:
            self.undo()
        return found

    def leave(self) -> bool:
        """Nobody waits any more. True where it had ended before: `undo` is then the caller's, in a thread."""
        with self._lock:
            self._left = True
            return self._done

    def undo(self) -> None:
        """Undo what it brought."""
        if self._undo is not None:
            self._undo(self._found[0])


class StoreThreads:
    """At most *threads* of them, begun when they are needed, and *queue* errands under way or waiting for one."""

    def __init__(self, name: str, *, threads: int, queue: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._queue, self._inside = queue, 0

    def begin(self, work: Callable[[], T], *, always: bool = False) -> Future[T] | None:
        """What *work* will bring; None: too many wait already. *always*: it is taken in all the same."""
        with self._lock:
            if self._inside >= self._queue and not always:
                return None
            self._inside += 1
        begun = self._pool.submit(work)
        begun.add_done_callback(self._ended)
        return begun

    def _ended(self, _: Future[T]) -> None:
        with self._lock:
            self._inside -= 1
