"""A permit as a block: ``with bank.permit():`` or ``async with bank.permit():``."""

from __future__ import annotations

import asyncio
import time
from contextvars import Token
from types import TracebackType
from typing import Any, Self

from taskguard.clock import wall_clock
from taskguard.downstream import timeouts
from taskguard.downstream.admittance import Call, Pass, Question, Steps, aside, by_loop, by_thread, covering
from taskguard.downstream.answers import Answer
from taskguard.downstream.guarding import Guard
from taskguard.errors import ConfigurationError


class PermitBlock:
    """What `Downstream.permit` gives, to be entered once. Entering raises Refused, or DownstreamTimeout.

    The block is a success unless it is left by an exception that the circuit counts, or told otherwise by `answered`
    or `failed`. With *total*, it runs under a budget of so many seconds, and has failed where it took longer.
    """

    __slots__ = ("_begun", "_call", "_covers", "_guard", "_passed", "_timed", "_token", "_total")

    def __init__(self, guard: Guard, call: Call, *, covers: bool = True, total: float | None = None) -> None:
        self._guard, self._call, self._covers, self._total = guard, call, covers, total
        self._passed: Pass | None = None
        self._begun: tuple[Steps[Pass], Question] | None = None
        self._token: Token[Any] | None = None
        self._timed: tuple[Token[float | None], float | None] | None = None

    def begin(self) -> Question | None:
        """Take the call to the question that it begins with, and return that; entering the block goes on from there.

        None, and nothing is done, where something of this process comes first. Raises what a limit's key raises.
        """
        if self._begun is None and self._guard.asks_first(self._call.cost):
            steps = self._guard.enter(self._call)
            question = next(steps)
            assert isinstance(question, Question)
            self._begun = steps, question
        return None if self._begun is None else self._begun[1]

    def abandon(self) -> None:
        """A block that was begun is not entered: give back what its question brought."""
        if self._begun is not None:
            (steps, question), self._begun = self._begun, None
            question.withdraw()
            steps.close()

    def answered(self, answer: Answer) -> None:
        """The downstream answered so: its status decides what the circuit and the adaptive limits count."""
        passed = self._entered()
        passed.answer = answer
        passed.verdict = "failure" if answer.failed else "success"

    def failed(self) -> None:
        """Whatever the block ends with, the call failed."""
        self._entered().verdict = "failure"

    @property
    def passed(self) -> Pass:
        """What was let in."""
        return self._entered()

    def _entered(self) -> Pass:
        if self._passed is None:
            raise ConfigurationError(
                f"{self._guard.name}: this permit was not entered; use it as 'with bank.permit():'"
            )
        return self._passed

    def _once(self) -> None:
        if self._passed is not None:
            raise ConfigurationError(f"{self._guard.name}: this permit was used already; ask permit() for another one")

    def _began(self, passed: Pass) -> None:
        self._passed = passed
        if self._covers:
            self._token = covering.set({**covering.get(), self._guard.name: passed})
        allowed = None if self._total is None else timeouts.within(self._total)
        if allowed is not None:
            until = wall_clock() + allowed
            passed.began = time.monotonic()
            self._timed = timeouts.deadline_at.set(until), until

    def _end(self) -> Pass:
        passed = self._entered()
        if self._timed is not None:
            (timed, until), self._timed = self._timed, None
            try:
                timeouts.deadline_at.reset(timed)
            except ValueError:  # left in another context
                if timeouts.deadline_at.get() == until:
                    timeouts.deadline_at.set(None if timed.old_value is Token.MISSING else timed.old_value)
            assert self._total is not None
            passed.late = time.monotonic() - passed.began > self._total
            if passed.late:
                self._guard.tallies.timeouts.add()
        if self._token is not None:
            token, self._token = self._token, None
            try:
                covering.reset(token)
            except ValueError:  # left in another context than it was entered in, as an async generator's end may be
                covering.set({name: each for name, each in covering.get().items() if each is not passed})
        return passed

    def __enter__(self) -> Self:
        self._once()
        call = self._call
        if self._begun is not None:
            begun, self._begun = self._begun, None
            self._began(by_thread(*begun))
            return self
        passed = self._guard.at_once(call.cost) if call.key is None and not call.also else None
        self._began(by_thread(self._guard.enter(call)) if passed is None else passed)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        tell = self._guard.leave(self._end(), exc)
        if tell is not None:
            tell()

    async def __aenter__(self) -> Self:
        self._once()
        self._began(await by_loop(self._guard.enter(self._call)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        tell = self._guard.leave(self._end(), exc)
        if tell is None:
            return
        desk = self._guard.desk()
        if desk.in_process:
            tell()
        elif isinstance(exc, (asyncio.CancelledError, GeneratorExit)):
            desk.soon(tell)  # who is cancelled waits for nothing more
        else:
            await aside(tell)
