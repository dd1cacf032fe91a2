"""Relays of the outbox as real processes on real servers: killed at every step, cut off, stopped; side by side."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from random import Random

import pytest

from tests.integration.journal import Deadline
from tests.integration.outboxapp import POINTS
from tests.integration.outboxhouse import OutboxHouse, assert_in_order, house_of
from tests.integration.proxy import Proxy
from tests.integration.servers import PrivateRedis

PAIRS = list(product(("redis", "rabbitmq"), ("postgresql", "mariadb", "sqlite")))
STEPS = [f"{side} {name}" for name in POINTS for side in ("before", "after")]
COMMITTED = {"before hand_over", "after hand_over"}
"""Where a relay dies between two batches: it has nothing in hand, so nothing is published twice."""


@pytest.fixture(params=[pytest.param(pair, id="-".join(pair)) for pair in PAIRS])
def house(request: pytest.FixtureRequest, namespace: str, tmp_path: Path) -> Iterator[OutboxHouse]:
    """Each database with each broker."""
    yield from house_of(request, *request.param, namespace, tmp_path)


def orders(count: int, keys: str = "abc") -> list[tuple[str, int]]:
    """So many orders of each key, and as many without."""
    return [(key, number) for number in range(count) for key in (*keys, "")]


@pytest.mark.parametrize("step", STEPS)
def test_a_relay_that_dies_at_any_step_loses_nothing(step: str, house: OutboxHouse) -> None:
    """Another takes over what it had in hand; of each key the order stands; between batches nothing doubles."""
    sent = orders(10)
    for each in sent:
        house.write([each])
    house.wait_dead(house.start_relay("--batch", "8", dies_at=step))
    before = house.received()
    house.start_relay("--batch", "8")
    house.wait_empty()
    received = house.received()
    assert len(before) < len(sent), "it died in mid-work"
    assert sorted(set(received)) == sorted(set(sent))
    assert_in_order(received)
    if step in COMMITTED:
        assert sorted(received) == sorted(sent), "nothing was in hand"
    assert len(received) <= len(sent) + 8, "no more than one batch came twice"


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
        relay.send_signal(signal.SIGTERM)
        assert relay.wait(timeout=30) == 0, house.logs()


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
            victim.wait()
            victim = house.start_relay("--batch", "4")
    victim.kill()
    house.wait_empty()
    received = house.received()
    assert set(received) == set(sent)
    assert_in_order(received)


def test_a_stopped_relay_finishes_its_batch(house: OutboxHouse) -> None:
    """SIGTERM in mid-work: status 0, nothing twice; what is left is the next one's."""
    for each in orders(60):
        house.write([each])
    relay = house.start_relay("--batch", "3")
    assert Deadline.after(60).reached(lambda: house.store.outbox.status().waiting < 200), house.logs()
    relay.send_signal(signal.SIGTERM)
    assert relay.wait(timeout=30) == 0, house.logs()
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
