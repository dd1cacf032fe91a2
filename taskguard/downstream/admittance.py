"""How one call is let in, and what is settled when it ends. The waiting is the caller's, so sync and async share it.

`Guard.enter` is a generator: it yields what takes time (`Do`, `Rest`, `Await`) and is sent what came of it; `by_thread`
and `by_loop` drive it. Nothing is held while it waits but a local place, and a call that is refused, cancelled or
raises gives all of it back.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitedTooLong
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

from taskguard.downstream import timeouts
from taskguard.downstream.answers import Answer as HttpAnswer
from taskguard.downstream.circuit import Verdict
from taskguard.downstream.desk import Carrier, Desk
from taskguard.downstream.spans import Span
from taskguard.downstream.threads import Errand
from taskguard.errors import StoreError
from taskguard.permits import Answer, Ask, Permit, Refusal, Slot

T = TypeVar("T")

booking: ContextVar[bool] = ContextVar("taskguard_booking", default=False)
"""Whether a refusal books a slot: the caller will come back for it."""

booked_for: ContextVar[frozenset[str]] = ContextVar("taskguard_booked_for", default=frozenset())
"""The downstreams that this run comes back for with a booking. The first call to each uses it up."""


@dataclass(slots=True)
class Do:
    """Something that waits for the store. ``undo`` is given what came of it when the caller was cancelled meanwhile."""

    work: Callable[[], Any]
    undo: Callable[[Any], None] | None = None
    in_process: bool = False


class Question:
    """What a call asks the store. `carried` may take it there before it is its turn.

    ``undo``: as for `Do`, given the answer.
    """

    def __init__(self, desk: Desk, ask: Ask, undo: Callable[[Any], None]) -> None:
        self.desk, self.ask, self.undo = desk, ask, undo
        self._answer: Answer | None = None
        self._doubtful = False

    def work(self) -> Answer:
        """The answer, asked for unless it is there."""
        return self._settled(self.desk.admit(self.ask) if self._answer is None else self._answer)

    def carried(self, carry: Carrier) -> None:
        """Have it asked by *carry*, unless it was. Raises what that raises; then it may be repeated."""
        if self._answer is None:
            doubtful, self._doubtful = self._doubtful, True
            answer = self.desk.admit(self.ask, carry=carry)
            self._answer, self._doubtful = answer, doubtful

    def withdraw(self) -> None:
        """Nobody waits for the answer any more."""
        if self._answer is not None:
            self.undo(self._answer)
        elif self._doubtful:
            self.undo(Permit())

    def _settled(self, answer: Answer) -> Answer:
        if self._doubtful and isinstance(answer, Refusal):  # what a lost answer gave is in its own way
            self.undo(Permit())
        self._doubtful = False
        return answer


@dataclass(frozen=True, slots=True)
class Rest:
    """A wait of so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Await:
    """A wait for a place, of at most so many seconds. Answers whether it came."""

    place: Future[None]
    seconds: float


Effect = Do | Question | Rest | Await
Steps = Generator[Effect, Any, T]


def by_thread(steps: Steps[T], effect: Effect | None = None) -> T:
    """Drive *steps* in this thread, from the *effect* that they have come to."""
    try:
        if effect is None:
            effect = next(steps)
        while True:
            effect = _driven(steps, effect)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


def _driven(steps: Steps[T], effect: Effect) -> Effect:
    """What *steps* come to after *effect*. Raises StopIteration at their end."""
    try:
        found = _now(effect)
    except BaseException as exc:  # noqa: BLE001 (it belongs to the steps)
        return steps.throw(exc)
    return steps.send(found)


def _now(effect: Effect) -> Any:
    match effect:
        case Do() | Question():
            return effect.work()
        case Rest():
            time.sleep(effect.seconds)
            return None
        case Await():
            try:
                effect.place.result(effect.seconds)
            except WaitedTooLong:
                return False
            return True


async def by_loop(steps: Steps[T]) -> T:
    """Drive *steps* in the running event loop, which never waits for a store that is elsewhere."""
    try:
        effect = next(steps)
        while True:
            try:
                found = await _soon(effect)
            except BaseException as exc:  # noqa: BLE001 (it belongs to the steps)
                effect = steps.throw(exc)
            else:
                effect = steps.send(found)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


async def _soon(effect: Effect) -> Any:
    match effect:
        case Do():
            return effect.work() if effect.in_process else await aside(effect.work, undo=effect.undo)
        case Question():
            return effect.work() if effect.desk.in_process else await aside(effect.work, undo=effect.undo)
        case Rest():
            await asyncio.sleep(effect.seconds)
            return None
        case Await():
            try:
                await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(effect.place)), effect.seconds)
            except TimeoutError:
                return False
            return True


