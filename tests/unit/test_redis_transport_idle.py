"""A consumer with nothing to do: what it is told of, and what it is spared."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import Empty

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.unit.test_redis_transport import Place, bodies


@pytest.fixture
def place(redis_url: str, namespace: str) -> Iterator[Place]:
    """A place of this test's own."""
    place = Place(redis_url, namespace)
    yield place
    place.close()


@pytest.mark.parametrize("priority", [0, 3, 9])
def test_an_idle_consumer_is_told_of_a_message(place: Place, monkeypatch: pytest.MonkeyPatch, priority: int) -> None:
    """At once, in any queue and at any priority: it does not find it by looking now and then."""
    monkeypatch.setattr("taskguard.celery.redis_broker.taker.SELDOM", 1000)
    desk = place.desk(place.queue, place.queue_named("other"))
    assert desk.quiet()
    sender = threading.Timer(0.3, lambda: place.send("ring", queue=place.queue_named("other"), priority=priority))
    sender.start()
    assert bodies(desk.receive()) == ["ring"]
    sender.join()


def test_an_idle_consumer_is_not_told_of_what_others_do(place: Place) -> None:
    """All take from one hash of unacknowledged messages: with each turn of one, it would wake all the others."""
    mine = place.queue_named("mine")
    idle, busy = place.desk(mine, lease=30.0), place.desk(lease=30.0)
    assert idle.quiet()
    for number in range(5):
        place.send(number)
        (message,) = busy.receive()
        message.ack()
    assert busy.quiet()
    place.send("mine", queue=mine)
    kind, _, keys = idle.channel.taker._line.wakes.connection.read_response()
    assert (kind, keys) == (b"message", [f"{place.prefix}mine".encode()]), "its first word"


def test_what_comes_right_after_the_look_is_not_missed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker tells of it on one connection while the look's answer, nothing, is still unread on the other."""
    monkeypatch.setattr("taskguard.celery.redis_broker.taker.SELDOM", 1000)
    desk = place.desk()
    assert desk.quiet()
    taker = desk.channel.taker
    taker._look(taker._line, [place.queue.name])
    assert taker._line.more(timeout=10), "it has looked"
    place.send("at once")
    with pytest.raises(Empty):
        taker.hear()
    assert bodies(desk.receive()) == ["at once"]


def test_a_queue_that_is_added_is_looked_into_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits in it came before anybody was to be told."""
    monkeypatch.setattr("taskguard.celery.redis_broker.taker.SELDOM", 1000)
    desk = place.desk()
    assert desk.quiet()
    added = place.queue_named("added")
    place.send("waits", queue=added)
    desk.consumer.add_queue(added)
    desk.consumer.consume()
    assert bodies(desk.receive()) == ["waits"]


@pytest.mark.parametrize("under_way", ["a turn", "a look"])
def test_a_queue_that_is_added_while_a_request_is_under_way_is_looked_into(
    place: Place, monkeypatch: pytest.MonkeyPatch, under_way: str
) -> None:
    """Its answer says nothing of that queue."""
    monkeypatch.setattr("taskguard.celery.redis_broker.taker.SELDOM", 1000)
    desk = place.desk()
    assert desk.quiet()
    taker, added = desk.channel.taker, place.queue_named("added")
    place.send("waits", queue=added)
    if under_way == "a turn":
        taker._ask(1)
    else:
        taker._look(taker._line, [place.queue.name])
    desk.consumer.add_queue(added)
    desk.consumer.consume()
    assert bodies(desk.receive()) == ["waits"]


def test_a_line_that_may_no_longer_be_told_is_given_up(place: Place) -> None:
    """A new one finds out, and looks often: with this one each message would wait for the next look."""
    desk = place.desk()
    assert desk.quiet()
    taker = desk.channel.taker
    taker._line._ask("CLIENT", "TRACKING", "OFF")
    taker._look(taker._line, [place.queue.name])
    with pytest.raises(RedisConnectionError, match="does not tell"):
        taker.read()
    assert taker._line is None
