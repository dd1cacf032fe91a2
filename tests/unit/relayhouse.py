"""A store, a broker in memory, and relays between them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from taskguard.envelope import Envelope
from taskguard.events import Event
from taskguard.relay import Relay
from taskguard.stores.memory import MemoryStore
from tests.clocks import ManualClock
from tests.contracts.messages import LEASE, message


class Broker:
    """A broker in memory, with its promise: what is confirmed is in the queue.

    ``gone_after`` messages of a call its link breaks; the keys in ``refused`` it never takes.
    """

    def __init__(self) -> None:
        self.queue: list[Envelope] = []
        self.gone_after: int | None = None
        self.refused: set[str] = set()
        self.asked = threading.Semaphore(0)

    def publish(self, envelopes: Sequence[Envelope]) -> list[Exception | None]:
        self.asked.release()
        return [self._take(number, envelope) for number, envelope in enumerate(envelopes)]

    def _take(self, number: int, envelope: Envelope) -> Exception | None:
        if self.gone_after is not None and number >= self.gone_after:
            return OSError("the broker is away")
        if envelope.key in self.refused:
            return ValueError(f"{envelope.key}: no route")
        self.queue.append(envelope)
        return None

    @property
    def keys(self) -> list[str]:
        return [envelope.key for envelope in self.queue]


class House:
    """A store, a broker and relays between them."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.store = MemoryStore(clock)
        self.broker = Broker()
        self.events: list[Event] = []

    def relay(self, *, expire: Callable[[Envelope], bool] = lambda envelope: False, **options: object) -> Relay:
        return Relay(
            lambda: self.store,
            self.broker,
            expire=expire,
            notify=self.events.append,
            clock=self.clock,
            lease=LEASE,
            **options,  # type: ignore[arg-type]
        )

    def rests(self, *keys: str, due_in: float = 0.0) -> list[Envelope]:
        messages = [message(key, task_id=f"task-{key}") for key in keys]
        for number, envelope in enumerate(messages):
            self.store.schedule(envelope, due_at=self.clock.at + due_in + number / 1000)
        self.clock.advance(len(keys) / 1000)
        return messages


@contextmanager
def running(relay: Relay) -> Iterator[None]:
    """*relay* runs on a thread while the block is open."""
    stop = threading.Event()
    thread = threading.Thread(target=relay.run, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        relay.ring()
        thread.join(10)
    assert not thread.is_alive()