async def aside(work: Callable[[], T], *, undo: Callable[[T], None] | None = None) -> T:
    """*work* in a thread of the loop's. What it brings to a caller that was cancelled meanwhile is undone, in one."""
    errand, loop = Errand(work, undo), asyncio.get_running_loop()
    future = loop.run_in_executor(None, errand)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if errand.leave() and undo is not None:
            loop.run_in_executor(None, errand.undo)
        raise


@dataclass(slots=True)
class Call:
    """One call as it is asked for."""

    cost: float
    key: str | None = None
    of: Callable[..., Any] | None = None
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[Any, ...] = ()


class Pass:
    """A call that was let in, until `Guard.leave`."""

    __slots__ = (
        "answer",
        "around",
        "began",
        "behind",
        "generation",
        "holder",
        "late",
        "left",
        "lender",
        "local",
        "place",
        "probe",
        "slot",
        "span",
        "told",
        "unspent",
        "verdict",
    )

    def __init__(self, *, cost: float = 0.0, span: Span | None = None) -> None:
        self.span = span
        self.probe = False
        self.generation = 0 if span is None else span.generation
        self.holder = ""
        self.slot: Slot | None = None
        self.local = False
        self.unspent = [cost]
        """The rates' permits, until a call inside uses them."""
        self.place: list[None] = [None]
        """Its place in the bulkhead, while no call inside has it."""
        self.around: Pass | None = None
        """The pass of the block that this call is made in."""
        self.lender: Pass | None = None
        """Whose place this call has: the block's, or that of a call inside it."""
        self.behind: tuple[Future[Any], ...] = ()
        """Threads that go on without the call, and may use its place."""
        self.told = False
        """A call inside has told the circuit what became of it."""
        self.late = False
        """It took longer than its timeout allows, and was not ended by it."""
        self.verdict: Verdict | None = None
        self.answer: HttpAnswer | None = None
        self.left = False
        self.began = time.monotonic()

    @property
    def block(self) -> Pass:
        """The outermost pass, which pays and speaks for the calls inside."""
        return self.around or self

    def lend(self) -> bool:
        """Give the place to a call inside. To one at a time."""
        try:
            self.place.pop()
        except IndexError:
            return False
        return True

    def take_back(self) -> None:
        """That call has ended."""
        self.place.append(None)

    def leave_behind(self, thread: Future[Any]) -> None:
        """The call goes on, or ends, without this thread, which keeps its place until it ends by itself."""
        self.behind = (*self.behind, thread)

    def spend(self, cost: float) -> bool:
        """Use the rates' permits of this pass for a call inside. Once."""
        try:
            paid = self.unspent.pop()
        except IndexError:
            return False
        if cost <= paid:
            return True
        self.unspent.append(paid)
        return False


covering: ContextVar[Mapping[str, Pass]] = ContextVar("taskguard_covering", default=MappingProxyType({}))
"""The blocks of permits that this code runs in, by downstream."""


GRACE = 0.01
"""Seconds a call waits longer than declared: a turn comes late by what those ahead were late for theirs."""


def patience(most: float) -> float:
    """How long a call may wait: *most* seconds with a moment's grace, and never past its budget."""
    if most <= 0:
        return 0.0
    left = timeouts.within(most + GRACE)
    return most if left is None else left


def pause_before_next_try(retry_after: float | None) -> float:
    """Seconds until it is worth asking for a place again: nobody is told when one comes back elsewhere."""
    return min(max(retry_after or 0.0, 0.005), 0.05) * random.uniform(0.5, 1.0)


def undo_permit(
    release: Callable[[Sequence[Slot]], None],
    slot: Slot | None,
    unbook: Callable[[str, float], None] | None = None,
    no_probe: Callable[[Permit], None] | None = None,
) -> Callable[[Any], None]:
    """What gives back a place, a slot so many seconds ahead, or a turn to probe, taken for a caller who is gone."""

    def undo(answer: Any) -> None:
        if isinstance(answer, Permit) and answer.probe and no_probe is not None:
            no_probe(answer)
        try:
            if isinstance(answer, Permit) and slot is not None:
                release([slot])
            elif isinstance(answer, Refusal) and answer.slot_in is not None and unbook is not None:
                unbook(answer.name, answer.slot_in)
        except StoreError:
            return  # the lease ends by itself, and an unused slot delays nobody longer than itself

    return undo


def soonest(waits: Sequence[float]) -> float | None:
    """What a refusal says of these waits: None where none of them ends."""
    least = min(waits, default=math.inf)
    return None if least == math.inf else least
