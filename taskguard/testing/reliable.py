"""`Reliable`: one application in rehearsal, and what a test may do with it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from typing import Any, Literal, Self

from celery import Celery
from celery.result import AsyncResult

from taskguard.celery.worker import make_relay
from taskguard.clock import Duration, instant
from taskguard.custody import Leased
from taskguard.deadletters import DeadLetters
from taskguard.envelope import Envelope
from taskguard.errors import ConfigurationError
from taskguard.events import Event
from taskguard.letter import DeadLetter
from taskguard.ports import MessageStore
from taskguard.record import State
from taskguard.stores.memory import MemoryStore
from taskguard.testing.broker import Broker, Message, opened
from taskguard.testing.clock import ManualClock
from taskguard.testing.process import Crash, Process, watched
from taskguard.testing.stage import on_stage
from taskguard.testing.worker import Worker

BUSY = 10_000
MOVES = 1_000
"""Deliveries, and moves of the clock, in one `drain` after which it is taken for a loop."""

SWEEP = 1_000_000


class OrderlyStore(MemoryStore):
    """Messages due at the same instant leave in the order in which they came, so that a test always runs alike."""

    def take_due(self, *, limit: int, lease: float) -> list[Leased]:
        """See `taskguard.ports.MessageStore`."""
        places = {id: (record.due_at or 0.0, place) for place, (id, record) in enumerate(self.records.items())}
        return sorted(super().take_due(limit=limit, lease=lease), key=lambda leased: places[leased.id])


class Reliable:
    """An application whose store, broker, results and clock are this process's own while the block is open.

    Nothing runs by itself: what is sent waits in `queue` until `drain`, and what is not due yet in `waiting`.

    clock: moves when `advance` or ``drain(until=…)`` says so. store: the message store, if you must look closer.
    events: what happened, in order: ``completed``, ``replayed``, ``retried``, ``discarded`` and the rest.
    """

    def __init__(self, app: Celery, *, clock: ManualClock | None = None, process: Process | None = None) -> None:
        self.app = app
        self.clock = clock or ManualClock()
        self.events: list[Event] = []
        self._process = process or Process()
        self._broker = Broker(self._process)
        self._records = OrderlyStore()
        self.store: MessageStore = watched(self._records, self._process)
        self._draining = False
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self._broker.close)
            stack.enter_context(
                on_stage(self.app, store=self.store, broker=self._broker, clock=self.clock, events=self.events)
            )
            self._worker = Worker(self.app)
            stack.callback(self._worker.close)
            self._relay = make_relay(self.app)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    # -- looking ----------------------------------------------------------------------------------------------------

    @property
    def queue(self) -> list[Message]:
        """What is sent and has not run, the longest waiting first."""
        return [self._broker.message(self.app, parcel) for parcel in self._broker.waiting]

    @property
    def waiting(self) -> list[Message]:
        """What rests in the store until it is due: delays, retries, deferred work, waiting duplicates; by instant."""
        records = [record for record in self._records.records.values() if record.state is State.PENDING]
        records.sort(key=lambda record: record.due_at or 0.0)
        return [
            opened(self.app, Envelope.from_wire(record.wire or b""), queue=record.queue, due_at=record.due_at)
            for record in records
        ]

    @property
    def dead_letters(self) -> list[DeadLetter]:
        """The dead letters, the oldest first."""
        buried = [event.task_id for event in self.events if event.name == "dead_lettered"]
        order = {task_id: place for place, task_id in enumerate(buried)}  # many have the same instant
        return sorted(DeadLetters(self.store).select(), key=lambda letter: order.get(letter.record.task_id, 0))

    def result(self, task_id: str) -> AsyncResult:
        """The result of a task: Celery's own handle, with ``state``, ``result`` and ``get()``."""
        return self.app.AsyncResult(task_id)

    # -- acting -----------------------------------------------------------------------------------------------------

    def advance(self, by: Duration | str) -> float:
        """Move the clock: seconds, a ``timedelta``, or text such as ``"15m"``. Runs nothing. Returns the instant."""
        now = self.clock.advance(by)
        self.store.expire(limit=SWEEP)
        return now

    def drain(self, *, until: Duration | str | datetime | Literal["idle"] | None = None) -> int:
        """Run everything that is due, and what follows from it. Returns how many messages were delivered.

        until: move the clock, too, from one due instant to the next: for so many seconds, to an instant, or with
            ``"idle"`` until nothing rests any more. Without it the clock stands still.

        Raises AssertionError when there is no end to it.
        """
        if self._draining:
            raise ConfigurationError("drain: a task is running; drain in the test, not in the task")
        self._draining = True
        try:
            return self._drain(until)
        finally:
            self._draining = False

    def _drain(self, until: Duration | str | datetime | Literal["idle"] | None) -> int:
        limit = self.clock()
        if until is not None:
            limit = float("inf") if until == "idle" else instant(until, now=limit, what="until")
        delivered = moves = 0
        while True:
            while self._deliver():
                delivered += 1
                if delivered > BUSY:
                    raise AssertionError(f"drain: no end after {BUSY} deliveries; {self._unfinished()}")
            if self._relay.step():
                continue
            due_in = self.store.due_in()
            if due_in is None or self.clock() + due_in > limit:
                break
            moves += 1
            if moves > MOVES:
                raise AssertionError(f"drain: no end after {MOVES} moves of the clock; {self._unfinished()}")
            self.clock.move_to(self.clock() + due_in)
        if limit != float("inf"):
            self.clock.move_to(limit)
        self.store.expire(limit=SWEEP)
        return delivered

    def send_again(self, sent: AsyncResult | str) -> None:
        """Put a second copy of a message in the queue, run or not: what a redelivery or a lost reply does."""
        task_id = sent if isinstance(sent, str) else sent.id
        for parcel in reversed(self._broker.sent):
            if parcel.headers.get("id") == task_id:
                self._broker.waiting.append(parcel.again())
                return
        raise ConfigurationError(
            f"send_again: no message of task {task_id!r} was sent in this test; delay() comes first"
        )

    def assert_idempotent(
        self, task: Any, *args: Any, effects: Any, reset: Callable[[], Any] | None = None, **kwargs: Any
    ) -> tuple[str, ...]:
        """See `taskguard.testing.assert_idempotent`."""
        __tracebackhide__ = True
        from taskguard.testing.idempotent import assert_idempotent

        return assert_idempotent(task, *args, effects=effects, reset=reset, clock=self.clock, **kwargs)

    def _deliver(self) -> bool:
        message = self._broker.take(self.app)
        if message is None:
            return False
        try:
            with self._process.delivery(message.headers["id"]):
                self._worker.receive(message)
        except Crash:
            self._broker.lose_worker()
        return True

    def _unfinished(self) -> str:
        names = sorted({message.task for message in [*self.queue, *self.waiting]})
        return f"{', '.join(names) or 'a task'} goes on and on"
