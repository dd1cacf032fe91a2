"""Answers kept in this process: computed once for all who ask at the same time, and bounded in number.

A key is the exact form of the call, types and all, with the function's full name before it, so that no two calls share
one by accident: ``f("a", "b")`` and ``f("a,b")`` differ, and so do ``1``, ``"1"``, ``[1]`` and ``(1,)``. When an answer
is over its time, one caller computes the next; the others are given the old one where ``stale`` allows, else they wait
for the new. A computation that fails is not kept: each who waited has its error, and the next one tries again.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from hashlib import sha256
from typing import Any, TypeVar, cast

from taskguard.clock import Duration, seconds
from taskguard.downstream.limitkeys import key_of
from taskguard.downstream.tending import begins_anew
from taskguard.errors import ConfigurationError
from taskguard.fingerprint import canonical
from taskguard.policies.calls import Key

_Landing = tuple[Any, BaseException | None] | None
"""The value, or the error; None: compute it yourself."""

F = TypeVar("F", bound=Callable[..., Any])

MOST = 1024
"""Answers that are kept unless told otherwise; the one that was not asked for longest goes first."""


def call_key(
    fn: Callable[..., Any] | None, args: Sequence[Any], kwargs: Mapping[str, Any], key: Key | None = None
) -> str:
    """The key of this call: what *key* makes of it, else all its arguments. No two functions share one."""
    name = f"{getattr(fn, '__module__', '')}.{getattr(fn, '__qualname__', type(fn).__name__)}"
    if key is not None:
        return f"{name}\n{key_of(key, fn, args, kwargs, what=name)}"
    try:
        form = f"{_exact(tuple(args))}\n{_exact(dict(kwargs))}"
    except ConfigurationError as exc:
        raise ConfigurationError(
            f"{name}: its arguments make no key ({exc}); give key= a template or a function"
        ) from exc
    return f"{name}\n{form if len(form) <= 200 else sha256(form.encode()).hexdigest()}"


def _exact(value: Any) -> str:
    """The value and its type, as text that no other value has."""
    kind = type(value)
    if value is None or kind in (str, int, float, bool, bytes):
        return f"{kind.__name__} {value!r}"
    if kind in (list, tuple):
        return f"{kind.__name__}[{','.join(map(_exact, value))}]"
    if kind in (set, frozenset):
        return f"{kind.__name__}[{','.join(sorted(map(_exact, value)))}]"
    if kind is dict:
        return f"dict[{','.join(sorted(f'{_exact(name)}={_exact(each)}' for name, each in value.items()))}]"
    return f"{kind.__module__}.{kind.__qualname__} {canonical(value).decode('ascii')}"


class LastAnswers:
    """The last good answers, the *most* of them that were asked for last. A `policies.calls.Cache`."""

    def __init__(self, *, most: int = MOST, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._kept: OrderedDict[str, tuple[float, Any]] = OrderedDict()
        self.after_fork()
        begins_anew(self)

    def after_fork(self) -> None:
        """A child goes on with what its parent knew."""
        self._lock = threading.Lock()

    def get(self, key: str) -> tuple[float, Any] | None:
        """The value and its age in seconds, as (age, value)."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            self._kept.move_to_end(key)
        return max(0.0, self._clock() - found[0]), found[1]

    def put(self, key: str, value: Any) -> None:
        """Keep it, and let the least asked for go."""
        with self._lock:
            self._kept[key] = (self._clock(), value)
            self._kept.move_to_end(key)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)

    def forget(self, key: str | None = None) -> None:
        """Drop one answer; None: all."""
        with self._lock:
            if key is None:
                self._kept.clear()
            else:
                self._kept.pop(key, None)

    def __len__(self) -> int:
        return len(self._kept)


