"""taskguard's Redis transport where something is wrong: a loop that is late, a broker that refuses or is silent."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu.asynchronous import Hub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

import taskguard
from taskguard.celery.redis_broker import taker as taking
from taskguard.celery.worker import fit_transport
from tests.integration.servers import PrivateRedis
from tests.unit.test_redis_transport import Desk, Place, bodies

REFUSED = "Redis refused to hand out messages"


@pytest.fixture
def place(redis_url: str, namespace: str) -> Iterator[Place]:
    """A place of this test's own."""
    place = Place(redis_url, namespace)
    yield place
    place.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PrivateRedis]:
    """A broker of this test's own."""
    with PrivateRedis(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def private(server: PrivateRedis) -> Iterator[Place]:
    """A place on that broker."""
    place = Place(server.url, "private")
    yield place
    place.close()


@pytest.fixture
def skip(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the taker's clock go forward by as many seconds."""
    ahead = [0.0]
    monkeypatch.setattr(taking, "monotonic", lambda: time.monotonic() + ahead[0])

    def forward(seconds: float) -> None:
        ahead[0] += seconds

    return forward


def drain_until(desk: Desk, reached: Callable[[], Any]) -> None:
    """Consume until it is so, whatever is refused meanwhile."""
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline
        with suppress(TimeoutError, ResponseError):
            desk.connection.drain_events(timeout=0.1)


def busy(place: Place, desk: Desk, skip: Callable[[float], None], work: Callable[[Any], None]) -> None:
    """What this consumer does for a message sends a request, and goes on for longer than a broker may be silent."""
    taker = desk.channel.taker

    def run(message: Any) -> None:
        skip(5)
        work(message)
        assert taker._awaited
        for _ in range(2):  # it serves its clients in rounds: after the second it has answered what came before
            place.redis.ping()
        skip(desk.channel.health_check_interval + 10)
        desk.messages.append(message)

    desk.consumer.on_message = run


def test_a_blocked_consumer_does_not_take_its_broker_for_dead(place: Place, skip: Callable[[float], None]) -> None:
    """The answer came while a callback ran; it is looked for before anything is given up."""
    place.send(1, 2)
    desk = Desk(place.connect(), [place.queue], prefetch=2)
    busy(place, desk, skip, lambda _: desk.channel.taker._ask(1))
    assert bodies(desk.receive(2)) == [1, 2]
    desk.consumer.on_message = desk.messages.append
    line = desk.channel.taker._line
    desk.messages[0].ack()
    place.send(3)
    assert bodies(desk.receive()) == [3]
    assert desk.channel.taker._line is line


@pytest.mark.parametrize("early", [True, False])
def test_a_blocked_event_loop_does_not_take_its_broker_for_dead(
    place: Place, skip: Callable[[float], None], early: bool
) -> None:
    """Whether a message is acknowledged before its long callback or after it."""
    place.send(*range(5))
    desk = place.desk(prefetch=2)
    busy(place, desk, skip, lambda message: message.ack() if early else desk.channel.taker._ask(0))
    hub = Hub()
    desk.connection.register_with_event_loop(hub)
    loop, deadline = hub.create_loop(), time.monotonic() + 20
    while len(desk.messages) < 5:
        assert time.monotonic() < deadline
        next(loop)
        for message in desk.messages:
            if not message.acknowledged:
                message.ack()
    assert bodies(desk.messages) == list(range(5))


def test_a_silent_broker_is_given_up(server: PrivateRedis, private: Place, skip: Callable[[float], None]) -> None:
    """Lateness without an answer is the broker's."""
    desk = private.desk()
    taker = desk.channel.taker
    drain_until(desk, lambda: taker._line is not None and not taker._awaited)
    with server.frozen():
        skip(10)
        taker.turn()
        assert taker._awaited
        skip(desk.channel.health_check_interval + 10)
        with pytest.raises(RedisConnectionError):
            taker.turn()


def test_a_broken_line_is_not_connected_again_in_silence(place: Place) -> None:
    """Replies on a new connection would be taken for those of requests on the old one."""
    desk = place.desk()
    desk.quiet()
    line = desk.channel.taker._line
    line.turns.connection.disconnect()
    line.wakes.connection.disconnect()
    for use in (lambda: line.send(["PING"]), line.more, line.hear):
        with pytest.raises(RedisConnectionError):
            use()
    assert line.turns.connection._sock is None
    assert line.wakes.connection._sock is None


def test_a_queue_that_is_no_list_keeps_no_other_from_being_consumed(place: Place) -> None:
    """What the script had taken before it came to it is handed over."""
    desk = place.desk(place.queue, place.queue_named("wrong"))
    place.redis.set(f"{place.prefix}wrong", "no list")
    place.send(1, 2)
    drain_until(desk, lambda: len(desk.messages) == 2)
    assert bodies(desk.messages) == [1, 2]
    place.redis.delete(f"{place.prefix}wrong")


def test_what_a_script_took_before_it_was_stopped_goes_back(
    server: PrivateRedis, private: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """While the connection stays as it is, and again and again until it can."""
    private.redis.execute_command("ACL", "SETUSER", "half", "on", ">pass", "~*", "&*", "+@all", "-zadd")
    private.send(1)
    user = Place(server.url.replace("://", "://half:pass@"), "private")
    desk = user.desk()
    drain_until(desk, lambda: REFUSED in caplog.text)
    drain_until(desk, lambda: not private.unacked() and private.redis.llen("private.tasks") == 1)
    private.redis.execute_command("ACL", "SETUSER", "half", "-rpush")
    drain_until(desk, lambda: "refused to take messages back" in caplog.text)
    assert len(private.unacked()) == 1
    private.redis.execute_command("ACL", "SETUSER", "half", "+zadd", "+rpush")
    drain_until(desk, lambda: desk.messages)
    assert bodies(desk.messages) == [1]
    user.close()


@pytest.mark.parametrize("key", ["unacked", "unacked_index", "unacked_owners"])
def test_nothing_leaves_its_queue_where_it_cannot_be_noted(
    place: Place, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    """A key of another type is seen before the first message is taken."""
    place.redis.set(f"{place.prefix}{key}", "something else")
    place.send(1)
    desk = place.desk(lease=60)
    drain_until(desk, lambda: REFUSED in caplog.text)
    assert place.redis.llen(f"{place.prefix}tasks") == 1
    place.redis.delete(f"{place.prefix}{key}")
    drain_until(desk, lambda: desk.messages)
    assert bodies(desk.messages) == [1]


def test_what_its_queue_does_not_take_back_stays_unacknowledged(place: Place) -> None:
    """Its only copy is not let go before it is elsewhere; the others go back."""
    place.send("stays")
    place.send("goes", queue=place.queue_named("other"))
    desk = place.desk(place.queue, place.queue_named("other"))
    desk.receive(2)
    place.redis.set(f"{place.prefix}tasks", "no list")
    tags = [message.delivery_tag for message in desk.messages]
    with pytest.raises(ResponseError):
        taking.give_back(desk.channel, tags)
    assert len(place.unacked()) == place.redis.zcard(f"{place.prefix}unacked_index") == 1
    assert place.redis.llen(f"{place.prefix}other") == 1
    place.redis.delete(f"{place.prefix}tasks")
    assert taking.give_back(desk.channel, tags) == 1
    assert place.redis.llen(f"{place.prefix}tasks") == 1
    assert not place.unacked()


def test_a_full_broker_takes_messages_back(private: Place) -> None:
    """It gains nothing by what is only moved."""
    private.send("back")
    desk = private.desk()
    (message,) = desk.receive()
    private.redis.config_set("maxmemory", 1)
    assert taking.give_back(desk.channel, [message.delivery_tag]) == 1
    private.redis.config_set("maxmemory", 0)


def test_closing_gives_back_though_acknowledging_failed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not handed over is not left behind with it."""
    place.send(*range(4))
    desk = place.desk(prefetch=4)
    desk.receive(1)
    taker = desk.channel.taker
    assert len(taker._inbox) == 3

    def fail(*_: Any) -> None:
        raise ResponseError("not now")

    monkeypatch.setattr(taking, "run", fail)
    taker._settled.append(desk.messages[0].delivery_tag)
    with pytest.raises(ResponseError):
        taker.close()
    assert len(place.unacked()) == 1
    assert place.redis.llen(f"{place.prefix}tasks") == 3


def test_what_closing_could_not_give_back_is_remembered(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second attempt finds it."""
    place.send(*range(3))
    desk = place.desk(prefetch=3)
    desk.receive(1)

    def fail(*_: Any, **__: Any) -> None:
        raise RedisConnectionError("not now")

    with monkeypatch.context() as away:
        away.setattr(taking, "give_back", fail)
        with pytest.raises(RedisConnectionError):
            desk.channel.taker.close()
    desk.channel.taker.close()
    assert place.redis.llen(f"{place.prefix}tasks") == 2


def test_two_threads_may_drain_what_is_acknowledged(place: Place) -> None:
    """The other one may have taken the last between the look and the grip."""

    class Raced(deque[str]):
        def __len__(self) -> int:
            return 1

    desk = place.desk()
    desk.channel.taker._settled = Raced()
    assert desk.channel.taker._drained() == []
    desk.channel.taker._settled = deque()


@pytest.mark.parametrize(("no_ack", "lease"), [(False, 0.0), (False, 0.5), (True, 0.0)])
def test_a_channel_is_closed_though_its_broker_is_silent(
    server: PrivateRedis, private: Place, no_ack: bool, lease: float
) -> None:
    """Within ten seconds, with messages unacknowledged, owned, or a ``BRPOP`` under way."""
    private.send(*range(3))
    desk = Desk(private.connect(owner_lease=lease), [private.queue], prefetch=2, no_ack=no_ack)
    desk.receive()
    if no_ack:
        while not desk.quiet():
            pass

    def close() -> None:
        with suppress(*desk.connection.connection_errors):
            desk.channel.close()

    with server.frozen():
        closing = threading.Thread(target=close, daemon=True)
        closing.start()
        closing.join(10)
        assert not closing.is_alive()


def test_a_silent_broker_does_not_stop_the_beat_for_ever(server: PrivateRedis, private: Place) -> None:
    """It fails, and is tried again."""
    desk = private.desk(lease=0.4)
    desk.quiet()
    owner = desk.channel.taker._owner
    with server.frozen():
        owner._stopping.wait(0.5)
        owner._stopping.set()
        owner._thread.join(10)
        assert not owner._thread.is_alive()


def test_the_user_s_own_patience_is_kept(place: Place) -> None:
    """A ``socket_timeout`` in the transport's options holds for all; kombu's pool is as the user has it."""
    own = Desk(place.connect(socket_timeout=2.5), [place.queue])
    unset = place.desk()
    for desk, seconds in ((own, 2.5), (unset, 5.0)):
        desk.quiet()
        channel = desk.channel
        assert channel.taker._line.turns.connection.socket_timeout == seconds
        assert channel.plain_client.connection_pool.connection_kwargs["socket_timeout"] == seconds
    assert own.channel.pool.connection_kwargs["socket_timeout"] == 2.5
    assert unset.channel.pool.connection_kwargs["socket_timeout"] is None


@pytest.mark.parametrize(
    ("read", "write", "owned"),
    [
        ("redis://localhost:1", "redis://localhost:1", True),
        ("rediss://localhost:1", "redis://localhost:1", True),
        ("amqp://localhost:1", "amqp://localhost:1", False),
        ("redis://localhost:1", "amqp://localhost:1", False),
    ],
)
def test_only_redis_is_told_of_a_lease(read: str, write: str, owned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """RabbitMQ's transport takes options for arguments of its connection."""
    # Shared tasks that other tests declared are every application's of this process.
    monkeypatch.setattr("taskguard.celery.worker._has_plain_tasks", lambda app: False)
    app = Celery("shop", set_as_current=False)
    app.conf.update(broker_read_url=read, broker_write_url=write)
    taskguard.install(app, store="memory://", lease=9)
    app.finalize()
    fit_transport(app)
    assert ("owner_lease" in (app.conf.broker_transport_options or {})) is owned
