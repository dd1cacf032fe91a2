"""taskguard's Redis transport against a real Redis: what it takes, lets go and gives back, and what others see."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Consumer, Exchange, Producer, Queue
from kombu.connection import Connection as StockConnection
from redis import Redis

from taskguard.celery.redis_broker.connection import Connection
from taskguard.celery.redis_broker.message import UNDECODABLE
from taskguard.errors import MessageError
from taskguard.headers import AHEAD
from tests.integration.journal import Deadline

JUNK = [
    b"no json",
    b"\xff\x00 bytes",
    b'{"body": "e30=", "properties": {"delivery_tag": "x"}, "headers": {"name": "\xff"}}',
    b"[1, 2]",
    b"null",
    b'{"task": "work"}',
    b'{"body": "e30=", "properties": []}',
    b'{"body": "e30=", "properties": {}}',
    b'{"body": {}, "properties": {"delivery_tag": "x"}}',
    b'{"body": "e30", "properties": {"delivery_tag": "x", "body_encoding": "base64"}}',
    b'{"body": "e30=", "properties": {"delivery_tag": "x", "body_encoding": "rot13"}}',
    b'{"body": "e30=", "properties": {"delivery_tag": "x"}, "headers": [1]}',
    b'{"body": "e30=", "properties": {"delivery_tag": "x", "delivery_info": "here"}}',
    b'{"body": "e30=", "properties": {"delivery_tag": "x"}, "content-type": {}}',
]


class Desk:
    """Somebody who consumes, one message at a time."""

    def __init__(self, connection: Any, queues: list[Queue], *, prefetch: int = 0, **options: Any) -> None:
        self.channel = connection.channel()
        self.channel.basic_qos(0, prefetch, False)
        self.connection = connection
        self.messages: list[Any] = []
        self.faults: list[Exception] = []
        self.consumer = Consumer(
            self.channel,
            queues,
            on_message=self.messages.append,
            on_decode_error=self._fault,
            accept=["json"],
            **options,
        )
        self.consumer.consume()

    def _fault(self, message: Any, exc: Exception) -> None:
        self.messages.append(message)
        self.faults.append(exc)

    def receive(self, count: int = 1) -> list[Any]:
        """Wait for as many messages. Returns them."""
        until = len(self.messages) + count
        while len(self.messages) < until:
            self.connection.drain_events(timeout=20)
        return self.messages[-count:]

    def quiet(self) -> bool:
        """Whether nothing comes."""
        try:
            self.connection.drain_events(timeout=0.2)
        except TimeoutError:
            return True
        return False


class Place:
    """One namespace of keys on a Redis."""

    def __init__(self, url: str, namespace: str) -> None:
        self.url = url
        self.prefix = f"{namespace}."
        self.redis = Redis.from_url(url)
        self.queue = self.queue_named("tasks")
        self._open: list[Any] = []

    def queue_named(self, name: str) -> Queue:
        """A queue."""
        return Queue(name, Exchange(name), routing_key=name)

    def connect(self, kind: type = Connection, **options: Any) -> Any:
        """A connection, closed in the end."""
        connection = kind(self.url, transport_options={"global_keyprefix": self.prefix, **options})
        self._open.append(connection)
        return connection

    def desk(self, *queues: Queue, kind: type = Connection, prefetch: int = 0, lease: float = 0.0) -> Desk:
        """A consumer of these queues."""
        return Desk(self.connect(kind, owner_lease=lease), list(queues) or [self.queue], prefetch=prefetch)

    def send(self, *bodies: Any, queue: Queue | None = None, kind: type = Connection, **options: Any) -> None:
        """Publish."""
        target = queue or self.queue
        producer = Producer(self.connect(kind))
        for body in bodies:
            producer.publish(
                body, exchange=target.exchange, routing_key=target.routing_key, declare=[target], serializer="json",
                **options,
            )  # fmt: skip

    def unacked(self) -> dict[bytes, bytes]:
        """What is not acknowledged."""
        return self.redis.hgetall(f"{self.prefix}unacked")

    def owners(self) -> int:
        """How many owners are known."""
        return self.redis.zcard(f"{self.prefix}unacked_owners")

    def close(self) -> None:
        """Close what was opened."""
        for connection in self._open:
            connection.release()
        self.redis.close()


@pytest.fixture
def place(redis_url: str, namespace: str) -> Iterator[Place]:
    """A place of this test's own."""
    place = Place(redis_url, namespace)
    yield place
    place.close()


def bodies(messages: list[Any]) -> list[Any]:
    """What was sent."""
    return [message.payload for message in messages]


def test_what_was_rescued_does_not_queue_twice(place: Place) -> None:
    """What is put ahead is taken before all that wait, in its own order, and the mark goes no further."""
    place.send("first", "second")
    place.send("rescued", "later", **{AHEAD: True})
    taken = [(message.payload, AHEAD in message.properties) for message in place.desk().receive(4)]
    assert taken == [("rescued", False), ("later", False), ("first", False), ("second", False)]


