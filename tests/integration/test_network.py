"""The network between a worker and its servers fails at random instants, and the promises hold."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from celery.result import AsyncResult

from tests import services
from tests.integration.conftest import open_site, pairs
from tests.integration.proxy import Proxy
from tests.integration.site import Site
from tests.proof.draw import seed

SEED = int(os.environ.get("NETWORK_SEED", "0")) or seed()
TASKS = 120
FAULTS = 8
RECOVERY = 90.0
"""Seconds after the network is back by which everything has ended."""
MOST_STARTS = 5
"""Of one task: a run whose lease ended while the store was out of reach is run again."""


class Wires:
    """Three proxies: between a site's workers and its broker, its message store, and its result backend."""

    def __init__(self, stack: ExitStack, site: Site) -> None:
        self.site = site
        self.broker = stack.enter_context(Proxy(site.broker))
        self.store = stack.enter_context(Proxy(site.store_url))
        self.backend = stack.enter_context(Proxy(services.require("redis")))
        self.all = (self.broker, self.store, self.backend)

    def start_worker(self) -> None:
        """Start a worker that reaches nothing but its journal directly."""
        self.site.start_worker(
            TEST_BROKER=self.broker.url, TASKGUARD_STORE=self.store.url, TEST_BACKEND=self.backend.url
        )

    def fail(self, rng: random.Random) -> str:
        """One fault of one wire, or of all at once. Returns what it was; the network is whole afterwards."""
        chosen = rng.choice([(wire,) for wire in self.all] + [self.all])
        how = rng.choice(["cut", "away", "swallowing", "stalled"])
        seconds = rng.uniform(0.1, 1.2)
        with ExitStack() as stack:
            for wire in chosen:
                if how == "cut":
                    wire.cut()
                else:
                    stack.enter_context(getattr(wire, how)())
            time.sleep(seconds if how != "cut" else 0.0)  # the fault itself, not a wait for what it does
        return f"{how} {seconds:.2f} s of {len(chosen)}"


@pytest.fixture(params=pairs(("redis", "redis"), ("rabbitmq", "postgresql")))
def wires(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Wires]:
    """A site whose workers reach their servers by way of proxies."""
    with ExitStack() as stack:
        site = open_site(stack, *request.param, tmp_path)
        yield Wires(stack, site)


def assert_each_key_completed_once(site: Site, results: list[AsyncResult]) -> None:
    """Nothing lost, nothing twice, nothing without bound, and nothing left under way."""
    site.wait(lambda: all(result.state == "SUCCESS" for result in results), "the end of every task", timeout=RECOVERY)
    site.wait_settled()
    starts = {result.id: len(site.started(result)) for result in results}
    completions = [len(site.told("completed", result)) for result in results]
    print(f"{sum(starts.values())} starts of {len(results)} tasks, at most {max(starts.values())} of one")
    assert completions == [1] * len(results)
    assert max(starts.values()) <= MOST_STARTS
    assert not any(site.letters(result.id) for result in results)


def test_a_network_that_fails_at_random_loses_and_repeats_nothing(wires: Wires) -> None:
    """Cuts, refusals, black holes and stalls of any wire while tasks with keys arrive and run."""
    print(f"NETWORK_SEED={SEED}")
    site, rng = wires.site, random.Random(SEED)
    wires.start_worker()
    results: list[AsyncResult] = []
    for number in range(TASKS):
        results.append(site.send("work", number, idempotency_key=f"key-{number}"))
        if number % (TASKS // FAULTS) == TASKS // FAULTS - 1:
            print(wires.fail(rng))
    struck = [wire.connections for wire in wires.all]
    assert_each_key_completed_once(site, results)
    assert all(struck), "the worker did reach its servers by way of the proxies"
