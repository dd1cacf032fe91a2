"""Tasks under the rules of the store, with real workers: a rule that is changed holds in all of them, at once."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from celery.result import AsyncResult

from taskguard.ports import RuleStore
from taskguard.rules import Rule
from taskguard.stores import open_rules
from tests.integration.site import Site

PROMISED = 1.0
"""Seconds from the change of a rule until it holds in every worker."""


@pytest.fixture
def rules(no_workers: Site) -> Iterator[RuleStore]:
    """The rules of the site's store, of which none is there."""
    store = open_rules(no_workers.store_url, namespace=no_workers.namespace)
    yield store
    store.close()


def put(rules: RuleStore, limits: str) -> None:
    """Each tenant may have so many runs, and what is over that waits for its slot."""
    rule = Rule(id="tenants", client="*", task="rationed", limits=limits, over_limit="queue")
    rules.put([rule], who="test", why="")


def test_a_rule_that_is_made_and_changed_holds_in_running_workers(no_workers: Site, rules: RuleStore) -> None:
    """Without a restart, in every pool child; the tasks over the limit rest and have spent no attempt."""
    site = no_workers
    site.start_worker()
    site.start_worker()
    free = [site.send("rationed", "acme") for _ in range(4)]  # every child has read that there is no rule
    for result in free:
        site.wait_state(result, "SUCCESS")
    put(rules, "1/hour burst=1")
    time.sleep(PROMISED)  # what is promised is this wait
    over = [site.send("rationed", "acme") for _ in range(4)]
    site.wait(lambda: len(deferred(site, over)) == 3, "three that wait for their slots")
    (ran,) = [result for result in over if result not in deferred(site, over)]
    site.wait_state(ran, "SUCCESS")
    assert not any(site.started(result) for result in over if result is not ran)
    site.wait_state(site.send("rationed", "bolt"), "SUCCESS")
    put(rules, "1000/second burst=1000")
    time.sleep(PROMISED)
    for result in [site.send("rationed", "corp") for _ in range(4)]:
        site.wait_state(result, "SUCCESS")
    assert not any(site.started(result) for result in over if result is not ran)


def deferred(site: Site, results: list[AsyncResult]) -> list[AsyncResult]:
    """Those that were put off."""
    put_off = {entry.task_id for entry in site.journal.entries("deferred")}
    return [result for result in results if result.id in put_off]
