"""Servers that answer and take nothing: no message is at fault, and the result backend stops no other message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu.entity import Queue
from redis import Redis
from redis import exceptions as errors

from taskguard.celery.broker import BrokerPublisher
from taskguard.celery.faults import is_servers
from taskguard.envelope import Envelope
from taskguard.errors import MessageError
from taskguard.handover import Held, Outgoing
from taskguard.headers import PREPARE
from tests.integration.servers import PrivateRedis
from tests.integration.test_dispatching import app_on, received, rows

PREPARED = [["set_chord_size", {"value": "group"}, {"value": 1}]]


def prepared(row: Outgoing) -> Outgoing:
    """As the first message of a chord."""
    envelope = Envelope.from_wire(row.wire)
    wire = envelope.replace(properties={**envelope.properties, PREPARE: PREPARED}).to_wire()
    return Outgoing(row.id, wire, row.ordering, row.ordinal)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[str]:
    """A Redis whose memory is full; it evicts nothing."""
    with PrivateRedis(tmp_path / "redis", "--maxmemory", "1mb", "--maxmemory-policy", "noeviction") as redis:
        with Redis.from_url(redis.url) as client, suppress(errors.OutOfMemoryError):
            for number in count():
                client.set(f"ballast:{number}", "x" * 100_000)
        yield redis.url


@pytest.fixture
def given(redis_url: str, namespace: str) -> Iterator[tuple[Celery, BrokerPublisher, str]]:
    """An application, its publisher and its queue."""
    name = f"{namespace}.tasks"
    app = app_on(redis_url, name, namespace)
    publisher = BrokerPublisher(app)
    yield app, publisher, name
    publisher.close()
    app.close()


@pytest.mark.parametrize("expires", [0, 60], ids=["in one request", "one by one"])
def test_a_redis_that_is_full_refuses_no_message(full: str, namespace: str, expires: int) -> None:
    """Held with its error, untried; also while the queue is declared. When there is room they go out."""
    app = app_on(full, f"{namespace}.tasks", namespace)
    if expires:
        app.conf.task_queues = [Queue(f"{namespace}.tasks", expires=expires)]
    publisher = BrokerPublisher(app, timeout=5)
    sent = rows(app, 1, 2)
    outcomes = publisher.dispatch(sent)
    assert [isinstance(outcome, Held) and type(outcome.away) for outcome in outcomes] == [errors.OutOfMemoryError] * 2
    with Redis.from_url(full) as client:
        client.config_set("maxmemory", "0")
    assert publisher.dispatch(sent) == [None] * 2
    assert received(app, f"{namespace}.tasks") == [1, 2]
    publisher.close()
    app.close()


@pytest.mark.parametrize(
    ("answer", "servers"),
    [
        (errors.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."), True),
        (errors.ReadOnlyError("You can't write against a read only replica."), True),
        (errors.NoPermissionError("this user has no permissions to run the 'lpush' command"), True),
        (errors.ClusterDownError("The cluster is down"), True),
        (errors.TryAgainError("Multiple keys request during rehashing of slot"), True),
        (errors.MasterDownError("Link with MASTER is down"), True),
        (errors.ResponseError("NOREPLICAS Not enough good replicas to write."), True),
        (errors.ResponseError("MISCONF Redis is configured to save RDB snapshots"), True),
        (errors.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"), False),
        (errors.ResponseError("Command # 1 (LLEN q) of pipeline caused error: WRONGTYPE Operation against"), False),
        (errors.DataError("Invalid input of type: 'dict'"), False),
        (ValueError("no route"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_only_what_the_message_is_to_blame_for_is_a_refusal(answer: Exception, servers: bool) -> None:
    """redis-py names most answers by type, and takes their code away."""
    assert is_servers(answer) is servers


def test_a_result_backend_that_is_away_stops_no_other_message(given: Any) -> None:
    """It is asked once in a batch, and once only; the chords wait by themselves, the connection stays."""
    app, publisher, queue = given
    asked: list[Any] = []

    def away(*args: Any) -> None:
        asked.append(args)
        raise ConnectionError("the backend is away")

    app.backend.set_chord_size = away
    chord, other, plain = rows(app, 1, 2, 3)
    outcomes = publisher.dispatch([prepared(chord), plain, prepared(other)])
    assert [type(outcome) for outcome in outcomes] == [Held, type(None), Held]
    assert all(outcome.away is None and "backend is away" in str(outcome.later) for outcome in outcomes if outcome)
    assert len(asked) == 1
    assert received(app, queue) == [3]
    kept = publisher._connection
    publisher.dispatch([prepared(chord)])
    assert len(asked) == 2, "the next batch asks again"
    assert publisher._connection is kept, "the broker is not to blame"


def test_a_chord_that_the_backend_does_not_take_is_refused(given: Any) -> None:
    """Or it would be tried for ever; the others go out."""
    app, publisher, queue = given

    def odd(*args: Any) -> None:
        raise TypeError("no such chord")

    app.backend.set_chord_size = odd
    chord, plain = rows(app, 1, 2)
    refused, published = publisher.dispatch([prepared(chord), plain])
    assert isinstance(refused, MessageError)
    assert "no such chord" in str(refused)
    assert published is None
    assert received(app, queue) == [2]


def test_a_backend_is_told_without_its_retries(namespace: str, redis_url: str) -> None:
    """The store's rows are in hand meanwhile. Celery's own sends keep theirs."""
    app = app_on(redis_url, f"{namespace}.tasks", namespace)
    app.conf.result_backend = "redis://127.0.0.1:1/0"
    policy = dict(app.backend.retry_policy)
    waited: list[Any] = []

    def wait(*args: Any) -> float:
        waited.append(args)
        return 0.0

    app.backend.on_connection_error = wait
    publisher = BrokerPublisher(app)
    [held] = publisher.dispatch([prepared(rows(app, 1)[0])])
    assert isinstance(held, Held)
    assert held.later is not None
    assert waited == []
    assert app.backend.retry_policy == policy
    publisher.close()
    app.close()


def test_at_rest_a_chord_whose_backend_is_away_leaves_the_others_alone(given: Any) -> None:
    """What the store keeps apart from an outbox goes the same way."""
    app, publisher, queue = given

    def away(*args: Any) -> None:
        raise ConnectionError("the backend is away")

    app.backend.set_chord_size = away
    chord, plain = rows(app, 1, 2)
    envelopes = [Envelope.from_wire(prepared(chord).wire), Envelope.from_wire(plain.wire)]
    failed, published = publisher.publish(envelopes)
    assert "backend is away" in str(failed)
    assert published is None
    assert received(app, queue) == [2]
