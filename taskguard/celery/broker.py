"""The broker, as the relay knows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError

from taskguard import headers
from taskguard.celery.dispatching import RabbitMQ, RedisQueues, one_by_one
from taskguard.celery.effects import Effect, tell
from taskguard.celery.eviction import check_broker
from taskguard.celery.faults import is_backends
from taskguard.envelope import Envelope
from taskguard.errors import MessageError
from taskguard.handover import Held, Outgoing


class BrokerPublisher:
    """The relay's way to the broker: one connection of its own, every message confirmed where the broker can."""

    def __init__(self, app: Celery, *, timeout: float = 10.0) -> None:
        self._app = app
        self._timeout = timeout
        self._connection: Any = None
        self._producer: Any = None
        self._declared: set[str] = set()
        self._unheard: Exception | None = None
        self._way: Callable[[Sequence[Outgoing]], list[Exception | None]] | None = None

    def publish(self, envelopes: Sequence[Envelope]) -> list[Exception | None]:
        """See `taskguard.ports.Publisher`."""
        outcomes: list[Exception | None] = []
        self._unheard = None
        for envelope in envelopes:
            try:
                self._publish(envelope)
                outcomes.append(None)
            except Held as exc:
                outcomes.append(exc.later)
            except Exception as exc:  # noqa: BLE001 (transports raise what their drivers raise)
                outcomes.append(exc)
                gone = isinstance(exc, self._connection_errors())
                self.close()
                if gone:
                    break
        return outcomes + outcomes[-1:] * (len(envelopes) - len(outcomes))

    def dispatch(self, rows: Sequence[Outgoing]) -> Sequence[Exception | None]:
        """See `taskguard.handover.Dispatcher`."""
        self._unheard = None
        try:
            way = self._way or self._find_way()
            outcomes = way(rows)
        except Exception as exc:  # noqa: BLE001 (transports raise what their drivers raise)
            # Before anything was confirmed, or with the connection: what the broker took of it is unknown.
            self.close()
            return [Held(exc)] * len(rows)
        if any(isinstance(outcome, Held) and outcome.away is not None for outcome in outcomes):
            self.close()
        return outcomes

    def _find_way(self) -> Callable[[Sequence[Outgoing]], list[Exception | None]]:
        producer = self._producer or self._connect()
        kind = self._connection.transport.driver_type
        if kind == "redis":
            self._way = RedisQueues(producer.channel, self._declare_queue, self._publish_alone).dispatch
        elif kind == "amqp" and self._connection.transport.driver_name == "py-amqp":
            ways = RabbitMQ(self._connection, self._declare_queue, self._publish_alone, timeout=self._timeout)
            self._way = ways.dispatch
        else:
            self._way = lambda rows: one_by_one(rows, self._publish_alone)
        return self._way

    def _declare_queue(self, name: str) -> None:
        queues = self._app.amqp.queues
        if name in self._declared or not (self._app.conf.task_create_missing_queues or name in queues):
            return
        self._producer.maybe_declare(queues[name])
        self._declared.add(name)

    def _publish_alone(self, envelope: Envelope) -> None:
        try:
            self._publish(envelope)
        except self._connection_errors() as exc:
            raise Held(exc) from exc

    def _connection_errors(self) -> tuple[type[Exception], ...]:
        known = getattr(self._connection, "connection_errors", ())
        return (*known, OperationalError, ConnectionError, TimeoutError)

    def _publish(self, envelope: Envelope) -> None:
        producer = self._producer or self._connect()
        properties = dict(envelope.properties)
        properties.setdefault("delivery_mode", 2)
        prepare = properties.pop(headers.PREPARE, None)
        if prepare:
            self._tell(prepare)
        if not getattr(producer.channel, "puts_ahead", False):
            properties.pop(headers.AHEAD, None)
        producer.publish(
            envelope.body,
            exchange=envelope.exchange,
            routing_key=envelope.routing_key,
            headers=dict(envelope.headers),
            content_type=envelope.content_type,
            content_encoding=envelope.content_encoding,
            declare=self._declare(envelope),
            retry=False,
            timeout=self._timeout,
            **properties,
        )

    def _tell(self, effects: Sequence[Effect]) -> None:
        """Raises Held where the result backend is away, which is asked once in a batch; else MessageError."""
        if self._unheard is not None:
            raise Held(later=self._unheard)
        try:
            tell(self._app, effects)
        except Exception as exc:
            if not is_backends(exc, self._app.backend):
                raise MessageError(f"the result backend does not take what it is told of a chord: {exc!r}") from exc
            self._unheard = ConnectionError(f"the result backend was not told of a chord: {exc}")
            raise Held(later=self._unheard) from exc

    def _declare(self, envelope: Envelope) -> list[Any]:
        """The queue, as Celery itself would declare it: a broker drops what has no queue to go to."""
        name, queues = envelope.queue, self._app.amqp.queues
        direct = envelope.exchange == "" and self._app.conf.task_create_missing_queues
        if not name or name in self._declared or not (direct or name in queues):
            return []
        self._declared.add(name)
        return [queues[name]]

    def _connect(self) -> Any:
        self._connection = self._app.connection_for_write()
        self._connection.ensure_connection(max_retries=1, timeout=self._timeout)
        self._producer = self._app.amqp.Producer(self._connection, auto_declare=False)
        check_broker(self._producer)
        return self._producer

    def close(self) -> None:
        """Drop the connection; the next publish makes a new one."""
        connection, self._connection, self._producer = self._connection, None, None
        self._declared.clear()
        self._way = None
        if connection is not None:
            connection.release()
