"""The shop: publishes the orders at a steady pace, in a thread, through whichever task it is given."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from taskguard.demo.orders import Kind, Order

SHORT = timedelta(seconds=0.3)
LONG = timedelta(minutes=5)
HOLD_TICK = 0.05


class Shop:
    """Publishes *orders* over *seconds* to one queue, as far as `allow` lets it. ``sent`` counts messages, ``placed``
    orders.

    *stale* turns an instant into the options that make a message stale after it.
    """

    def __init__(
        self,
        charge: Any,
        orders: Sequence[Order],
        *,
        queue: str,
        seconds: float,
        stale: Callable[[datetime], dict[str, Any]],
    ) -> None:
        self._charge = charge
        self._app = charge.app
        self._orders = orders
        self._queue = queue
        self._seconds = seconds
        self._stale = stale
        self._thread = threading.Thread(target=self._run, name="shop", daemon=True)
        self._closed = threading.Event()
        self._allowed = 0
        self.error: Exception | None = None
        self.placed = 0
        self.sent = 0

    @property
    def open(self) -> bool:
        """Whether orders are still to come."""
        return self.placed < len(self._orders) and self.error is None

    @property
    def held(self) -> bool:
        """Whether orders are still to come, and none of them is allowed."""
        return self.open and self.placed >= self._allowed

    def allow(self, number: int) -> None:
        """Place the first *number* orders, and hold the others back."""
        self._allowed = number

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """Stop publishing and wait for it."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def waiting(self) -> int:
        """How many messages wait in the broker's queue."""
        with self._app.connection_or_acquire() as connection:
            queue = self._app.amqp.queues[self._queue](connection.default_channel)
            return int(queue.queue_declare().message_count)

    def hidden(self) -> set[str]:
        """The ids of tasks whose messages Redis keeps in a dead worker's name; empty for other brokers."""
        with self._app.connection_or_acquire() as connection:
            channel = connection.default_channel
            if not hasattr(channel, "unacked_key"):
                return set()
            kept = (json.loads(message) for message in channel.client.hvals(channel.unacked_key))
            return {str(message["headers"].get("id")) for message, _, _ in kept}

    def clear(self) -> None:
        """Delete the queue, and the results of all orders."""
        with self._app.connection_for_write() as connection:
            self._app.amqp.queues[self._queue](connection.default_channel).delete()
        for order in self._orders:
            for task_id in set(order.task_ids):
                self._app.AsyncResult(task_id).forget()

    def _run(self) -> None:
        began = time.monotonic()
        try:
            with self._app.connection_for_write() as connection:
                producer = self._app.amqp.Producer(connection, auto_declare=False)
                for number, order in enumerate(self._orders):
                    came_to_it = time.monotonic()
                    while number >= self._allowed:
                        if self._closed.wait(HOLD_TICK):
                            return
                    began += time.monotonic() - came_to_it
                    due = began + self._seconds * number / len(self._orders)
                    if self._closed.wait(max(0.0, due - time.monotonic())):
                        return
                    self._place(order, producer)
                    self.placed += 1
        except Exception as exc:  # noqa: BLE001 - handed to the main thread, which is watching
            self.error = exc

    def _place(self, order: Order, producer: Any) -> None:
        for task_id in order.task_ids:
            match order.kind:
                case Kind.UNKNOWN:
                    options = {"task_id": task_id, "queue": self._queue, "producer": producer}
                    self._app.send_task(f"{self._charge.name}_v2", (order.id, order.amount), **options)
                case Kind.UNDECODABLE:
                    self._send_raw(b'[["%s", ' % order.id.encode(), order, task_id, producer)
                case Kind.MISSHAPEN:
                    self._send_raw(json.dumps({"order_id": order.id}).encode(), order, task_id, producer)
                case Kind.STALE:
                    self._send(order, task_id, producer, **self._stale(datetime.now(UTC) - LONG))
                case Kind.HURRIED:
                    self._send(order, task_id, producer, **self._stale(datetime.now(UTC) + SHORT))
                case _:
                    self._send(order, task_id, producer)
            self.sent += 1

    def _send(self, order: Order, task_id: str, producer: Any, **options: Any) -> None:
        options |= {"task_id": task_id, "queue": self._queue, "producer": producer}
        self._charge.apply_async((order.id, order.amount), **options)

    def _send_raw(self, body: bytes, order: Order, task_id: str, producer: Any) -> None:
        queue = self._app.amqp.queues[self._queue]
        producer.publish(
            body,
            content_type="application/json",
            content_encoding="utf-8",
            headers={
                "lang": "py",
                "task": self._charge.name,
                "id": task_id,
                "root_id": task_id,
                "argsrepr": f"({order.id!r}, …)",
            },
            exchange=queue.exchange,
            routing_key=queue.routing_key,
            declare=[queue],
            correlation_id=task_id,
        )