def abandon(desk: Desk) -> None:
    """What is left when its process is killed: what it took, and an owner that renews no more."""
    taker = desk.channel.taker
    if taker._owner is not None:
        taker._owner.stop()
        taker._owner._thread.join()
    taker._line.close()
    desk.channel._qos._delivered.clear()
    taker._inbox.clear()
    taker._closed = True


@pytest.mark.parametrize(("sender", "receiver"), [(StockConnection, Connection), (Connection, StockConnection)])
def test_stock_and_ours_send_to_each_other(place: Place, sender: type, receiver: type) -> None:
    """Same keys, same items."""
    place.send({"n": 1}, {"n": 2}, kind=sender)
    assert bodies(place.desk(kind=receiver).receive(2)) == [{"n": 1}, {"n": 2}]


def test_what_is_taken_is_unacknowledged_and_what_is_acknowledged_is_gone(place: Place) -> None:
    """Nothing is only in the consumer's memory, and nothing is kept."""
    place.send(*range(5))
    desk = place.desk(prefetch=3)
    first, *_ = desk.receive(3)
    assert len(place.unacked()) == 3
    assert desk.quiet(), "no more than the prefetch count"
    first.ack()
    assert len(place.unacked()) == 2
    desk.receive(1)
    for message in desk.messages[1:]:
        message.ack()
    desk.receive(1)[0].ack()
    assert not place.unacked()
    assert not place.redis.zcard(f"{place.prefix}unacked_index")


def test_a_stock_worker_restores_what_ours_took(place: Place) -> None:
    """The entries are kombu's: where all of ours are gone, the visibility timeout brings messages back."""
    place.send("lost", priority=6)
    place.redis.lpush(f"{place.prefix}tasks", JUNK[0])
    desk = place.desk()
    desk.receive(2)
    abandon(desk)
    stock = place.connect(StockConnection, visibility_timeout=-1, unacked_restore_throttle=1).channel()
    stock.qos.restore_visible(num=10, interval=1)
    assert not place.unacked()
    again = place.desk()
    received = {message.body: message for message in again.receive(2)}
    assert received[b'"lost"'].delivery_info["redelivered"] is True
    assert received[b'"lost"'].headers["redelivered"] is True
    assert JUNK[0] in received


@pytest.mark.parametrize("item", JUNK)
def test_an_item_that_is_no_message_is_handed_up_with_its_bytes(place: Place, item: bytes) -> None:
    """As something that cannot be decoded; unacknowledged until then, and messages behind it arrive."""
    place.redis.lpush(f"{place.prefix}tasks", item)
    place.send("after")
    desk = place.desk()
    junk, after = desk.receive(2)
    assert junk.body == item
    assert isinstance(desk.faults[0], MessageError)
    assert after.payload == "after"
    assert len(place.unacked()) == 2
    junk.ack()
    assert len(place.unacked()) == 1


@pytest.mark.parametrize("item", [*JUNK, b"", b"a", b"ab", bytes(range(256))])
def test_an_item_that_is_no_message_survives_a_killed_consumer(place: Place, item: bytes) -> None:
    """The next one is handed the same bytes."""
    place.redis.lpush(f"{place.prefix}tasks", item)
    desk = place.desk()
    desk.receive()
    (tag,) = place.unacked()
    abandon(desk)
    again = place.desk()
    again.channel.qos.restore_by_tag(tag)
    (junk,) = again.receive()
    assert junk.body == item
    assert isinstance(again.faults[0], MessageError)
    assert len(place.unacked()) == 1


def test_a_stored_stand_in_says_what_it_is(place: Place) -> None:
    """The entry of an item that is no message is JSON, for stock workers to restore without harm."""
    place.redis.lpush(f"{place.prefix}tasks", JUNK[1])
    place.desk().receive()
    ((entry, exchange, routing_key),) = map(json.loads, place.unacked().values())
    assert base64.b64decode(entry["body"]) == JUNK[1]
    assert (entry["properties"]["type"], exchange, routing_key) == (UNDECODABLE, "", "tasks")


def test_priorities_and_queues_are_served_as_kombu_serves_them(place: Place) -> None:
    """A higher priority first, and within one priority no queue waits for another to be empty."""
    one, two = place.queue_named("one"), place.queue_named("two")
    place.send("a1", "a2", "a3", queue=one)
    place.send("b1", queue=two)
    place.send("late", queue=one, priority=9)
    received = bodies(place.desk(one, two).receive(5))
    assert [each for each in received if each[0] == "a"] == ["a1", "a2", "a3"]
    assert received.index("b1") <= 1
    assert received[-1] == "late"


def test_a_fixed_order_of_queues_is_kept(place: Place) -> None:
    """``queue_order_strategy``: the first queue until it is empty."""
    one, two = place.queue_named("one"), place.queue_named("two")
    place.send("b1", "b2", queue=two)
    place.send("a1", "a2", queue=one)
    desk = Desk(place.connect(queue_order_strategy="sorted"), [two, one])
    assert bodies(desk.receive(4)) == ["a1", "a2", "b1", "b2"]


