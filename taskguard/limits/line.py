"""The line beside a limit, as pure functions: each who books has a slot of its own, one interval behind the last.

Its state is ``(plan, late, returned)``: the last slot booked, the last one given to somebody who came with a booking
and was refused, and slots given back. Units are those of `limits`. The line never decides whether a booked call goes:
the limit does, so a booking that is forged, late or never used cannot make it admit more.
"""

from __future__ import annotations

from typing import Any

State = tuple[Any, ...]

RETURNED = 64
"""Slots given back that are remembered; one more is forgotten, and its interval stays empty."""


def stands_until(state: State | None, now: float) -> float:
    """The last slot booked, where it is still to come; else 0.0."""
    return state[0] if state is not None and state[0] > now else 0.0


def book(state: State | None, now: float, *, wait: float, spacing: float, booked: bool) -> tuple[float, State]:
    """A slot no sooner than *wait*, and *spacing* behind the one before it.

    Who had a booking (*booked*) stands among those who came late, not at the end of the line.
    """
    plan, late, returned = state or (0.0, 0.0, ())
    returned = tuple(slot for slot in returned if slot > now)
    soonest = now + wait
    if booked:
        slot = max(soonest, late + spacing)
        return slot, (plan, slot, returned)
    for index, slot in enumerate(returned):
        if slot >= soonest:
            return slot, (plan, late, returned[:index] + returned[index + 1 :])
    slot = max(soonest, plan + spacing)
    return slot, (slot, late, returned)


def moved(state: State | None, slot: float, *, booked: bool) -> State:
    """The line after a slot that another limit has found."""
    plan, late, returned = state or (0.0, 0.0, ())
    return (plan, max(late, slot), tuple(returned)) if booked else (max(plan, slot), late, tuple(returned))


def unbook(state: State | None, now: float, slot: float) -> State | None:
    """The line with this slot given back; None: it is over, or was never booked here."""
    if state is None:
        return None
    plan, late, returned = state
    slot = min(slot, plan)  # the holder's clock may be a little fast
    returned = tuple(each for each in returned if each > now)
    if slot <= now or slot in returned or len(returned) >= RETURNED:
        return None
    return plan, late, tuple(sorted((*returned, slot)))


def until(state: State) -> float:
    """When the line says nothing any more."""
    return max(float(state[0]), float(state[1]))
