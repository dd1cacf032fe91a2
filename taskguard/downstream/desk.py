"""Where a process asks for permits: its side of one permit store.

It adds what a call should not wait for. Slots that were given back ride along with the next question, or go out within
`FLUSH` seconds. Refusals that must hold are remembered. Leases of calls that last are renewed. Changes of circuits are
listened to by one thread. A store that does not answer costs one timeout, then nothing until it is asked again.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Protocol

from taskguard import forks
from taskguard.downstream.denials import Denials
from taskguard.downstream.outage import Outage, Shielded
from taskguard.downstream.storeclock import StoreClock
from taskguard.downstream.tending import begins_anew, tending
from taskguard.errors import ConfigurationError, StoreError
from taskguard.events import Event, Observer
from taskguard.permits import Answer, Ask, CircuitView, Refusal, Slot
from taskguard.ports import PermitStore

logger = logging.getLogger(__name__)

FLUSH = 0.01
"""Seconds a released slot waits for a question to ride along with."""


Carrier = Callable[[Ask], Answer]
"""What takes a question to the store instead of the desk."""


class Watcher(Protocol):
    """Who is told of a circuit's changes."""

    name: str

    def apply(self, view: CircuitView) -> None:
        """The circuit has changed."""


class Bound(Protocol):
    """Who uses the application's store."""

    def rebind(self) -> None:
        """It is another one from now on."""


