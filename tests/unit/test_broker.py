"""The relay's publisher over a real kombu transport in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from kombu import Queue
from kombu.exceptions import OperationalError
from kombu.transport.memory import Channel

from taskguard.celery.broker import BrokerPublisher
from taskguard.envelope import Envelope
from tests.contracts.messages import message


@pytest.fixture
def app(namespace: str) -> Iterator[Celery]:
    """An application whose broker is the memory of this process, where queues of other tests may be."""
    app = Celery(namespace, broker="memory://", set_as_current=False)
    app.conf.task_default_queue = namespace
    yield app
    with app.connection_for_write() as connection, connection.channel() as channel:
        for word in ("", ".new"):
            channel.queue_delete(namespace + word)
    app.close()


@pytest.fixture
def publisher(app: Celery) -> Iterator[BrokerPublisher]:
    """A publisher of this test's own."""
    publisher = BrokerPublisher(app)
    yield publisher
    publisher.close()


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> Outage:
    """Lets the transport break."""
    outage = Outage(Channel._put)
    monkeypatch.setattr(Channel, "_put", lambda channel, queue, message, **options: outage(channel, queue, message))
    return outage


class Outage:
    """Between kombu and its queues: raises ``error`` once ``after`` messages are through."""

    def __init__(self, put: Any) -> None:
        self._put = put
        self.error: Exception | None = None
        self.after = 0
        self.tried: list[str] = []

    def __call__(self, channel: Channel, queue: str, sent: Any) -> None:
        self.tried.append(sent["headers"]["id"])
        if self.error is not None and len(self.tried) > self.after:
            raise self.error
        self._put(channel, queue, sent)


def to(queue: str, key: str, **changes: Any) -> Envelope:
    envelope = message(key, task_id=f"task-{key}")
    return envelope.replace(queue=queue, routing_key=queue, headers={"id": envelope.task_id}, **changes)


def waiting(app: Celery, queue: str) -> list[Any]:
    """What is in the queue, taken out of it."""
    with app.connection_for_read() as connection, connection.channel() as channel:
        found = []
        while (each := Queue(queue)(channel).get(no_ack=True)) is not None:
            found.append(each)
        return found


def test_messages_arrive_in_order_as_they_were_kept(app: Celery, publisher: BrokerPublisher, namespace: str) -> None:
    """The bytes, headers and properties are the producer's."""
    sent = [to(namespace, key, properties={"correlation_id": key, "priority": 3}) for key in "abc"]
    assert publisher.publish(sent) == [None, None, None]
    arrived = waiting(app, namespace)
    assert [each.headers["id"] for each in arrived] == ["task-a", "task-b", "task-c"]
    assert [each.properties["correlation_id"] for each in arrived] == ["a", "b", "c"]
    assert {each.properties["delivery_mode"] for each in arrived} == {2}
    assert {as_sent(each) for each in arrived} == {(sent[0].body, sent[0].content_type)}


def as_sent(arrived: Any) -> tuple[bytes, str]:
    body = arrived.body
    return body if isinstance(body, bytes) else body.encode(), arrived.content_type


def test_nothing_to_publish_needs_no_broker(publisher: BrokerPublisher, outage: Outage) -> None:
    """An empty batch has no outcomes."""
    outage.error = ConnectionError("away")
    assert publisher.publish([]) == []


def test_a_queue_that_nobody_has_declared_is_declared(app: Celery, publisher: BrokerPublisher, namespace: str) -> None:
    """A broker drops what has no queue to go to, and confirms it."""
    new = f"{namespace}.new"
    assert publisher.publish([to(new, "a"), to(new, "b")]) == [None, None]
    assert len(waiting(app, new)) == 2


def test_a_queue_is_declared_again_on_a_new_connection(app: Celery, publisher: BrokerPublisher, namespace: str) -> None:
    """It may be gone with the broker that was away."""
    new = f"{namespace}.new"
    assert publisher.publish([to(new, "a")]) == [None]
    with app.connection_for_write() as connection, connection.channel() as channel:
        channel.queue_delete(new)
    publisher.close()
    assert publisher.publish([to(new, "b")]) == [None]
    assert [each.headers["id"] for each in waiting(app, new)] == ["task-b"]


def test_a_message_that_cannot_be_sent_is_skipped(app: Celery, publisher: BrokerPublisher, namespace: str) -> None:
    """Many of them, with a property that no broker takes: the others arrive, and are the ones said to."""
    sent = [to(namespace, str(number), properties={"expiration": "soon"} if number % 2 else {}) for number in range(10)]
    outcomes = publisher.publish(sent)
    assert [outcome is None for outcome in outcomes] == [True, False] * 5
    assert len(waiting(app, namespace)) == 5


@pytest.mark.parametrize("error", [ConnectionError("away"), TimeoutError("away"), OperationalError("away")])
def test_a_broker_that_is_away_is_not_asked_again(
    app: Celery, publisher: BrokerPublisher, outage: Outage, namespace: str, error: Exception
) -> None:
    """All that are left fail with its error, at once; the next batch finds it back."""
    outage.error, outage.after = error, 1
    sent = [to(namespace, key) for key in "abcd"]
    first, *others = publisher.publish(sent)
    assert first is None
    assert len(others) == 3
    assert all("away" in str(each) for each in others)
    assert outage.tried == ["task-a", "task-b"]
    outage.error = None
    assert publisher.publish(sent[1:]) == [None, None, None]
    assert [each.headers["id"] for each in waiting(app, namespace)] == ["task-a", "task-b", "task-c", "task-d"]


def test_a_broker_that_nobody_can_reach_fails_the_whole_batch(namespace: str) -> None:
    """The port is closed: every message has its error."""
    app = Celery(namespace, broker="redis://127.0.0.1:1/0", set_as_current=False)
    app.conf.broker_transport_options = {"socket_connect_timeout": 1}
    publisher = BrokerPublisher(app, timeout=1)
    outcomes = publisher.publish([to(namespace, key) for key in "abc"])
    assert len(outcomes) == 3
    assert all(isinstance(each, OperationalError) for each in outcomes)
