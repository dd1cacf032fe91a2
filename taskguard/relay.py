"""The relay: the only thing that takes a message from rest and publishes it.

It leases due messages in one step, publishes them with the broker's confirmation, and only then removes them. Killed
anywhere in between, it leaves them leased: they come due again when the lease ends, and the claim recognises whatever
was published twice. Any number of relays share the work. A run whose lease ended is due like any other message.

Where the store tells of what comes due, an idle relay sleeps until the moment at which the next message is. It still
looks often enough to see the end of every lease that begins meanwhile. Where messages come due one after the other it
takes them together, once in a *poll*, as everywhere else.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from taskguard import headers
from taskguard.clock import Clock, wall_clock
from taskguard.custody import Leased
from taskguard.envelope import Envelope
from taskguard.errors import MessageError, TaskguardError
from taskguard.events import Event, Observer
from taskguard.forks import undisturbed
from taskguard.handover import MAX_TRIES, Dispatch, Handed, Outbox
from taskguard.ports import MessageStore, Publisher

SWEEP_EVERY = 5.0
"""Seconds between two sweeps of records whose retention is over; a full sweep is followed by the next at once."""

SWEEP_LIMIT = 500

OUTBOX_BATCH = 500
"""Rows of an outbox handed over at once."""
CAREFUL_BATCH = 16
"""Their number after the broker was away; it doubles with every batch, so that nothing runs it over when it is back."""
LINGER = 0.003
"""Seconds to wait for more rows where they come one by one and fast: batches of one cost most."""
SHORTEST_PAUSE = 0.02
"""Seconds between two looks at an outbox that cannot tell of its rows, while some come; doubled up to the poll."""
IN_VAIN = 10
"""Times as long as it took, the store is not looked through again for other things that are due, where there were none:
behind a million rows of an outbox that waited for a broker that takes a second, in which thousands could go out."""
LONGEST_SLEEP = 2.5
"""Seconds after which a relay looks that is told of what comes due. It is not told of runs, whose leases end: its own
workers' last three times as long, and another's may be shorter."""
TOLD_ONCE = 0.25
"""Seconds in which a store tells once. So who was told looks once more when they are over."""
GLANCE = 0.25
"""Seconds at most until a relay that waits looks whether it is to stop."""


class Relay:
    """Publishes what is due.

    batch: messages leased at once. lease: seconds after which another relay takes over what this one did not remove.
    poll: seconds between two looks when nothing was due.
    outbox: the rows that producers' transactions left in the store, where it has them; ``dispatch`` publishes those.
    retention: seconds that they are kept when they are published.
    expire: settles a message that is past its deadline and says whether it did; what it does not is published.
    """

    def __init__(
        self,
        store: Callable[[], MessageStore],
        publisher: Publisher,
        *,
        expire: Callable[[Envelope], bool],
        notify: Observer,
        batch: int = 100,
        lease: float = 15.0,
        poll: float = 0.25,
        clock: Clock = wall_clock,
        outbox: Callable[[], Outbox | None] = lambda: None,
        dispatch: Dispatch | None = None,
        outbox_batch: int = OUTBOX_BATCH,
        retention: float = 0.0,
    ) -> None:
        self._store = store
        self._publisher = publisher
        self._expire = expire
        self._notify = notify
        self._batch = batch
        self._lease = lease
        self._poll = poll
        self._clock = clock
        self._outbox = outbox
        self._dispatch = dispatch
        self._outbox_batch = self._outbox_limit = outbox_batch
        self._retention = retention
        self._sweep_at = time.monotonic() + SWEEP_EVERY
        self._rung = threading.Event()
        self._is_told = False
        self._told_at = -TOLD_ONCE
        self._took_at = -poll

    def step(self) -> int:
        """Take one batch from rest. Returns how many messages are published or settled.

        Raises StoreUnavailable or the broker's error when nothing could be done.
        """
        store = self._store()
        leased = store.take_due(limit=self._batch, lease=self._lease)
        gone: list[Leased] = []
        outgoing: list[tuple[Leased, Envelope]] = []
        for item in leased:
            try:
                envelope = Envelope.from_wire(item.wire)
            except MessageError as exc:
                self._notify(Event(name="relay_failed", detail=f"record {item.id}: {exc}"))
                continue
            late = envelope.deadline_at is not None and envelope.deadline_at <= self._clock()
            if late and self._expire(envelope):
                gone.append(item)
            else:
                # It has queued once. Somebody waits for it since its worker died, or its slot is now.
                if item.rescued or headers.bookings(envelope):
                    envelope = envelope.replace(properties={**envelope.properties, headers.AHEAD: True})
                outgoing.append((item, envelope))
        failures = self._publish(outgoing, gone)
        if gone:
            store.remove(gone)
        elif failures:
            raise failures[0][1]
        for envelope, failure in failures:
            self._tell("relay_failed", envelope, f"{type(failure).__name__}: {failure}")
        return len(gone)

    def _publish(self, outgoing: list[tuple[Leased, Envelope]], gone: list[Leased]) -> list[tuple[Envelope, Exception]]:
        """Publish what can be, adding it to *gone*. What cannot be comes due again when its lease ends."""
        failures = []
        outcomes = self._publisher.publish([envelope for _, envelope in outgoing]) if outgoing else ()
        for (item, envelope), failure in zip(outgoing, outcomes, strict=True):
            if failure is None:
                gone.append(item)
                self._tell("published", envelope)
            else:
                failures.append((envelope, failure))
        return failures

    def _tell(self, name: str, envelope: Envelope, detail: str = "") -> None:
        self._notify(Event(name=name, task=envelope.task, task_id=envelope.task_id, key=envelope.key, detail=detail))

    def hand_over(self) -> int:
        """Publish one batch of the outbox. Returns how many messages were taken, 0 where the broker went away.

        Raises StoreUnavailable or the broker's error when nothing could be done.
        """
        handed = self.hand_over_batch()
        return 0 if handed.away is not None else handed.taken

    def hand_over_batch(self) -> Handed:
        """As `hand_over`. Returns what became of the batch."""
        outbox = self._outbox()
        if outbox is None or self._dispatch is None:
            return Handed()
        limit = self._outbox_limit
        try:
            handed = outbox.hand_over(self._dispatch, limit=limit, lease=self._lease, retention=self._retention)
        except Exception:
            self._outbox_limit = min(CAREFUL_BATCH, self._outbox_batch)
            raise
        if handed.away is not None:
            self._outbox_limit = min(CAREFUL_BATCH, self._outbox_batch)
            self._notify(Event(name="relay_failed", detail=f"{type(handed.away).__name__}: {handed.away}"))
        elif handed.taken:
            self._outbox_limit = min(2 * limit, self._outbox_batch)
        if handed.published:
            self._notify(Event(name="published", detail="from the outbox", count=handed.published))
        for row, refused in handed.refused:
            dead = row.tries + 1 >= MAX_TRIES
            detail = f"{type(refused).__name__}: {refused}"
            with suppress(MessageError):
                envelope = Envelope.from_wire(row.wire)
                self._tell("dead_lettered" if dead else "relay_failed", envelope, detail)
        if handed.later is not None:
            self._notify(Event(name="relay_failed", detail=f"{type(handed.later).__name__}: {handed.later}"))
        return handed

    def run(self, stop: threading.Event) -> None:
        """Relay until *stop* is set; who sets it must `ring`, too. Failures are told and waited out, with backoff up to
        five seconds.
        """
        if self._outbox() is not None and self._dispatch is not None:
            self._run_with_outbox(stop)
            return
        threading.Thread(target=self._listen, args=(stop,), name="taskguard-due", daemon=True).start()
        failures = 0
        while not stop.is_set():
            try:
                with undisturbed:
                    pause = self._turn()
                    self._sweep()
                failures = 0
            except Exception as exc:  # noqa: BLE001 (a broker's errors are its transport's; the relay must outlive all)
                failures = self._failed(exc, failures)
                stop.wait(min(self._poll * 2.0**failures, 5.0))
            else:
                self._rest(stop, pause)

    def ring(self) -> None:
        """End the relay's sleep: something is due, or it is to stop."""
        self._rung.set()

    def _listen(self, stop: threading.Event) -> None:
        def told(stands: bool) -> None:
            self._is_told, self._told_at = stands, time.monotonic()
            self.ring()

        try:
            self._store().watch_due(told, stop=stop.is_set)
        except Exception as exc:  # noqa: BLE001 (it is no more than a wish to be told: the relay looks by itself)
            self._notify(Event(name="relay_failed", detail=f"not told of what is due: {type(exc).__name__}: {exc}"))
        told(False)

    def _turn(self) -> float:
        """Take what is due. Returns the seconds until the next look."""
        if self._is_told:
            longest = max(min(self._lease / 3, LONGEST_SLEEP), self._poll)
            if time.monotonic() < self._told_at + TOLD_ONCE:
                longest = TOLD_ONCE
            due_in = self._store().due_in()
            if due_in is None or due_in > 0:
                return longest if due_in is None else min(due_in, longest)
        moved = self.step()
        if moved or self._is_told:
            self._took_at = time.monotonic()
        return 0.0 if moved >= self._batch else self._poll

    def _rest(self, stop: threading.Event, seconds: float) -> None:
        """Until the time is over, or sooner where the store tells of something; but no sooner than a poll after what
        was taken last, so that messages that come due one after the other go out together."""
        until = time.monotonic() + seconds
        stop.wait(min(until, self._took_at + self._poll) - time.monotonic())
        if not stop.is_set():
            self._rung.wait(until - time.monotonic())
        self._rung.clear()

    def _run_with_outbox(self, stop: threading.Event) -> None:
        """As `run`. All that is due is looked for every *poll*, however busy the outbox is, and again at once where it
        was a whole batch, and when the next known of is due; the outbox also when the database tells of rows.
        """
        pause, told, failures, look_at = 0.0, True, 0, 0.0
        while not stop.is_set():
            moved, stepped, took, due_in, began = 0, 0, 0.0, None, time.monotonic()
            try:
                with undisturbed:
                    look = began >= look_at
                    if look and not told:
                        due_in = self._store().due_in()
                    if told or (due_in is not None and due_in <= 0):
                        moved = self.hand_over()
                        if look:
                            looked_at = time.monotonic()
                            stepped = self.step()
                            took = time.monotonic() - looked_at
                    if look:
                        in_vain = IN_VAIN * took if moved and not stepped else 0.0
                        look_at = began + max(self._poll if stepped < self._batch else 0.0, in_vain)
                        self._sweep()
                failures = 0
            except Exception as exc:  # noqa: BLE001 (a broker's errors are its transport's; the relay must outlive all)
                failures = self._failed(exc, failures)
            if failures:
                longest = min(self._poll * 2.0**failures, 5.0)
                stop.wait(random.uniform(longest / 2, longest))  # so that the relays of a fleet do not return as one
                told = True
            elif moved >= self._outbox_limit // 2 or stepped >= self._batch:
                pause, told = 0.0, True
            elif moved or stepped:
                stop.wait(LINGER)
                pause, told = SHORTEST_PAUSE, True
            else:
                # Who is told and finds nothing was there a moment too early, by the database's clock.
                pause = min(SHORTEST_PAUSE if told else max(2 * pause, SHORTEST_PAUSE), self._poll)
                told = self._wait(stop, min(pause, due_in) if due_in is not None and due_in > 0 else pause)
                if not told:
                    look_at = 0.0

    def _failed(self, exc: Exception, before: int) -> int:
        """Tell of it. Returns how many failures in a row that makes, as far as the longest backoff asks."""
        text = str(exc) if isinstance(exc, TaskguardError) else f"{type(exc).__name__}: {exc}"
        self._notify(Event(name="relay_failed", detail=text))
        return min(before + 1, 10)

    def _wait(self, stop: threading.Event, seconds: float) -> bool:
        """Wait for rows. True where the database told of some."""
        until = time.monotonic() + seconds
        while not stop.is_set() and (left := until - time.monotonic()) > 0:
            outbox = self._outbox()
            if outbox is None:
                stop.wait(left)
            elif outbox.wait(min(left, GLANCE)):
                return True
        return False

    def _sweep(self) -> None:
        if time.monotonic() >= self._sweep_at:
            swept = self._store().expire(limit=SWEEP_LIMIT)
            self._sweep_at = time.monotonic() + (0.0 if swept >= SWEEP_LIMIT else SWEEP_EVERY)
