"""Relays of the outbox as real processes on real servers: killed at every step, cut off, stopped; side by side.

The steps are read from the code (`tests.integration.crashpoints`). ``make test`` plays each on a broker and a database
drawn for it, and every other test once on each database; with ``PROOF_ALL=1`` all is played on all. ``PROOF_SEED``
repeats a draw.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest

from tests import services
from tests.integration.crashpoints import Point, Side, overlooked, relay_steps
from tests.integration.journal import Deadline
from tests.integration.outboxhouse import OutboxHouse, assert_in_order, house_of
from tests.integration.proxy import Proxy
from tests.integration.servers import PrivateRedis
from tests.proof.draw import plays_all, seed

BROKERS, DATABASES = ("redis", "rabbitmq"), ("postgresql", "mariadb", "sqlite")
PAIRS = list(product(BROKERS, DATABASES))
ALL = plays_all()
SEED = seed()
BATCH = 8


class Step(NamedTuple):
    """Whose step it is: of one broker, of some databases. *twice*: the sides on which a batch that the broker has, or
    has some of, is not off the database yet.
    """

    brokers: tuple[str, ...] = BROKERS
    databases: tuple[str, ...] = DATABASES
    twice: tuple[Side, ...] = ()


STEPS = {
    "Outbox.hand_over": Step(),
    "Dispatcher.dispatch": Step(twice=("after",)),
    "handing.settle": Step(twice=("after",)),
    "handing.take_from_postgresql": Step(databases=("postgresql",), twice=("after",)),
    "handing.take_from_mysql": Step(databases=("mariadb",), twice=("after",)),
    "handing.lease_from_sqlite": Step(databases=("sqlite",)),
    "handing.write": Step(databases=("mariadb", "sqlite"), twice=("before", "after")),
    "RedisQueues.dispatch": Step(("redis",), twice=("after",)),
    "RabbitMQ.dispatch": Step(("rabbitmq",), twice=("after",)),
    "ConfirmingChannel.open": Step(("rabbitmq",), twice=("before", "after")),
    "ConfirmingChannel.frames": Step(("rabbitmq",)),
    "ConfirmingChannel.begin": Step(("rabbitmq",), twice=("before", "after")),
    "ConfirmingChannel.write": Step(("rabbitmq",), twice=("before", "after")),
    "ConfirmingChannel.wait": Step(("rabbitmq",), twice=("before", "after")),
}
SPARED = {
    "Relay.hand_over": "hand_over_batch, by its number",
    "Relay.hand_over_batch": "Outbox.hand_over; beside it observers are told",
    "Relay.step": "of what is due in the store: its points are in test_crash_points",
    "Relay.run": "does not end",
    "Relay.ring": "sets an event",
    "Outbox.wait": "listens, with nothing in hand",
    "handing.outgoing": "talks to nobody",
    "dispatching.one_by_one": "for other brokers: Publisher.publish for each row, and test_crash_points has that",
}
"""Operations of a relay that none dies at, and why."""


def draw() -> list[Any]:
    """Each step on each side, with the pair that plays it."""
    run, drawn = Random(SEED), []
    for name, step in STEPS.items():
        for point in (Point(name, "before"), Point(name, "after")):
            pairs = list(product(step.brokers, step.databases))
            for pair in pairs if ALL else [run.choice(pairs)]:
                drawn.append(pytest.param(pair, point, id=f"{'-'.join(pair)}-{point}"))
    return drawn


def draw_pairs() -> list[Any]:
    """Each database, with a broker for each."""
    run = Random(SEED)
    brokers = run.sample(BROKERS * 2, 3)
    drawn = PAIRS if ALL else list(zip(brokers, DATABASES, strict=True))
    return [pytest.param(pair, id="-".join(pair)) for pair in drawn]


@pytest.fixture(scope="module")
def rabbitmq_url() -> Iterator[str]:
    """One virtual host for all tests here: each has a queue of its own, and making a host takes seconds."""
    with services.rabbitmq_vhost(services.require("rabbitmq"), f"t{uuid.uuid4().hex[:16]}") as url:
        yield url


@pytest.fixture
def house(
    request: pytest.FixtureRequest, pair: tuple[str, str], namespace: str, tmp_path: Path
) -> Iterator[OutboxHouse]:
    """An outbox in this database before this broker."""
    print(f"PROOF_SEED={SEED}")
    yield from house_of(request, *pair, namespace, tmp_path)


def orders(count: int, keys: str = "abc") -> list[tuple[str, int]]:
    """So many orders of each key, and as many without."""
    return [(key, number) for number in range(count) for key in (*keys, "")]


@pytest.mark.parametrize(("pair", "point"), draw())
def test_a_relay_that_dies_at_any_step_loses_nothing(point: Point, house: OutboxHouse) -> None:
    """Another takes over what it had in hand; of each key the order stands; what the broker had not is there once."""
    sent = orders(10)
    for each in sent:
        house.write([each])
    house.wait_dead(house.start_relay("--batch", str(BATCH), dies_at=str(point)))
    before = house.received()
    house.start_relay("--batch", str(BATCH))
    house.wait_empty()
    received = house.received()
    assert len(before) < len(sent), "it died in mid-work"
    assert sorted(set(received)) == sorted(set(sent))
    assert_in_order(received)
    again = len(received) - len(sent)
    if point.side in STEPS[point.operation].twice:
        assert 0 < again <= BATCH, "what the broker had of one batch came twice"
    else:
        assert not again, "nothing was in hand that the broker had"


def test_every_step_of_a_relay_is_played() -> None:
    """A new operation fails here until a relay dies at it, or it is spared with a reason."""
    assert overlooked(relay_steps(), STEPS, SPARED) == set()


@pytest.mark.parametrize("pair", draw_pairs())
def test_only_what_was_committed_comes_out_once(house: OutboxHouse) -> None:
    """Half of the transactions are rolled back; two relays share the rest."""
    relays = [house.start_relay("--batch", "5") for _ in range(2)]
    for number in range(40):
        house.write([("a", number // 2), ("", number)], rollback=number % 2 == 1)
    house.wait_empty()
    received = house.received()
    assert sorted(received) == sorted([("a", n) for n in range(20)] + [("", n) for n in range(0, 40, 2)])
    assert_in_order(received)
    started = Deadline.after(60).reached(lambda: house.logs().count("Relaying the outbox") == len(relays))
    assert started, house.logs()
    for relay in relays:
        relay.terminate()
        assert house.wait_end(relay) == 0, house.logs()


@pytest.mark.parametrize("pair", draw_pairs())
def test_two_relays_of_which_one_is_killed_keep_the_order_of_every_key(house: OutboxHouse) -> None:
    """Killed again and again at a random moment while the other goes on."""
    run = Random(7)
    house.start_relay("--batch", "4")
    victim = house.start_relay("--batch", "4")
    sent = orders(25, "abcdefgh")
    for begin in range(0, len(sent), 9):
        house.write(sent[begin : begin + 9])
        if run.random() < 0.15:
            victim.kill()
            victim.join()
            victim = house.start_relay("--batch", "4")
    victim.kill()
    house.wait_empty()
    received = house.received()
    assert set(received) == set(sent)
    assert_in_order(received)


@pytest.mark.parametrize("pair", draw_pairs())
def test_a_stopped_relay_finishes_its_batch(house: OutboxHouse) -> None:
    """SIGTERM in mid-work: status 0, nothing twice; what is left is the next one's."""
    for each in orders(60):
        house.write([each])
    relay = house.start_relay("--batch", "3")
    assert Deadline.after(60).reached(lambda: house.store.outbox.status().waiting < 200), house.logs()
    relay.terminate()
    assert house.wait_end(relay) == 0, house.logs()
    house.start_relay()
    house.wait_empty()
    assert sorted(house.received()) == sorted(orders(60))


