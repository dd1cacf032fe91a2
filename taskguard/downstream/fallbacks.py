"""What is given instead of an answer. Each link of the chain is tried in order; one that cannot answer hands on.

When no link answers, the original error is raised, with what each link said as notes: the reason for the outage must
not be hidden by the trouble of the stand-in.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from taskguard.clock import seconds
from taskguard.downstream.caching import LastAnswers, call_key
from taskguard.downstream.tallies import Tally
from taskguard.errors import ConfigurationError, DownstreamTimeout, Refused
from taskguard.events import Event, Observer
from taskguard.policies.calls import (
    Alternative,
    Cache,
    Default,
    Degraded,
    Fallback,
    FallbackEvent,
    FallbackPart,
    QueueForLater,
    Stale,
)
from taskguard.policies.circuit import CircuitBreaker

logger = logging.getLogger(__name__)


class NoAnswer(Exception):
    """This link of the chain has none."""


class FallbackChain:
    """The fallback of one downstream."""

    def __init__(
        self, name: str, policy: Fallback, breaker: CircuitBreaker | None, *, notify: Observer, tally: Tally
    ) -> None:
        self.name, self.policy = name, policy
        expected = () if breaker is None else breaker.expected
        self.on: tuple[type[BaseException], ...] = policy.on or (Refused, DownstreamTimeout, *expected)
        self._notify, self._tally = notify, tally
        self._stale: list[tuple[Stale, Cache]] = []
        self._caches: dict[int, Cache] = {}
        for part in policy.parts:
            if isinstance(part, Stale):
                cache = LastAnswers() if part.cache is None else part.cache
                self._stale.append((part, cache))
                self._caches[id(part)] = cache

    def answers(self, error: BaseException) -> bool:
        """Whether *error* leads here. A mistake in the code (ConfigurationError) never does: it is to be seen."""
        return isinstance(error, self.on) and not isinstance(error, ConfigurationError)

    def remember(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], value: Any) -> None:
        """A good answer, for whoever needs it later. A call that went well does not fail for want of a key."""
        for part, cache in self._stale:
            try:
                cache.put(call_key(fn, args, kwargs, part.key), value)
            except Exception:
                logger.exception("downstream %s: this answer cannot be kept for Stale", self.name)

    def answer(
        self, error: BaseException, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """What is given instead; raises *error* where no link has anything."""
        for part in self._parts(error):
            try:
                value = self._of(part, error, fn, args, kwargs)
                if inspect.isawaitable(value):
                    _close(value)
                    raise ConfigurationError(f"{self.name}: {part!r} is async; use acall, or give a plain function")
            except Exception as exc:  # noqa: BLE001 (the next link is asked)
                self._hand_on(error, part, exc)
                continue
            self._answered(part, error)
            return value
        raise error

    async def aanswer(
        self, error: BaseException, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """The same for async code; functions of the chain may be async too."""
        for part in self._parts(error):
            try:
                value = self._of(part, error, fn, args, kwargs)
                if inspect.isawaitable(value):
                    value = await value
            except Exception as exc:  # noqa: BLE001 (the next link is asked)
                self._hand_on(error, part, exc)
                continue
            self._answered(part, error)
            return value
        raise error

    def _parts(self, error: BaseException) -> Iterator[FallbackPart]:
        return iter(self.policy.parts) if self.answers(error) else iter(())

    def _of(
        self,
        part: FallbackPart,
        error: BaseException,
        fn: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        match part:
            case Stale():
                found = self._caches[id(part)].get(call_key(fn, args, kwargs, part.key))
                if found is None:
                    raise NoAnswer("no earlier answer is kept")
                age, value = found
                if age > seconds(part.max_age):
                    raise NoAnswer(f"the last answer is {age:.3g} s old, over max_age {seconds(part.max_age):g} s")
                return (value, age) if part.with_age else value
            case Default():
                return part.value
            case Alternative():
                return part.fn(*args, **kwargs)
            case Degraded():
                return part.fn(error, *args, **kwargs)
            case QueueForLater():
                return self._queued(part, args, kwargs)

    @staticmethod
    def _queued(part: QueueForLater, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        work = part.work
        publish = getattr(work, "apply_async", None)
        if publish is None:
            queued = work(*args, **kwargs)
            if inspect.isawaitable(queued):
                return _then(queued, part.answer)
        else:
            publish(tuple(args), dict(kwargs))
        return part.answer

    @staticmethod
    def _hand_on(error: BaseException, part: FallbackPart, exc: Exception) -> None:
        if exc is not error:
            error.add_note(f"fallback {part.kind}: {exc if isinstance(exc, NoAnswer) else repr(exc)}")

    def _answered(self, part: FallbackPart, error: BaseException) -> None:
        self._tally.add()
        why = f"{part.kind} instead of {type(error).__name__}: {error}"
        self._notify(Event(name="fallback", key=self.name, detail=why[:300]))
        if self.policy.on_fallback is not None:
            try:
                self.policy.on_fallback(FallbackEvent(downstream=self.name, kind=part.kind, error=error))
            except Exception:
                logger.exception("on_fallback of downstream %s failed", self.name)


async def _then(queued: Awaitable[Any], answer: Any) -> Any:
    await queued
    return answer


def _close(value: Any) -> None:
    close = getattr(value, "close", None)
    if close is not None:
        close()