class _Flights:
    """Computations under way, by key."""

    def __init__(self) -> None:
        self.after_fork()
        begins_anew(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._flying: dict[str, Future[_Landing]] = {}

    def join(self, key: str) -> tuple[Future[_Landing], bool]:
        """The computation of *key*, and whether it is the caller's to do."""
        with self._lock:
            flight = self._flying.get(key)
            if flight is not None:
                return flight, False
            flight = self._flying[key] = Future()
            return flight, True

    def land(self, key: str, flight: Future[_Landing], landing: _Landing) -> None:
        """It is done, or failed; what is kept of it was kept before."""
        with self._lock:
            if self._flying.get(key) is flight:
                del self._flying[key]
        flight.set_result(landing)


def cached(ttl: Duration, *, key: Key | None = None, stale: Duration = 0.0, most: int = MOST) -> Callable[[F], F]:
    """Keep what the function gives for *ttl* seconds, in this process. For functions and async functions.

    key: a template or a function over the arguments; None: all of them. stale: seconds past *ttl* for which the old
    answer is given to those who ask while one of them computes the next. most: answers that are kept. The decorated
    function has ``forget()``. Each caller is given the same object: do not change it.
    """
    fresh = seconds(ttl, what="cached.ttl")
    usable = fresh + seconds(stale, what="cached.stale")
    if fresh == 0:
        raise ConfigurationError("cached.ttl: 0 keeps nothing; give more than zero seconds, or leave the cache out")
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ConfigurationError(f"cached.most: {most!r} must be a whole number, 1 or more")

    def decorate(fn: F) -> F:
        if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
            raise ConfigurationError(f"cached: {fn.__qualname__} is a generator, which can be read once; return a list")
        answers, flights = LastAnswers(most=most), _Flights()

        def known(name: str) -> tuple[bool, Any, bool]:
            """Whether there is an answer, the answer, and whether it is fresh."""
            found = answers.get(name)
            if found is None or found[0] >= usable:
                return False, None, False
            return True, found[1], found[0] < fresh

        def landed(name: str, flight: Future[_Landing], value: Any, *, new: bool) -> Any:
            if new:
                answers.put(name, value)
            flights.land(name, flight, (value, None))
            return value

        def crashed(name: str, flight: Future[_Landing], exc: BaseException) -> None:
            # What ends the caller alone (its exit, its cancelled task) is not the others': one of them computes it.
            flights.land(name, flight, (None, exc) if isinstance(exc, Exception) else None)

        @functools.wraps(fn)
        def of_thread(*args: Any, **kwargs: Any) -> Any:
            name = call_key(fn, args, kwargs, key)
            while True:
                there, value, is_fresh = known(name)
                if is_fresh:
                    return value
                flight, mine = flights.join(name)
                if mine:
                    there, value, is_fresh = known(name)  # it may have landed just before
                    try:
                        value = value if is_fresh else fn(*args, **kwargs)
                    except BaseException as exc:
                        crashed(name, flight, exc)
                        raise
                    return landed(name, flight, value, new=not is_fresh)
                if there:
                    return value
                landing = flight.result()
                if landing is not None:
                    return _value_of(landing)

        @functools.wraps(fn)
        async def of_loop(*args: Any, **kwargs: Any) -> Any:
            name = call_key(fn, args, kwargs, key)
            while True:
                there, value, is_fresh = known(name)
                if is_fresh:
                    return value
                flight, mine = flights.join(name)
                if mine:
                    there, value, is_fresh = known(name)
                    try:
                        value = value if is_fresh else await fn(*args, **kwargs)
                    except BaseException as exc:
                        crashed(name, flight, exc)
                        raise
                    return landed(name, flight, value, new=not is_fresh)
                if there:
                    return value
                landing = await asyncio.shield(asyncio.wrap_future(flight))
                if landing is not None:
                    return _value_of(landing)

        decorated: Any = of_loop if inspect.iscoroutinefunction(fn) else of_thread
        decorated.forget = answers.forget
        return cast(F, decorated)

    return decorate


def _value_of(landing: tuple[Any, BaseException | None]) -> Any:
    value, error = landing
    if error is None:
        return value
    try:
        own = copy.copy(error)  # one instance raised by many threads would gather the tracebacks of all
    except Exception:  # noqa: BLE001 (an exception that cannot be made again is better shared than lost)
        own = error
    raise own from error.__cause__