class Desk:
    """One per process and store. For any number of threads; a forked child begins with nothing pending."""

    def __init__(
        self, store: PermitStore, *, notify: Observer | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.store = store if isinstance(store, Shielded) else Shielded(store, Outage(clock=clock))
        self.clock = clock
        self.denials = Denials(clock=clock)
        self.version = 0
        self.on_version: Callable[[int], None] | None = None
        self.in_process = bool(getattr(self.store.store, "in_process", False))
        self._notify = notify
        self._store_clock = StoreClock(self.store.now, clock)
        self._renewals: dict[float, _Renewals] = {}
        self.after_fork()
        begins_anew(self)

    def after_fork(self) -> None:
        """Nothing of the parent's is given back, renewed or told by its child."""
        self._lock = threading.Lock()
        self._prefix = uuid.uuid4().hex
        self._serial = count(1)
        self._returned: deque[Slot] = deque()
        self._errands: deque[Callable[[], None]] = deque()
        self._releases = _Releases(self)
        self._told_down = False
        self._watched: dict[str, weakref.WeakSet[Watcher]] = {}
        self._watching: threading.Thread | None = None
        for renewals in self._renewals.values():
            renewals.held, renewals.due_at = {}, math.inf

    def holder(self) -> str:
        """A name that no other call of the fleet has."""
        return f"{self._prefix}-{next(self._serial):x}"

    def notify(self, event: Event) -> None:
        """Tell the observers."""
        observer = self._notify or _default.notify
        if observer is not None:
            observer(event)

    # -- asking -----------------------------------------------------------------------------------------------------

    def admit(self, ask: Ask, *, carry: Carrier | None = None) -> Answer:
        """Ask the store; slots that wait to be released go along. Raises StoreError.

        *carry* takes the question to the store along with something else. It may raise whatever that fails with.
        """
        returned = ask.release
        if not returned and self._returned:
            returned = self._take_returned()
            ask = Ask(
                rates=ask.rates, slot=ask.slot, circuit=ask.circuit, release=returned, book=ask.book, booked=ask.booked
            )
        asked_at = self.clock()
        try:
            answer = self.store.admit(ask) if carry is None else carry(ask)
        except BaseException as exc:
            if returned:
                self._give_back(returned)
            if carry is None and isinstance(exc, StoreError):
                self._went_down(exc)
            raise
        if self._told_down:
            self._told_down = False
            self.notify(Event(name="permits_back", detail="the permit store answers again"))
        if answer.version != self.version:
            self._changed_rules(answer.version)
        if isinstance(answer, Refusal) and answer.by == "rate" and not ask.booked:
            for rate in ask.rates:
                if rate.name == answer.name and not rate.adaptive:
                    self.denials.keep(rate.name, rate.cost, answer.retry_after, asked_at=asked_at)
        return answer

    def denied(self, ask: Ask) -> tuple[str, float] | None:
        """The limit that is known to refuse *ask*, and for how many seconds (inf: for good)."""
        if not len(self.denials):
            return None
        longest = max(((self.denials.left(rate.name, rate.cost), rate.name) for rate in ask.rates), default=(0.0, ""))
        return (longest[1], longest[0]) if longest[0] > 0 else None

    def now(self) -> float:
        """The store's instant, by this process's clock and a difference that is measured now and then."""
        return self._store_clock.now()

    def unbook(self, name: str, slot_in: float) -> None:
        """Give the booked slot so many seconds ahead back. Raises StoreError."""
        self.store.unbook(name, self.now() + slot_in)

    def soon(self, work: Callable[[], None]) -> None:
        """Do *work*, which may ask the store, in the tending thread, within `FLUSH` seconds. It must not raise."""
        self._errands.append(work)
        self._releases.arm()

    def _changed_rules(self, version: int) -> None:
        self.version = version
        self.denials.forget()
        if self.on_version is not None:
            self.on_version(version)

    def _went_down(self, error: StoreError) -> None:
        if not self._told_down and self.store.outage.since is not None:
            self._told_down = True
            self.notify(Event(name="permits_down", detail=str(error)))

    # -- slots ------------------------------------------------------------------------------------------------------

    def held(self, slot: Slot, *, lease: float, lost: Callable[[Slot], None]) -> None:
        """Renew the lease of *slot* until it is released; *lost* is told where another call may have the place."""
        renewals = self._renewals.get(lease)
        if renewals is None:
            with self._lock:
                renewals = self._renewals.setdefault(lease, _Renewals(self, lease))
        renewals.held[slot.holder] = (slot, lost)
        if renewals.due_at == math.inf:
            renewals.begin()

    def release(self, slot: Slot, *, lease: float) -> bool:
        """Give *slot* back, soon. False where it was given back before."""
        renewals = self._renewals.get(lease)
        if renewals is None or renewals.held.pop(slot.holder, None) is None:
            return False
        self._returned.append(slot)
        self._releases.arm()
        return True

    def returned(self) -> tuple[Slot, ...]:
        """Slots that wait to be released, for a question to take along. Where it fails `admit` takes them back."""
        return self._take_returned() if self._returned else ()

    def _take_returned(self) -> tuple[Slot, ...]:
        taken: list[Slot] = []
        try:
            while len(taken) < 100:
                taken.append(self._returned.popleft())
        except IndexError:
            pass
        return tuple(taken)

    def _give_back(self, slots: tuple[Slot, ...]) -> None:
        self._returned.extendleft(reversed(slots))
        self._releases.arm(after=max(FLUSH, self.store.outage.left))

    def flush(self) -> None:
        """Send the releases that wait, and do what was to be done soon."""
        for _ in range(len(self._errands)):
            self._errands.popleft()()
        while slots := self._take_returned():
            try:
                self.store.release(slots)
            except StoreError:
                # The leases end by themselves; what is kept is bounded so that a long outage does not fill the memory.
                if len(self._returned) < 10_000:
                    self._give_back(slots)
                return

    # -- circuits ---------------------------------------------------------------------------------------------------

    def watch(self, watcher: Watcher) -> None:
        """Tell *watcher* what happens to its circuit, for as long as somebody else holds it."""
        with self._lock:
            self._watched.setdefault(watcher.name, weakref.WeakSet()).add(watcher)
            if self._watching is None:
                self._watching = threading.Thread(
                    target=_watch, args=(weakref.ref(self), self.store), name="taskguard-circuits", daemon=True
                )
                self._watching.start()

    def told(self, view: CircuitView) -> None:
        """A circuit has changed."""
        with self._lock:
            watchers = list(self._watched.get(view.name, ()))
        for watcher in watchers:
            watcher.apply(view)


class _Releases:
    """The chore that sends what no question took along."""

    def __init__(self, desk: Desk) -> None:
        self._desk = weakref.ref(desk)
        self.due_at = math.inf
        self._known = False

    def arm(self, *, after: float = FLUSH) -> None:
        if self.due_at == math.inf:
            self.due_at = time.monotonic() + after
            if not self._known:
                self._known = True
                tending.add(self)
            else:
                tending.wake()

    def tend(self) -> None:
        self.due_at = math.inf  # first: who releases from now on arms it again
        desk = self._desk()
        if desk is not None:
            desk.flush()


class _Renewals:
    """The chore that renews the leases of one length."""

    def __init__(self, desk: Desk, lease: float) -> None:
        self._desk = weakref.ref(desk)
        self.lease = lease
        self.held: dict[str, tuple[Slot, Callable[[Slot], None]]] = {}
        self.due_at = math.inf

    def begin(self) -> None:
        self.due_at = time.monotonic() + self.lease / 3
        tending.add(self)

    def tend(self) -> None:
        desk = self._desk()
        held = list(self.held.values())
        if desk is None or not held:
            self.due_at = math.inf
            if self.held:  # taken in between, by one who saw that it was still due
                self.due_at = time.monotonic() + self.lease / 3
            return
        try:
            renewed = desk.store.renew_slots([slot for slot, _ in held], lease=self.lease)
        except StoreError:
            self.due_at = time.monotonic() + min(1.0, self.lease / 10)
            return
        self.due_at = time.monotonic() + self.lease / 3
        for (slot, lost), still in zip(held, renewed, strict=True):
            if not still and self.held.pop(slot.holder, None) is not None:
                lost(slot)


def _watch(desk: weakref.ref[Desk], store: Shielded) -> None:
    """Listen until nobody uses the desk any more."""
    process = forks.process

    def tell(view: CircuitView) -> None:
        alive = desk()
        if alive is not None:
            alive.told(view)

    def gone() -> bool:
        return desk() is None or forks.process is not process

    while not gone():
        try:
            store.watch_circuits(tell, stop=gone)
        except StoreError as exc:
            logger.debug("circuits cannot be listened to: %s", exc)
            time.sleep(0.5)
        except Exception:
            logger.exception("listening to circuits failed; it is tried again in a second")
            time.sleep(1.0)
        else:
            time.sleep(0.05)


class _Default:
    """What every downstream uses that names no store."""

    def __init__(self) -> None:
        self.open: Callable[[], PermitStore | Desk] | None = None
        self.by_url: Callable[[str], PermitStore] | None = None
        self.notify: Observer | None = None
        self.desk: Desk | None = None
        self.bound: weakref.WeakSet[Bound] = weakref.WeakSet()
        self.lock = threading.RLock()  # who opens a store may ask for a desk
        os.register_at_fork(after_in_child=self._unlock)

    def _unlock(self) -> None:
        self.lock = threading.RLock()


_default = _Default()
_desks: weakref.WeakValueDictionary[object, Desk] = weakref.WeakValueDictionary()


def opens_urls(open: Callable[[str], PermitStore]) -> None:
    """How a URL becomes a permit store: told by the floor above, which knows the stores."""
    _default.by_url = open


def use(open: Callable[[], PermitStore | Desk] | None, *, notify: Observer | None = None) -> None:
    """The store of every downstream that names none, opened at the first call; None: memory. *notify* is told events.

    Downstreams that were used before ask the new store from their next question on.
    """
    with _default.lock:
        _default.open, _default.notify, _default.desk = open, notify, None
        bound = list(_default.bound)
    for each in bound:
        each.rebind()


def bind(owner: Bound) -> None:
    """Call ``owner.rebind()`` at every `use`, as long as somebody holds *owner*."""
    with _default.lock:
        _default.bound.add(owner)


def desk_of(store: str | PermitStore | Desk | None) -> Desk:
    """The desk of this store, one for all who name it. Raises ConfigurationError for a URL that names none."""
    if isinstance(store, Desk):
        return store
    with _default.lock:
        if store is None:
            if _default.desk is None:
                _default.desk = _open_default()
            return _default.desk
        key: object = store if isinstance(store, str) else id(store)
        desk = _desks.get(key)
        if desk is None:
            desk = _desks[key] = Desk(_by_url(store) if isinstance(store, str) else store)
        return desk


def _open_default() -> Desk:
    if _default.open is not None:
        store = _default.open()
        return store if isinstance(store, Desk) else Desk(store)
    logger.warning(
        "downstreams: no permit store is set, so limits and circuits hold in this process alone; "
        "call taskguard.install(app), or give Downstream(store=...)"
    )
    return Desk(_by_url("memory://"))


def _by_url(url: str) -> PermitStore:
    if _default.by_url is None:
        raise ConfigurationError(f"store {url!r}: import taskguard first, which knows the stores")
    return _default.by_url(url)
