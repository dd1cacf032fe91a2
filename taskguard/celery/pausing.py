"""Paused queues: what the permit store says is paused, no worker consumes, and a worker that starts asks first.

A thread asks the store; the worker's own thread, whose connection it is, stops and begins to consume. What was fetched
before runs to its end. A store that does not answer changes nothing: what was paused stays so, what was not goes on.
Where nothing is paused and the store tells of changes, it is asked only now and then.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from celery import bootsteps
from celery.utils.log import get_logger

from taskguard.celery.runtime import Runtime, runtime_of
from taskguard.clock import iso
from taskguard.envelope import Envelope
from taskguard.errors import StoreError
from taskguard.events import Event
from taskguard.forks import undisturbed

logger = get_logger(__name__)

LOOK_EVERY = 0.3
"""Seconds between two looks. With a turn of the event loop, a pause is everywhere within a second."""
SELDOM = 5.0
"""Seconds between two looks where nothing is paused and the store tells when that changes."""
FIRST_PATIENCE = 5.0
"""Seconds a worker that starts waits for the store's word before it consumes without it."""

BY_CIRCUIT = "circuit "
"""How the name of who paused a queue begins, where it was a circuit; its own name follows."""

Paused = Mapping[str, tuple[float | None, str, str]]


class Pauser(bootsteps.StartStopStep):  # type: ignore[misc]
    """Between the consumer's being made and its first message. Started again with every new connection."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._held: set[str] = set()
        self._known: Paused | None = None
        self._told = ""
        self._stop = threading.Event()
        self._rung = threading.Event()
        self._is_told = False

    def start(self, consumer: Any) -> None:
        """Leave out what is paused, and watch."""
        runtime = runtime_of(consumer.app)
        self._stop = stop = threading.Event()
        self._rung, self._is_told = threading.Event(), False
        waited = 0.0
        while self._known is None and waited < FIRST_PATIENCE:
            if self._look(runtime) is None:
                waited += LOOK_EVERY
                stop.wait(LOOK_EVERY)
        self._apply(consumer, self._known or {})
        watching = (consumer, runtime, stop)
        threading.Thread(target=self._watch, args=watching, name="taskguard-pauser", daemon=True).start()
        threading.Thread(target=self._listen, args=(runtime, stop), name="taskguard-paused", daemon=True).start()

    def stop(self, consumer: Any) -> None:
        """The connection is gone, or the worker goes."""
        self._stop.set()
        self._rung.set()

    terminate = stop

    def _watch(self, consumer: Any, runtime: Runtime, stop: threading.Event) -> None:
        paused, rung = self._known, self._rung
        while not stop.is_set():
            rung.wait(SELDOM if self._is_told and paused == {} and not self._held else LOOK_EVERY)
            rung.clear()
            if stop.is_set():
                return
            with undisturbed:
                paused = self._look(runtime)
            if paused is not None and (self._held or paused):
                consumer.call_soon(self._in_turn, consumer, paused, stop)

    def _listen(self, runtime: Runtime, stop: threading.Event) -> None:
        rung = self._rung

        def told(stands: bool) -> None:
            if not stop.is_set():  # else another has taken over
                self._is_told = stands
                rung.set()

        try:
            runtime.permits.watch_paused(told, stop=stop.is_set)
        except Exception:
            logger.exception("not told of paused queues; the store is asked more often instead")
        told(False)

    def _look(self, runtime: Runtime) -> Paused | None:
        try:
            self._known, self._told = _still(runtime, runtime.permits.paused()), ""
        except StoreError as exc:
            if not self._told:  # one line an outage
                runtime.observers(Event(name="permits_down", detail=f"asking for paused queues: {exc}"))
            self._told = str(exc)
            return None
        return self._known

    def _in_turn(self, consumer: Any, paused: Paused, stop: threading.Event) -> None:
        """On the worker's own thread. The loss of the connection is the consumer's to see to; nothing else ends it."""
        if stop.is_set() or consumer.task_consumer is None:
            return
        try:
            self._apply(consumer, paused)
        except (*consumer.connection_errors, *consumer.channel_errors):
            raise
        except Exception:
            logger.exception("queues could not be paused or resumed as told: %r", paused)

    def _apply(self, consumer: Any, paused: Paused) -> None:
        notify = runtime_of(consumer.app).observers
        consumed = {queue.name for queue in consumer.task_consumer.queues}
        for queue in sorted(consumed & paused.keys()):
            consumer.cancel_task_queue(queue)
            self._held.add(queue)
            until, who, why = paused[queue]
            end = "until it is resumed" if until is None else f"until {iso(until)}"
            notify(Event(name="queue_paused", detail=f"{queue} {end}, by {who}: {why}"))
        for queue in sorted(self._held - paused.keys()):
            consumer.add_task_queue(queue)
            selected = consumer.app.amqp.queues
            if queue not in selected.consume_from:  # Celery 5.5 would leave it out after the next reconnect
                selected.consume_from[queue] = selected[queue]
            self._held.discard(queue)
            notify(Event(name="queue_resumed", detail=queue))


def pause_for(runtime: Runtime, envelope: Envelope, wait: float, *, who: str, why: str) -> None:
    """Pause the queue a message came from, for *wait* seconds. An operator's pause, or a longer one, stays as it is."""
    queue, permits = _queue_of(runtime, envelope), runtime.permits
    try:
        until = permits.now() + wait
        others = permits.paused().get(queue)
        if others is not None and (not others[1].startswith(BY_CIRCUIT) or others[0] is None or others[0] >= until - 1):
            return
        permits.pause(queue, until=until, who=who, why=why)
    except StoreError as exc:
        runtime.observers(Event(name="permits_down", detail=f"pausing {queue}: {exc}"))


def _still(runtime: Runtime, paused: Paused) -> Paused:
    """The pauses that hold: one for a circuit that lets calls through again is over, and taken back.

    Only a circuit that this store knows is believed: a downstream may have a store of its own.
    """
    permits, over = runtime.permits, set[str]()
    for queue, (_, who, _) in paused.items():
        if who.startswith(BY_CIRCUIT):
            view = permits.circuit(who.removeprefix(BY_CIRCUIT))
            if view.generation and view.state in ("closed", "forced_closed", "disabled"):
                permits.resume(queue)
                over.add(queue)
    return {queue: pause for queue, pause in paused.items() if queue not in over} if over else paused


def _queue_of(runtime: Runtime, envelope: Envelope) -> str:
    """The queue's name, which brokers do not tell: they name the exchange and the key that the message came by."""
    queues = runtime.app.amqp.queues
    if envelope.queue not in queues:
        for name, queue in queues.items():
            if queue.routing_key == envelope.routing_key and queue.exchange.name == envelope.exchange:
                return str(name)
    return envelope.queue
