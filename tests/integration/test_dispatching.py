"""From rows to brokers: what goes in one request, what keeps its order, and what a refusal does to the others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from taskguard import ReliableTask, install
from taskguard.celery.broker import BrokerPublisher
from taskguard.celery.composing import compose
from taskguard.envelope import Envelope
from taskguard.errors import MessageError
from taskguard.handover import Held, Outgoing
from taskguard.headers import PREPARE

Given = tuple[Celery, BrokerPublisher, str]


def app_on(broker: str, queue: str, namespace: str) -> Celery:
    """A producer on this broker."""
    app = Celery("dispatching", broker=broker, set_as_current=False)
    app.conf.task_default_queue = queue
    install(app, store="memory://", namespace=namespace)

    @app.task(name="charge", base=ReliableTask, shared=False, ignore_result=True)
    def charge(number: int) -> None: ...

    return app


def rows(app: Celery, *numbers: int, ordering: Sequence[str] = (), **options: Any) -> list[Outgoing]:
    """The rows of these calls."""
    made = []
    for place, number in enumerate(numbers):
        given = {"args": (number,), **options}
        _, [composed] = compose(app, lambda to, given=given: app.tasks["charge"].apply_async(producer=to, **given))
        made.append(Outgoing(str(number), composed.wire, ordering[place] if ordering else "", place))
    return made


@pytest.fixture(params=["redis", "rabbitmq"])
def given(request: pytest.FixtureRequest, namespace: str) -> Iterator[Given]:
    """An application, its publisher and its queue."""
    url = request.getfixturevalue(f"{request.param}_url")
    name = request.getfixturevalue("queue_name")(url, "tasks")
    app = app_on(url, name, namespace)
    publisher = BrokerPublisher(app)
    yield app, publisher, name
    publisher.close()
    app.close()


def received(app: Celery, queue: str) -> list[Any]:
    """What is in the queue, oldest first: the first argument of each."""
    found = []
    with app.connection_for_read() as connection, connection.channel() as channel:
        bound = app.amqp.queues[queue](channel)
        bound.declare()
        while (message := bound.get(no_ack=True)) is not None:
            body = message.body
            found.append(json.loads(body if isinstance(body, str) else bytes(body))[0][0])
    return found


def test_rows_arrive_in_their_order(given: Given) -> None:
    """Many in one request, as kombu reads them; the second batch after the first."""
    app, publisher, queue = given
    assert publisher.dispatch(rows(app, *range(50))) == [None] * 50
    assert publisher.dispatch(rows(app, 50, 51)) == [None] * 2
    assert received(app, queue) == list(range(52))


def test_a_message_arrives_as_it_was_sent(given: Given) -> None:
    """Headers, body and properties: the consumer's view is that of a plain apply_async."""
    app, publisher, queue = given
    options = {"priority": 3, "headers": {"trace": "é"}, "reply_to": "me"}
    publisher.dispatch(rows(app, 1, task_id="same", **options))
    app.tasks["charge"].apply_async((1,), task_id="same", **options)
    seen = []
    with app.connection_for_read() as connection, connection.channel() as channel:
        bound = app.amqp.queues[queue](channel)
        while (message := bound.get(no_ack=True)) is not None:
            told = {name: message.properties.get(name) for name in ("correlation_id", "reply_to", "priority")}
            told |= {"mode": message.properties.get("delivery_mode"), "info": message.delivery_info["routing_key"]}
            body = message.body if isinstance(message.body, str) else bytes(message.body).decode()
            seen.append((body, message.content_type, message.content_encoding, message.headers, told))
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_a_batch_of_keys_arrives_in_the_order_of_each(given: Given) -> None:
    """Whatever rounds it takes."""
    app, publisher, queue = given
    batch = rows(app, *range(9), ordering=["a", "a", "", "b", "a", "b", "", "b", "a"])
    assert publisher.dispatch(batch) == [None] * 9
    arrived = received(app, queue)
    assert [number for number in arrived if number in (0, 1, 4, 8)] == [0, 1, 4, 8]
    assert [number for number in arrived if number in (3, 5, 7)] == [3, 5, 7]
    assert sorted(arrived) == list(range(9))


def test_a_large_body_arrives_whole(given: Given) -> None:
    """In several frames."""
    app, publisher, queue = given
    big = [Outgoing("1", _with_argument(app, "x" * 400_000), "", 0), *rows(app, 2)]
    assert publisher.dispatch(big) == [None, None]
    first, second = received(app, queue)
    assert (len(first), second) == (400_000, 2)


def test_an_unreadable_row_is_refused_and_the_others_go_out(given: Given) -> None:
    """It is at fault, and they are not."""
    app, publisher, queue = given
    first, last = rows(app, 1, 3)
    refused = publisher.dispatch([first, Outgoing("2", b"not a message", "", 1), last])
    assert [type(outcome) for outcome in refused] == [type(None), MessageError, type(None)]
    assert received(app, queue) == [1, 3]


