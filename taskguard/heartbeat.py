"""The heartbeat: one thread per worker that renews the leases of all its runs in one call.

It runs in the worker's parent process, because a thread in a child starves when C code holds the interpreter lock, and
it is a thread because the parent's event loop blocks while a broker is away. A run that was renewed is held by the
store for certain, so its listener may acknowledge the broker's copy; from then on the store's record is the only copy
and is let go by `finish`, which the heartbeat sends when the run has ended.

Promises: a live worker's runs keep their leases through any stall shorter than two thirds of a lease. A killed worker's
leases end by themselves. A store that does not answer is asked again every second.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from taskguard import forks
from taskguard.custody import Hold
from taskguard.errors import StoreError
from taskguard.events import Event, Observer
from taskguard.forks import undisturbed
from taskguard.ports import MessageStore


@dataclass(slots=True)
class _Watched:
    hold: Hold
    on_renewed: Callable[[], None]
    kept: bool = False
    ended: bool = False


class Heartbeat:
    """Watches runs from `watch` to `end`. Thread-safe."""

    def __init__(self, store: Callable[[], MessageStore], *, lease: float, keep: bool, notify: Observer) -> None:
        self._store = store
        self._lease = lease
        self._keep = keep
        self._notify = notify
        self._watched: dict[str, _Watched] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._renewing = False
        self._stopping = False
        self._silence: tuple[float, float] | None = None
        self._thread: threading.Thread | None = None
        self.process = forks.process

    def watch(self, hold: Hold, *, on_renewed: Callable[[], None]) -> None:
        """Renew this run's lease from now on; *on_renewed* is called, in the heartbeat's thread, the first time."""
        with self._lock:
            self._watched[hold.holder] = _Watched(hold, on_renewed)

    def end(self, hold: Hold) -> None:
        """The run has ended and all that follows it is done."""
        with self._lock:
            watched = self._watched.get(hold.holder)
            if watched is None:
                return
            watched.ended = True
            if not watched.kept:
                # A renewal may be under way that keeps the record: the thread finds out and finishes it.
                if not self._renewing:
                    del self._watched[hold.holder]
                return
        self._wake.set()

    def leave(self, hold: Hold) -> None:
        """The run is gone and what follows it is not done: renew no more, and let a relay find what is kept."""
        with self._lock:
            self._watched.pop(hold.holder, None)

    def start(self) -> None:
        """Begin to beat."""
        self._thread = threading.Thread(target=self._run, name="taskguard-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Beat no more; what has ended is finished first."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _run(self) -> None:
        renew_at = time.monotonic() + self._lease / 3
        while not self._stopping:
            self._wake.wait(max(0.0, renew_at - time.monotonic()))
            self._wake.clear()
            renew = time.monotonic() >= renew_at
            answered = self.beat(renew=renew)
            if not answered:
                renew_at = time.monotonic() + min(1.0, self._lease / 3)
            elif renew:
                renew_at = time.monotonic() + self._lease / 3
        self.beat(renew=False)

    def beat(self, *, renew: bool = True) -> bool:
        """One round: renew what runs, finish what ended. False when the store did not answer."""
        try:
            with undisturbed:
                asked = self._renew() if renew else False
                asked = self._finish() or asked
        except StoreError as exc:
            return self._missed(str(exc))
        except Exception as exc:  # noqa: BLE001 (without its heartbeat a worker loses every lease it has)
            return self._missed(f"{type(exc).__name__}: {exc}")
        if asked and self._silence is not None:
            (first, last), self._silence = self._silence, None
            detail = f"heartbeat: the store answers again; it was asked in vain for {last - first:.0f} s"
            self._notify(Event(name="store_back", detail=detail))
        return True

    def _missed(self, why: str) -> bool:
        now = time.monotonic()
        self._silence = (now if self._silence is None else self._silence[0]), now
        self._notify(Event(name="store_unavailable", detail=f"heartbeat: {why}"))
        return False

    def _renew(self) -> bool:
        """Whether there was something to renew."""
        with self._lock:
            running = [watched for watched in self._watched.values() if not watched.ended]
            self._renewing = bool(running)
        if not running:
            return False
        try:
            renewed = self._store().renew([w.hold for w in running], lease=self._lease, keep=self._keep)
        except BaseException:
            self._renewing = False
            raise
        news = []
        with self._lock:
            self._renewing = False
            for watched, held in zip(running, renewed, strict=True):
                if held and self._keep and not watched.kept:
                    watched.kept = True
                    news.append(watched)
        for watched in news:
            if not watched.ended:
                self._tell(watched)
        return True

    def _tell(self, watched: _Watched) -> None:
        try:
            watched.on_renewed()
        except Exception as exc:  # noqa: BLE001 (a broken connection's acknowledgement must not cost the others a lease)
            self._notify(Event(name="acknowledge_failed", detail=f"{type(exc).__name__}: {exc}"))

    def _finish(self) -> bool:
        """Whether there was something to finish."""
        with self._lock:
            ended = [watched for watched in self._watched.values() if watched.ended]
        kept = [watched.hold for watched in ended if watched.kept]
        if kept:
            self._store().finish(kept)
        with self._lock:
            for watched in ended:
                self._watched.pop(watched.hold.holder, None)
        return bool(kept)