# -- a broker that goes away -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["postgresql", "sqlite"])
def test_a_broker_that_restarts_costs_nothing_but_time(
    store: str, request: pytest.FixtureRequest, namespace: str, tmp_path: Path
) -> None:
    """Redis is killed; producers go on and notice nothing; when it is back the rows go out, none tried in vain."""
    url = request.getfixturevalue(f"{store}_url")
    with PrivateRedis(tmp_path / "redis") as redis:
        house = OutboxHouse(redis.url, url, namespace, tmp_path)
        try:
            house.start_relay()
            house.write([("a", 0)])
            house.wait_empty()
            redis.kill()
            house.write([("a", 1), ("b", 0)])
            relay_said = Deadline.after(60).reached(lambda: "relay_failed" in house.logs())
            assert relay_said, house.logs()
            house.write([("a", 2)])
            assert all(record.crashes == 0 for record in house.store.outbox.peek(10)), "no message is at fault"
            redis.start()
            house.wait_empty()
            received = house.received()
            assert set(received) == {("a", 0), ("a", 1), ("a", 2), ("b", 0)}
            assert_in_order(received)
        finally:
            house.close()


@pytest.mark.parametrize("store", ["postgresql", "mariadb"])
def test_a_rabbitmq_that_cannot_be_reached_costs_nothing_but_time(
    store: str, request: pytest.FixtureRequest, namespace: str, rabbitmq_url: str, tmp_path: Path
) -> None:
    """Its connections are cut and new ones turned away; then it is back."""
    url = request.getfixturevalue(f"{store}_url")
    with Proxy(rabbitmq_url) as proxy:
        house = OutboxHouse(proxy.url, url, namespace, tmp_path)
        try:
            house.start_relay()
            house.write([("a", 0)])
            house.wait_empty()
            with proxy.away():
                house.write([("a", 1), ("b", 0)])
                assert Deadline.after(60).reached(lambda: "relay_failed" in house.logs()), house.logs()
                house.write([("a", 2)])
                assert all(record.crashes == 0 for record in house.store.outbox.peek(10)), "no message is at fault"
            house.wait_empty()
            received = house.received()
            assert set(received) == {("a", 0), ("a", 1), ("a", 2), ("b", 0)}
            assert_in_order(received)
        finally:
            house.close()
