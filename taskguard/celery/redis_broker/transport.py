"""kombu's Redis transport and channel, with a `Taker` in the place of the blocking pop."""

from __future__ import annotations

from typing import Any

from kombu.utils.json import dumps

from taskguard.celery.redis_broker.line import SILENCE, Line
from taskguard.celery.redis_broker.message import Message
from taskguard.celery.redis_broker.scripts import run
from taskguard.celery.redis_broker.stock import redis as stock
from taskguard.celery.redis_broker.taker import PAUSE, Taker
from taskguard.celery.redis_broker.unacked import QoS
from taskguard.headers import AHEAD

TURN, WAKE = "TURN", "WAKE"

FRONT = 256
"""Messages put ahead that one put ahead later stands behind; there are more only where nobody takes any."""


class Channel(stock.Channel):  # type: ignore[misc]
    """kombu's channel. Queues that are consumed without acknowledgement, and fanout, go kombu's way."""

    QoS = QoS
    Message = Message

    puts_ahead = True
    """Whether `headers.AHEAD` is heeded."""

    owner_lease = 0.0
    """Seconds after which what this channel holds is given back by others, when it renews no more. 0: never."""

    from_transport_options = (*stock.Channel.from_transport_options, "owner_lease")

    # What kombu before 5.6 does not have: the seconds of one BRPOP, and queues that expire.
    brpop_timeout = 1
    _expires: Any = frozenset()

    def __init__(self, *args: Any, **options: Any) -> None:
        self.taker = Taker(self)
        self.item_at_hand = b""
        self.queue_at_hand = ""
        self._unacknowledged: set[str] = set()
        self._shared_client: Any = None
        self._plain_client: Any = None
        self._parameters: dict[str, Any] = {}
        super().__init__(*args, **options)
        self.handlers[TURN], self.handlers[WAKE] = self.taker.read, self.taker.hear
        self._parameters = super()._connparams()
        self.entry_keys = (self.key(self.unacked_key), self.key(self.unacked_index_key), self.owners_key)

    def key(self, name: str) -> str:
        """The name of a key in the server, for commands that kombu's client does not prefix."""
        return f"{self.global_keyprefix}{name}"

    @property
    def owners_key(self) -> str:
        """The index of owners by the end of their leases."""
        return self.key(f"{self.unacked_key}_owners")

    @property
    def takes(self) -> bool:
        """Whether messages are taken by script: where they are acknowledged."""
        return bool(self.ack_emulation and self.active_queues and not self._unacknowledged)

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        if self.connection is None and not asynchronous:
            # Closed: a task that ran on may still acknowledge its message, as it may with kombu's.
            return dict(self._parameters)
        parameters: dict[str, Any] = super()._connparams(asynchronous)
        if asynchronous and self.socket_timeout is None and self.brpop_timeout:
            # Read when something is there; but closing waits for the end of a BRPOP, and deletes queues.
            parameters["socket_timeout"] = SILENCE + self.brpop_timeout
        return parameters

    @property
    def silence(self) -> float:
        """Seconds to wait for an answer."""
        return SILENCE if self.socket_timeout is None else self.socket_timeout

    def _create_client(self, asynchronous: bool = False) -> Any:
        """One client for each pool: making one costs more than most commands."""
        if asynchronous:
            return super()._create_client(asynchronous=True)
        if self._shared_client is None or self._shared_client.connection_pool is not self.pool:
            self._shared_client = super()._create_client()
        return self._shared_client

    @property
    def plain_client(self) -> Any:
        """A client that leaves keys as they are and does not wait for ever.

        kombu's pool has no such bound by itself, and gets none: what is published would be published twice.
        """
        client = self._plain_client
        if client is None:
            pool = stock.redis.ConnectionPool(**{**self._connparams(), "socket_timeout": self.silence})
            client = self._plain_client = stock.redis.Redis(connection_pool=pool)
        return client

    def _disconnect_pools(self) -> None:
        client, self._plain_client = self._plain_client, None
        if client is not None:
            client.connection_pool.disconnect()
        super()._disconnect_pools()

    def basic_consume(self, queue: str, no_ack: bool = False, *args: Any, **options: Any) -> Any:
        """Consume from *queue*."""
        if no_ack and queue not in self._fanout_queues:
            self._unacknowledged.add(queue)
        consumer = super().basic_consume(queue, no_ack, *args, **options)
        self.taker.look_soon()
        return consumer

    def _basic_cancel(self, consumer_tag: str) -> Any:
        self._unacknowledged.discard(self._tag_to_queue.get(consumer_tag))
        return super()._basic_cancel(consumer_tag)

    def _put(self, queue: str, message: dict[str, Any], **options: Any) -> None:
        if not message["properties"].get(AHEAD, False) or queue in self._expires:
            super()._put(queue, message, **options)
            return
        key = self._q_for_pri(queue, self._get_message_priority(message, reverse=False))
        with self.conn_or_acquire() as client:
            run(client, "put_ahead", [key], dumps(message), f'"{AHEAD}"', FRONT)

    def hand_over(self, payload: dict[str, Any], queue: str, item: bytes) -> None:
        """Deliver a message that was taken. That it was put ahead says nothing any more."""
        if isinstance(payload.get("properties"), dict):
            payload["properties"].pop(AHEAD, None)
        self.item_at_hand, self.queue_at_hand = item, queue
        try:
            self.connection._deliver(payload, queue)
        finally:
            self.item_at_hand = b""

    def _poll_error(self, type: str, **options: Any) -> Any:
        if type in (TURN, WAKE):
            return self.handlers[type]()
        return super()._poll_error(type, **options)

    def _after_fork(self) -> None:
        self.taker.forget()
        super()._after_fork()

    def close(self) -> None:
        """Give back what is held, and close."""
        if self.closed:
            super().close()
            return
        clean = False
        try:
            clean = self.taker.close()
            if self._qos is not None:
                self._qos.restore_unacked_once()
            self.taker.retire(clean=clean)
        except (*self.connection_errors, self.ResponseError) as exc:
            stock.warning("taskguard: unacknowledged messages were not given back, and will be later: %s", exc)
            self.taker.retire(clean=False)
            if self._qos is not None:
                self._qos._delivered.clear()
        super().close()