def test_closing_gives_everything_back_in_order(place: Place) -> None:
    """What was handed over and what was not, before what is still queued."""
    place.send(*range(8))
    desk = place.desk(prefetch=6)
    assert bodies(desk.receive(2)) == [0, 1]
    desk.messages[0].ack()
    desk.connection.release()
    assert not place.unacked()
    assert bodies(place.desk().receive(7)) == [1, 2, 3, 4, 5, 6, 7]


def test_a_cancelled_queue_keeps_its_messages(place: Place) -> None:
    """What came for it in the last moment goes back."""
    place.send(*range(4))
    desk = place.desk()
    desk.receive()
    desk.consumer.cancel()
    assert desk.quiet()
    assert len(place.unacked()) == 1
    assert bodies(place.desk().receive(3)) == [1, 2, 3]


def test_rejecting_puts_a_message_behind_the_others(place: Place) -> None:
    """As kombu does; without a requeue it is gone."""
    place.send(*range(3))
    desk = place.desk(prefetch=1)
    desk.receive()[0].requeue()
    desk.receive()[0].reject()
    desk.receive()[0].ack()
    (last,) = desk.receive()
    assert last.payload == 0
    assert last.delivery_info["redelivered"] is True
    last.ack()
    assert desk.quiet()
    assert not place.unacked()


def test_a_late_acknowledgement_leaves_the_next_delivery_alone(place: Place) -> None:
    """A message that was given to another meanwhile stays his."""
    place.send("twice")
    slow = place.desk()
    (first,) = slow.receive()
    (tag,) = place.unacked()
    slow.channel.qos.restore_by_tag(tag)
    quick = place.desk()
    quick.receive()
    first.ack()
    assert len(place.unacked()) == 1


def test_an_ended_owner_s_messages_go_to_others(place: Place) -> None:
    """In their order, marked as redelivered, when its lease has ended, and not before."""
    place.send(*range(5))
    lost = place.desk(prefetch=3, lease=0.8)
    lost.receive(2)
    other = place.desk(lease=0.8)
    assert bodies(other.receive(2)) == [3, 4]
    abandon(lost)
    received = other.receive(3)
    assert bodies(received) == [0, 1, 2]
    assert all(message.delivery_info["redelivered"] for message in received)
    assert Deadline.after(10).reached(lambda: place.owners() == 1), "it is forgotten when all is given back"


def test_a_living_owner_keeps_its_messages(place: Place) -> None:
    """However long its loop does not turn: a thread renews."""
    place.send(*range(3))
    blocked = place.desk(prefetch=3, lease=0.5)
    blocked.receive(1)
    other = place.desk(lease=0.5)
    with pytest.raises(TimeoutError):
        other.connection.drain_events(timeout=2)
    assert len(place.unacked()) == 3
    blocked.connection.release()
    other.receive(3)
    assert Deadline.after(10).reached(lambda: place.owners() == 1)


def test_without_a_lease_nobody_else_gives_back(place: Place) -> None:
    """Plain tasks keep the visibility timeout."""
    place.send("held")
    abandon_me = place.desk()
    abandon_me.receive()
    abandon(abandon_me)
    other = place.desk(lease=0.3)
    with pytest.raises(TimeoutError):
        other.connection.drain_events(timeout=1.5)
    assert len(place.unacked()) == 1


def test_without_acknowledgement_and_fanout_go_kombu_s_way(place: Place) -> None:
    """Replies and broadcasts have nothing to be written down."""
    desk = Desk(place.connect(), [place.queue], no_ack=True)
    assert not desk.channel.takes
    place.send("reply")
    assert bodies(desk.receive()) == ["reply"]
    desk.connection.release()
    shout = Exchange("shout", type="fanout")
    ear = Desk(place.connect(), [Queue("ear", shout), place.queue])
    assert ear.channel.takes
    while not ear.quiet():
        pass  # subscribed
    Producer(place.connect()).publish("all", exchange=shout, declare=[shout], serializer="json")
    place.send("one")
    assert sorted(bodies(ear.receive(2))) == ["all", "one"]


def test_a_client_is_made_once(place: Place) -> None:
    """A client for each command is a fifth of a stock worker's time."""
    channel = place.connect().channel()
    with channel.conn_or_acquire() as first, channel.conn_or_acquire() as second:
        assert first is second


def test_a_broken_connection_is_reported_and_the_next_one_goes_on(place: Place) -> None:
    """As with stock: an error first, and nothing is lost or kept."""
    place.send(*range(4))
    desk = place.desk(prefetch=2)
    desk.receive(1)
    desk.channel.taker._line.turns.connection._sock.shutdown(socket.SHUT_RDWR)
    desk.messages[0].ack()
    with pytest.raises(desk.connection.connection_errors):
        desk.receive(3)
    desk.connection.release()
    assert not place.unacked()
    assert bodies(place.desk().receive(3)) == [1, 2, 3]
