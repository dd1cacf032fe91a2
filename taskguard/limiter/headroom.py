"""Who is near a limit or over it, since when, and what limit would have served them. Pure: from counts to rows.

Demand is what was accepted plus what was refused. A caller that is refused and comes again is counted again, so for
callers that retry in a loop it is an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any, Literal

from taskguard.errors import ConfigurationError
from taskguard.limiter.demand import counter_of
from taskguard.policies.notation import notation
from taskguard.policies.rates import Rate, TokenBucket
from taskguard.rules import Rule, RuleSet
from taskguard.traffic import WINDOW, Counted

State = Literal["over", "near", "ok"]
GAP = 5
"""Quiet windows after which being near begins anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Headroom:
    """One limit of one caller, over the time that was looked at.

    client, endpoint: "" where the limit counts all of them together. share: the demand of the worst window as a share
    of the limit; 1.0 is all of it. since: when it was first near in the stretch that goes on, epoch seconds; None where
    none does. needed: the limit that would have served all that was asked, None where this one did.
    """

    client: str
    endpoint: str
    rule: str
    limit: str
    state: State
    share: float
    accepted: float
    refused: float
    since: float | None
    needed: str | None
    shadow: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def headroom(
    counted: Iterable[Counted], rules: RuleSet, *, near: float = 0.8, now: float | None = None
) -> list[Headroom]:
    """A row for each limit and caller in these windows, the worst first. Rules that are gone have no row.

    now: by the clock of the windows; left out, the last of a row's windows is still going on.
    """
    known = {rule.id: rule for rule in rules.rules}
    groups: dict[tuple[str, str], list[Counted]] = {}
    for each in counted:
        if (rule := known.get(each.rule)) is not None:
            groups.setdefault((rule.id, counter_of(rule, each)), []).append(each)
    rows = [
        _row(known[id], rate, members, near=near, now=now)
        for (id, _), members in groups.items()
        for rate in known[id].limits
    ]
    return sorted(rows, key=lambda row: (-row.share, row.rule, row.client, row.endpoint))


def _row(rule: Rule, rate: Rate, members: list[Counted], *, near: float, now: float | None) -> Headroom:
    windows: dict[float, tuple[float, float]] = {}
    for each in members:
        accepted, refused = windows.get(each.window_at, (0.0, 0.0))
        windows[each.window_at] = (accepted + each.accepted, refused + each.refused)
    shares = _shares(windows, rate)
    accepted, refused = (sum(sums[n] for sums in windows.values()) for n in (0, 1))
    share = max(shares.values(), default=0.0)
    state: State = "over" if refused or share > 1 else "near" if share >= near else "ok"
    clients, endpoints = {each.client for each in members}, {each.endpoint for each in members}
    return Headroom(
        client=clients.pop() if len(clients) == 1 else "",
        endpoint=endpoints.pop() if len(endpoints) == 1 else "",
        rule=rule.id,
        limit=notation(rate),
        state=state,
        share=share,
        accepted=accepted,
        refused=refused,
        since=_since(windows, shares, rate, near, now),
        needed=_needed(windows, rate, share) if state == "over" else None,
        shadow=rule.shadow,
    )


def _shares(windows: dict[float, tuple[float, float]], rate: Rate) -> dict[float, float]:
    """For each window the demand of the period that ends with it, as a share of the limit."""
    if rate.period <= WINDOW:
        return {at: sum(sums) * rate.period / (rate.limit * WINDOW) for at, sums in windows.items()}
    return {
        at: sum(sum(sums) for begun, sums in windows.items() if at - rate.period < begun <= at) / rate.limit
        for at in windows
    }


def _since(
    windows: dict[float, tuple[float, float]], shares: dict[float, float], rate: Rate, near: float, now: float | None
) -> float | None:
    quiet = max(GAP * WINDOW, rate.period)
    began: float | None = None
    last: float | None = None
    for at in sorted(windows):
        if shares[at] < near and not windows[at][1]:
            continue
        if last is None or at - last > quiet:
            began = at
        last = at
    ended = last is not None and now is not None and now // WINDOW * WINDOW - last > quiet
    return None if ended else began


def _needed(windows: dict[float, tuple[float, float]], rate: Rate, share: float) -> str | None:
    """The smallest limit, in two figures, that admits the demand of each window.

    Within a minute nothing is known of when calls came; the limit grows as the demand exceeds what it let through.
    """
    factor = max(1.0, share)
    if rate.period <= WINDOW:
        for accepted, refused in windows.values():
            if refused:
                factor = max(factor, (accepted + refused) / (accepted or rate.limit))
    limit = _round_up(rate.limit * factor)
    if limit <= rate.limit:  # the calls came in a bunch: one more permit is all that can be said
        limit = rate.limit + 1
    try:
        if isinstance(rate, TokenBucket):
            assert rate.burst is not None
            burst = max(rate.burst, _round_up(rate.burst * limit / rate.limit))
            return notation(TokenBucket(limit, rate.period, burst=burst))
        return notation(type(rate)(limit, rate.period))
    except ConfigurationError:  # more than any limit may be
        return None


def _round_up(value: float) -> float:
    step: float = 10.0 ** max(0, floor(log10(value)) - 1) if value > 0 else 1.0
    return ceil(value / step - 1e-9) * step