class Poller(stock.MultiChannelPoller):  # type: ignore[misc]
    """kombu's poller, which also attends to lines."""

    hub: Any = None
    """The event loop; None where messages are drained one by one."""

    def attend(self, channel: Any, line: Line) -> None:
        """Watch a line's connections, until they are disconnected."""
        self._register(channel, line.turns, TURN)
        if line.tracked:
            self._register(channel, line.wakes, WAKE)

    def _register_BRPOP(self, channel: Any) -> None:
        if not channel.takes:
            super()._register_BRPOP(channel)

    def on_poll_start(self) -> None:
        """Before every wait."""
        super().on_poll_start()
        for channel in list(self._channels):
            channel.taker.turn()

    def on_readable(self, fileno: int) -> Any:
        """Something came."""
        found = self._fd_to_chan.get(fileno)
        if found is not None and found[1] in (TURN, WAKE):
            return found[0].handlers[found[1]]()
        return super().on_readable(fileno)

    def get(self, callback: Any, timeout: float | None = None) -> Any:
        """Without an event loop: one message, or Empty within a second."""
        for channel in list(self._channels):
            if channel.taker.deliver():
                return None
            channel.taker.turn()
            if channel.taker.deliver():  # what came late
                return None
        longest = min((PAUSE, *(channel.taker.patience for channel in self._channels)))
        return super().get(callback, timeout=longest if timeout is None else min(timeout, longest))


class Transport(stock.Transport):  # type: ignore[misc]
    """The transport."""

    Channel = Channel

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.cycle = Poller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Run in this event loop."""
        self.cycle.hub = loop
        super().register_with_event_loop(connection, loop)
