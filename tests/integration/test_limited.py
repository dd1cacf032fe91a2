"""Tasks under the rules of the store, with real workers: a rule that is changed holds in all of them, at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from celery.result import AsyncResult

from taskguard.ports import RuleStore
from taskguard.rules import Rule
from taskguard.stores import open_rules
from tests.integration.conftest import open_site
from tests.integration.site import Site

PLACES = [("redis", "redis", "prefork"), ("rabbitmq", "postgresql", "prefork"), ("redis", "mariadb", "threads")]


class Office(Site):
    """A site whose workers wait for permits as long as a busy machine may take: else they would run without."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, TASKGUARD_PERMITS_TIMEOUT="10")


@pytest.fixture(params=PLACES, ids="-".join)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Office, str]]:
    """An office, and the pool of its workers."""
    broker, store, pool = request.param
    with ExitStack() as stack:
        office = open_site(stack, broker, store, tmp_path, Office)
        assert isinstance(office, Office)
        yield office, pool


def change(site: Site, rules: RuleStore, limits: str, *, processes: int) -> None:
    """Each tenant may have so many runs, and what is over that waits for its slot. Every process has heard of it."""
    known = len(site.journal.entries("rules_changed"))
    rule = Rule(id="tenants", client="*", task="allotted", limits=limits, over_limit="queue")
    rules.put([rule], who="test", why="")

    def all_know() -> bool:
        return len({entry.pid for entry in site.journal.entries("rules_changed")[known:]}) == processes

    site.wait(all_know, f"{processes} processes that know of {limits}")


def test_a_rule_that_is_made_and_changed_holds_in_running_workers(place: tuple[Office, str]) -> None:
    """Without a restart, in every pool child; the tasks over the limit rest and have spent no attempt."""
    site, pool = place
    site.start_worker(pool=pool)
    site.start_worker(pool=pool)
    with closing(open_rules(site.store_url, namespace=site.namespace)) as rules:
        hold_and_let_go(site, rules, processes=4 if pool == "prefork" else 2)


def hold_and_let_go(site: Site, rules: RuleStore, *, processes: int) -> None:
    """One run an hour, then a thousand a second."""
    change(site, rules, "1/hour burst=1", processes=processes)
    over = [site.send("allotted", "acme") for _ in range(4)]
    site.wait(lambda: len(deferred(site, over)) == 3, "three that wait for their slots")
    (ran,) = [result for result in over if result not in deferred(site, over)]
    site.wait_state(ran, "SUCCESS")
    assert not any(site.started(result) for result in over if result is not ran)
    site.wait_state(site.send("allotted", "bolt"), "SUCCESS")
    change(site, rules, "1000/second burst=1000", processes=processes)
    for result in [site.send("allotted", "corp") for _ in range(4)]:
        site.wait_state(result, "SUCCESS")
    assert not any(site.started(result) for result in over if result is not ran)


def deferred(site: Site, results: list[AsyncResult]) -> list[AsyncResult]:
    """Those that were put off."""
    put_off = {entry.task_id for entry in site.journal.entries("deferred")}
    return [result for result in results if result.id in put_off]
