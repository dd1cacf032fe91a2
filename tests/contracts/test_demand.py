"""The contract of a `DemandStore`, over every backend."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from taskguard import traffic
from taskguard.ports import DemandStore
from taskguard.stores import open_demand
from taskguard.traffic import KEPT, OTHER, WINDOW, Asked, Counted
from tests.clocks import ManualClock


@pytest.fixture
def demand(store_url: str, namespace: str, clock: ManualClock) -> Iterator[DemandStore]:
    """An empty store of demand that goes by the manual clock."""
    store = open_demand(store_url, namespace=namespace, clock=clock)
    yield store
    store.close()


def asked(client: str = "acme", accepted: float = 1, refused: float = 0, *, rule: str = "each") -> Asked:
    """So much was asked."""
    return Asked(client=client, endpoint="POST /orders", rule=rule, accepted=accepted, refused=refused)


def sums(found: list[Counted]) -> list[tuple[float, str, float, float]]:
    """What is looked at."""
    return [(each.window_at, each.client, each.accepted, each.refused) for each in found]


def window(clock: ManualClock) -> float:
    """Where the window that is now began."""
    return clock() - clock() % WINDOW


def test_counts_of_one_window_add_up(demand: DemandStore, clock: ManualClock) -> None:
    """From any number of processes; fractions too."""
    assert sums(demand.add([asked(accepted=2.5)])) == [(window(clock), "acme", 2.5, 0)]
    assert sums(demand.add([asked(accepted=1, refused=4)])) == [(window(clock), "acme", 3.5, 4)]
    assert sums(demand.read(since=clock())) == [(window(clock), "acme", 3.5, 4)]


def test_client_endpoint_and_rule_are_told_apart(demand: DemandStore, clock: ManualClock) -> None:
    """Also where their letters would be the same in a row."""
    names = {("a", "b", "c"), ("ab", "", "c"), ("a", "bc", "")}
    assert len(demand.add([Asked(client=c, endpoint=e, rule=r, accepted=1) for c, e, r in names])) == 3
    found = {(each.client, each.endpoint, each.rule): each.accepted for each in demand.read(since=clock())}
    assert found == dict.fromkeys(names, 1)


def test_any_text_is_kept_as_it_is(demand: DemandStore, clock: ManualClock) -> None:
    """What clients call themselves is theirs."""
    odd = "\"'\\ {}\u2028 \U0001f600 é" + "x" * 200
    assert demand.add([asked(odd)])[0].client == odd
    assert demand.read(since=clock())[0].client == odd


def test_windows_follow_each_other(demand: DemandStore, clock: ManualClock) -> None:
    """Oldest first, from the one that ends after the instant asked for."""
    first = window(clock)
    for n in range(3):
        demand.add([asked(accepted=n + 1)])
        clock.advance(WINDOW)
    expected = [(first + n * WINDOW, "acme", n + 1, 0) for n in range(3)]
    assert sums(demand.read(since=first)) == expected
    assert sums(demand.read(since=first + WINDOW)) == expected[1:]
    assert sums(demand.read(since=first + WINDOW - 1)) == expected
    assert sums(demand.read(since=0)) == expected


def test_windows_are_forgotten_in_the_end(demand: DemandStore, clock: ManualClock) -> None:
    """Nothing grows without bound."""
    demand.add([asked()])
    clock.advance(KEPT + 2 * WINDOW)
    demand.add([asked(accepted=7)])
    assert sums(demand.read(since=0)) == [(window(clock), "acme", 7, 0)]


def test_a_row_twice_in_one_batch_is_one_sum(demand: DemandStore, clock: ManualClock) -> None:
    """Whoever sends it."""
    assert sums(demand.add([asked(accepted=1), asked(accepted=2)])) == [(window(clock), "acme", 3, 0)]


def test_nothing_asked_is_nothing_counted(demand: DemandStore) -> None:
    """No empty window."""
    assert demand.add([]) == []
    assert demand.read(since=0) == []


def test_a_flood_of_clients_is_counted_as_other(
    demand: DemandStore, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window has a bound, and those who were there first keep their rows."""
    for module in ("memory", "redis", "sql"):
        monkeypatch.setattr(f"taskguard.stores.{module}.demand.MOST", 5)
    assert traffic.MOST > 5
    demand.add([asked("first")])
    demand.add([asked(f"c{n}", refused=1) for n in range(20)])
    demand.add([asked("first"), asked("late", 3)])
    found = {each.client: (each.accepted, each.refused) for each in demand.read(since=clock())}
    assert found["first"] == (2, 0)
    assert found[OTHER] == (16 + 3, 16)
    assert len(found) == 6
    assert "late" not in found
    assert demand.add([asked("later")]) == []


def test_counts_made_at_once_are_all_counted(store_url: str, namespace: str, clock: ManualClock) -> None:
    """Four writers, the same rows in other orders."""
    failures: list[BaseException] = []

    def count(number: int) -> None:
        store = open_demand(store_url, namespace=namespace, clock=clock) if store_url != "memory://" else shared
        try:
            for _ in range(10):
                store.add([asked(f"c{(number + n) % 4}") for n in range(4)])
        except BaseException as exc:
            failures.append(exc)
        finally:
            store.close()

    shared = open_demand(store_url, namespace=namespace, clock=clock)
    threads = [threading.Thread(target=count, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert {each.client: each.accepted for each in shared.read(since=clock())} == {f"c{n}": 40 for n in range(4)}
    shared.close()
