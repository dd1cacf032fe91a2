"""What the permit scripts answer: replies read into values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from taskguard.clock import from_us
from taskguard.permits import AdaptiveView, Answer, Ask, CircuitView, Permit, RateView, Refusal
from taskguard.stores.redis.asks import REMEMBERED
from taskguard.stores.redis.layout import decoded, encoded


class Seen:
    """The circuits that were seen last, so that one which has not changed is not read again."""

    def __init__(self) -> None:
        self._views: dict[str, tuple[Sequence[Any], CircuitView]] = {}

    def of(self, name: str, reply: Sequence[Any]) -> CircuitView:
        """The circuit behind the third part of a reply."""
        told, known = reply[3:], self._views.get(name)
        if known is not None and known[0] == told:
            return known[1]
        view = _circuit(name, reply, 3)
        if len(self._views) >= REMEMBERED:
            self._views.clear()
        self._views[name] = told, view
        return view


def answer_of(ask: Ask, reply: Sequence[Any]) -> Answer:
    """The answer of ``admit.lua``, where it is not the usual one."""
    if reply[0] == 0:
        views, circuit = _views(ask, reply, 3)
        return Permit(views, circuit, reply[1] == 1, int(reply[2]))
    by, name, wait, slot_in = reply[1].decode(), decoded(reply[2]), reply[3], reply[4]
    views, circuit = _views(ask if by != "circuit" else Ask(circuit=ask.circuit), reply, 6)
    retry_after = None if wait < 0 else wait / 1e6
    return Refusal(by, name, retry_after, None if slot_in < 0 else slot_in / 1e6, views, circuit, int(reply[5]))


def _views(ask: Ask, reply: Sequence[Any], at: int) -> tuple[tuple[RateView, ...], CircuitView | None]:
    views = []
    for rate in ask.rates:
        limit = float(reply[at + 2]) if rate.adaptive else rate.policy.limit
        views.append(RateView(rate.name, limit, float(reply[at]), reply[at + 1] / 1e6))
        at += 3 if rate.adaptive else 2
    return tuple(views), None if ask.circuit is None else _circuit(ask.circuit.name, reply, at)


def _circuit(name: str, reply: Sequence[Any], at: int) -> CircuitView:
    return CircuitView(name=name) if len(reply) == at else circuit_view(name, *reply[at:])


def circuit_view(name: str, line: bytes, who: bytes, why: bytes) -> CircuitView:
    """A circuit as ``circuit_view`` in ``_breaker.lua`` tells it."""
    state, generation, until, calls, failures, slow, trips, closed_at = line.split()
    return CircuitView(
        name=name,
        state=state.decode(),  # type: ignore[arg-type]
        generation=int(generation),
        until=from_us(float(until)) if until != b"0" else None,
        calls=int(calls),
        failures=int(failures),
        slow=int(slow),
        trips=int(trips),
        closed_at=from_us(float(closed_at)) if closed_at != b"0" else 0.0,
        who=decoded(who),
        why=decoded(why),
    )


def told_view(message: bytes) -> CircuitView:
    """A circuit as it is published."""
    name, line, who, why = json.loads(decoded(message))
    return circuit_view(name, line.encode(), encoded(who), encoded(why))


def adaptive_view(name: str, reply: Sequence[Any]) -> AdaptiveView:
    """An adaptive limit with its changes."""
    changes = []
    for line in reply[1]:
        at, before, after, why = decoded(line).split(" ", 3)
        changes.append((from_us(float(at)), float(before), float(after), why))
    return AdaptiveView(name=name, limit=float(reply[0]), changes=tuple(changes))