def test_what_follows_an_unreadable_row_of_its_key_is_held(given: Given) -> None:
    """And so is what follows that; other keys go on."""
    app, publisher, queue = given
    bad = Outgoing("0", b"not a message", "k", 0)
    other, *after = rows(app, 1, 2, 3, ordering=["", "k", "k"])
    outcomes = publisher.dispatch([bad, other, *after])
    assert [type(outcome) for outcome in outcomes] == [MessageError, type(None), Held, Held]
    assert received(app, queue) == [1]


def test_rows_made_for_another_broker_arrive_too(given: Given, namespace: str) -> None:
    """The application has moved since they were written."""
    app, publisher, queue = given
    for broker in ("redis://127.0.0.1:1/0", "amqp://127.0.0.1:1//"):
        other = app_on(broker, queue, namespace)
        assert publisher.dispatch(rows(other, 7)) == [None]
    assert received(app, queue) == [7, 7]


def test_a_chords_first_message_waits_for_the_result_backend(given: Given) -> None:
    """It is not at fault: held, and published when the backend can be told."""
    app, publisher, queue = given
    told: list[Any] = []
    app.backend.set_chord_size = lambda *args: told.append(args) if told else told.append(_fail())
    [row] = rows(app, 5)
    prepare = [["set_chord_size", {"value": "group"}, {"value": 1}]]
    envelope = Envelope.from_wire(row.wire)
    wire = envelope.replace(properties={**envelope.properties, PREPARE: prepare}).to_wire()
    [held] = publisher.dispatch([Outgoing("5", wire)])
    assert isinstance(held, Held)
    assert received(app, queue) == []
    told.append("back")
    assert publisher.dispatch([Outgoing("5", wire)]) == [None]
    assert told[-1] == ("group", 1)
    assert received(app, queue) == [5]


def _fail() -> None:
    raise ConnectionError("the backend is away")


def test_a_broker_that_is_away_holds_everything(namespace: str) -> None:
    """With its error, once for all."""
    for broker in ("redis://127.0.0.1:1/0", "amqp://127.0.0.1:1//"):
        app = app_on(broker, "tasks", namespace)
        publisher = BrokerPublisher(app, timeout=1)
        outcomes = publisher.dispatch(rows(app, 1, 2))
        assert all(isinstance(outcome, Held) and outcome.away is not None for outcome in outcomes)


def test_a_queue_that_is_none_is_refused_on_redis(redis_url: str, namespace: str) -> None:
    """A key of another type: these messages are refused, those for other queues go out; memory is nobody's fault."""
    app = app_on(redis_url, f"{namespace}.good", namespace)
    publisher = BrokerPublisher(app)
    with Redis.from_url(redis_url) as client:
        client.set(f"{namespace}.bad", "no list")
    bad, good = rows(app, 1, queue=f"{namespace}.bad"), rows(app, 2)
    refused, published = publisher.dispatch([*bad, *good])
    assert "WRONGTYPE" in str(refused)
    assert not isinstance(refused, Held)
    assert published is None
    assert received(app, f"{namespace}.good") == [2]
    publisher.close()


def test_a_full_queue_refuses_on_rabbitmq(rabbitmq_url: str, namespace: str) -> None:
    """Not confirmed, so not published: each of them alone is told, and none is lost in silence."""
    from kombu import Queue

    app = app_on(rabbitmq_url, "full", namespace)
    app.conf.task_queues = [Queue("full", queue_arguments={"x-max-length": 2, "x-overflow": "reject-publish"})]
    publisher = BrokerPublisher(app)
    outcomes = publisher.dispatch(rows(app, 1, 2, 3, 4, queue="full"))
    assert outcomes[:2] == [None, None]
    assert all(type(outcome).__name__ == "MessageNacked" for outcome in outcomes[2:])
    assert received(app, "full") == [1, 2]
    assert publisher.dispatch(rows(app, 5, queue="full")) == [None]
    publisher.close()


def test_an_exchange_that_is_not_there_is_the_messages_fault(rabbitmq_url: str, namespace: str) -> None:
    """The broker closes the channel; the others are published all the same, once."""
    app = app_on(rabbitmq_url, "tasks", namespace)
    publisher = BrokerPublisher(app)
    first, last = rows(app, 1, 3)
    wire = Envelope.from_wire(first.wire).replace(exchange="nowhere", routing_key="x").to_wire()
    outcomes = publisher.dispatch([first, Outgoing("2", wire), last])
    assert outcomes[0] is None
    assert "NOT_FOUND" in str(outcomes[1])
    assert outcomes[2] is None
    assert set(received(app, "tasks")) == {1, 3}
    publisher.close()


def _with_argument(app: Celery, value: object) -> bytes:
    _, [composed] = compose(app, lambda to: app.tasks["charge"].apply_async((value,), producer=to))
    return composed.wire
