"""One call's admission as a pure function: circuit, then all rates, then the slot; everything is taken, or nothing.

A store keeps **cells**: a state by kind and name. It loads `cells_of` an ask, lets `admit` decide, and writes what has
changed, in one step. Memory and SQL run exactly this; Redis runs its Lua translation in one script.

The refusal that is told is the one with the longest wait. Where a refused call books, its slot is the latest that the
limits which refused it can offer. Only lines that this slot belongs to move: one whose own slot would be more than an
interval earlier is left alone, because a tenant whose day is used up must not send everybody's line to tomorrow.
The slot of a bulkhead is an estimate, from how long places are held; so its line paces those who book and refuses
nobody while a place is free.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any, Literal, NamedTuple

from taskguard.clock import span_us
from taskguard.limits import breaker, bulkheads, line, rates
from taskguard.limits.breaker import Circuit
from taskguard.permits import Answer, Ask, CircuitView, Permit, RateAsk, RateView, Refusal, RefusedBy, Slot, SlotAsk

CellKind = Literal["bucket", "fixed", "sliding", "log", "line", "slots", "queue", "circuit", "adaptive", "pause"]
Cell = tuple[CellKind, str]
"""``line`` stands beside the rate of its name, ``queue`` beside the bulkhead of its name."""
State = tuple[Any, ...]
Cells = Mapping[Cell, State | None]


class Change(NamedTuple):
    """What is kept of a cell from now on, and the instant after which it says nothing; None: it never ends."""

    state: State
    until: float | None


Changes = dict[Cell, Change]


class _Refused(NamedTuple):
    """wait: what is told. soonest: when the limit itself would admit; what a booking starts from."""

    by: RefusedBy
    name: str
    wait: float | None
    soonest: float
    line: Cell
    spacing: float


def cells_of(ask: Ask) -> list[Cell]:
    """All that must be at hand to decide, in the order in which it is locked."""
    cells: set[Cell] = {("slots", slot.name) for slot in ask.release}
    for rate in ask.rates:
        cells |= {(rates.terms_of(rate.policy).kind, rate.name), ("line", rate.name)}
        if rate.adaptive:
            cells.add(("adaptive", rate.name))
    if ask.slot is not None:
        cells |= {("slots", ask.slot.name), ("queue", ask.slot.name)}
    if ask.circuit is not None:
        cells.add(("circuit", ask.circuit.name))
    return sorted(cells)


def admit(ask: Ask, cells: Cells, now: float, *, version: int = 0) -> tuple[Answer, Changes]:
    """The answer, and what has changed. Only slots given back, mended states and bookings change with a refusal."""
    kept = release(ask.release, cells, now)
    taken: Changes = {}
    circuit, probe = None, False
    if ask.circuit is not None:
        name = ask.circuit.name
        standing = Circuit(*(cells.get(("circuit", name)) or ()))
        asked = breaker.ask(breaker.terms_of(ask.circuit.policy), standing, now, ask.circuit.holder)
        after = asked.changed or standing
        if asked.changed is not None:
            (kept if asked.wait else taken)["circuit", name] = Change(after, breaker.until(after, now))
        if asked.wait != 0.0:
            view = breaker.view(name, after, now)
            return Refusal("circuit", name, _told(asked.wait), circuit=view, version=version), kept
        circuit, probe = breaker.view(name, after, now), asked.probe
    refused: list[_Refused] = []
    for rate in ask.rates:
        _try_rate(ask, rate, cells, now, kept=kept, taken=taken, refused=refused)
    if ask.slot is not None:
        _try_slot(ask.slot, cells, now, kept=kept, taken=taken, refused=refused)
    if not refused:
        kept.update(taken)
        return Permit(_views(ask, cells, kept, now), circuit, probe, version), kept
    slot = _book(ask, refused, cells, now, kept) if ask.book else None
    worst = max(refused, key=lambda each: float("inf") if each.wait is None else each.wait)
    standing_view = _standing(ask, cells, now)
    views = _views(ask, cells, kept, now)
    told = None if slot is None else _told(slot - now)
    return Refusal(worst.by, worst.name, _told(worst.wait), told, views, standing_view, version), kept


def release(slots: tuple[Slot, ...], cells: Cells, now: float) -> Changes:
    """Places given back."""
    changes: Changes = {}
    for slot in slots:
        cell: Cell = ("slots", slot.name)
        state = bulkheads.release(_state(cell, cells, changes), now, slot.holder)
        if state is not None:
            changes[cell] = Change(state, bulkheads.until(state, now))
    return changes


def _try_rate(
    ask: Ask, rate: RateAsk, cells: Cells, now: float, *, kept: Changes, taken: Changes, refused: list[_Refused]
) -> None:
    terms = _terms(rate, cells)
    cell: Cell = (terms.kind, rate.name)
    beside: Cell = ("line", rate.name)
    verdict = rates.decide(terms, _state(cell, cells, kept, taken), now, rate.cost)
    spacing = rate.cost * terms.interval
    wait = verdict.wait
    stands_until = 0.0 if ask.booked else line.stands_until(_state(beside, cells, kept), now)
    if wait is not None and stands_until:
        wait = max(wait, float(ceil(stands_until + spacing - now)))
    if wait == 0.0:
        assert verdict.state is not None
        taken[cell] = Change(verdict.state, verdict.until)
        return
    if verdict.wait != 0.0 and verdict.state is not None and cell not in taken:
        kept[cell] = Change(verdict.state, verdict.until)
    refused.append(_Refused("rate", rate.name, wait, verdict.wait or 0.0, beside, spacing))


def _try_slot(
    slot: SlotAsk, cells: Cells, now: float, *, kept: Changes, taken: Changes, refused: list[_Refused]
) -> None:
    state = _state(("slots", slot.name), cells, kept)
    wait, after, until = bulkheads.acquire(state, now, holder=slot.holder, limit=slot.limit, lease=span_us(slot.lease))
    if after is not None:
        taken["slots", slot.name] = Change(after, until)
        return
    spacing = bulkheads.spacing(state, slot.limit)
    refused.append(_Refused("slot", slot.name, wait, wait, ("queue", slot.name), spacing))


def _book(ask: Ask, refused: list[_Refused], cells: Cells, now: float, kept: Changes) -> float | None:
    """The slot of this call, and its place in the lines it belongs to. None: some limit will never admit it."""
    if any(each.wait is None for each in refused):
        return None
    found = []
    for each in refused:
        state = _state(each.line, cells, kept)
        found.append(line.book(state, now, wait=each.soonest, spacing=each.spacing, booked=ask.booked))
    latest = max(slot for slot, _ in found)
    for each, (slot, state) in zip(refused, found, strict=True):
        if slot < latest:
            if slot + each.spacing < latest:
                continue
            state = line.moved(_state(each.line, cells, kept), latest, booked=ask.booked)
        kept[each.line] = Change(state, line.until(state))
    return latest


def _views(ask: Ask, cells: Cells, changes: Changes, now: float) -> tuple[RateView, ...]:
    views = []
    for rate in ask.rates:
        terms = _terms(rate, cells)
        left = rates.room(terms, _state((terms.kind, rate.name), cells, changes), now)
        views.append(RateView(rate.name, terms.limit, left.remaining, left.reset / 1e6))
    return tuple(views)


def _standing(ask: Ask, cells: Cells, now: float) -> CircuitView | None:
    if ask.circuit is None:
        return None
    name = ask.circuit.name
    return breaker.view(name, Circuit(*(cells.get(("circuit", name)) or ())), now)


def _terms(rate: RateAsk, cells: Cells) -> rates.Terms:
    terms = rates.terms_of(rate.policy)
    adapted = cells.get(("adaptive", rate.name)) if rate.adaptive else None
    return terms if adapted is None else terms.adapted(adapted[0])


def _state(cell: Cell, cells: Cells, *changes: Changes) -> State | None:
    """The cell as it is after these changes, the last first."""
    for each in reversed(changes):
        if cell in each:
            return each[cell].state
    return cells.get(cell)


def _told(wait: float | None) -> float | None:
    """Microseconds as seconds, never less than the wait."""
    return None if wait is None else ceil(wait) / 1e6
