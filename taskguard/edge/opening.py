"""A limiter from a store's URL: rules, permits and demand beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from taskguard.clock import Duration, seconds
from taskguard.events import Observer
from taskguard.limiter.demand import Demand
from taskguard.limiter.limiter import Limiter, OnStoreDown
from taskguard.limiter.rulebook import FixedRules, RuleBook
from taskguard.policies.rates import Rate
from taskguard.rules import Rule
from taskguard.stores import open_demand, open_permits, open_rules

SLOW = 1.0
"""Seconds that what nobody waits for may take: refreshing rules, adding demand."""


def open_limiter(
    store: str,
    *,
    namespace: str = "default",
    limits: str | Rate | Sequence[str | Rate] | None = None,
    rules: Sequence[Rule] | None = None,
    demand: bool = True,
    near: float = 0.8,
    on_store_down: OnStoreDown = "allow",
    timeout: Duration = 0.1,
    notify: Observer | None = None,
) -> Limiter:
    """A limiter on the store at this URL. Nothing is connected yet.

    By the store's own rules (``taskguard limits set``, live), unless *limits* (for each client) or *rules* are given.
    demand: count what is asked, for ``taskguard limits report`` and the warning at the share *near* of a limit.
    on_store_down, timeout: what becomes of a call that the store does not answer within so many seconds.
    notify: is told events: ``limit_near``, ``rate_limited``, ``would_refuse``, ``rules_changed``.
    """
    bound = seconds(timeout, what="open_limiter.timeout")
    given: Any
    if limits is not None:
        given = FixedRules(Rule(id="default", client="*", limits=limits), *(rules or ()))  # type: ignore[arg-type]
    elif rules is not None:
        given = FixedRules(*rules)
    else:
        given = RuleBook(open_rules(store, namespace=namespace, timeout=SLOW), notify=notify)
    counted = None
    if demand:
        counts = open_demand(store, namespace=namespace, timeout=SLOW)
        counted = Demand(counts, rules=given.rules, near=near, notify=notify)
    permits = open_permits(store, namespace=namespace, timeout=bound)
    return Limiter(given, permits, demand=counted, notify=notify, on_store_down=on_store_down, timeout=bound)
