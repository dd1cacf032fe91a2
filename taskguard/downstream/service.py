"""One service that is called, and what guards the calls to it: ``bank = Downstream("bank", rate=..., circuit=...)``.

The order is fixed: the fallback is round all; inside it a call is admitted by its circuit, its rates and its bulkhead,
decided together and in one round trip (all or nothing); inside that it is retried, and each try has its timeout. A part
that is not declared costs nothing. `guarding` has the admission, `tries` the tries, `fallbacks` what is given instead,
`desk` the store's side, `circuit` the process's view of the fleet's circuit.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import CoroutineType
from typing import Any, ParamSpec, TypeVar, cast

from taskguard.clock import Duration, seconds
from taskguard.downstream.admittance import Call, Pass, aside, booked_for, booking, by_loop, by_thread, covering
from taskguard.downstream.blocks import PermitBlock
from taskguard.downstream.circuit import Circuit
from taskguard.downstream.desk import Desk, bind, desk_of, use
from taskguard.downstream.fallbacks import FallbackChain
from taskguard.downstream.guarding import Guard, OnStoreDown
from taskguard.downstream.leasing import leasable
from taskguard.downstream.stats import DownstreamStats, explain, stats
from taskguard.downstream.tries import Tries
from taskguard.errors import ConfigurationError
from taskguard.permits import RateAsk
from taskguard.policies import CircuitBreaker, Concurrency, Fallback, Retry, Timeout
from taskguard.policies.calls import Limit, Rates, limits
from taskguard.policies.checks import number, one_of
from taskguard.ports import PermitStore

__all__ = ["Cost", "Downstream", "DownstreamStats", "OnStoreDown", "PermitBlock", "booked_for", "booking", "use"]

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

Cost = float | Callable[..., float]


class Downstream:
    """A guarded service. Make one per service, at import; it is for any number of threads, tasks and forked children.

    rate: a policy, a `Limit`, several of them in a list (stacked: all or nothing) or by name in a mapping.
    concurrency: `Concurrency`, or a number of places. circuit, timeout, retry, fallback: their policies; a timeout may
        be given as its total seconds.
    store: URL or PermitStore; None: the application's (see `use`), else this process's memory, with a warning.
    on_store_down: what becomes of calls while the store does not answer: "allow" or "refuse".
    cost: permits a call takes of each rate, or a function of its arguments.
    leased: take the rates' permits from the store in batches and spend them in the process, for very high rates. Never
        more than ``burst + rate * w`` in any window of w seconds; a process that dies takes its batch along, and a
        refused task has no slot of its own. Token buckets without a key only, and all callers must lease.
    max_wait: seconds a call waits for a rate or a place before it is refused; never past its budget.
    shadow: decide and tell, refuse nothing.
    """

    def __init__(
        self,
        name: str,
        *,
        rate: Rates | None = None,
        concurrency: Concurrency | int | None = None,
        circuit: CircuitBreaker | None = None,
        timeout: Timeout | Duration | None = None,
        retry: Retry | None = None,
        fallback: Fallback | None = None,
        store: str | PermitStore | Desk | None = None,
        on_store_down: OnStoreDown = "allow",
        cost: Cost = 1.0,
        max_wait: Duration = 0.0,
        shadow: bool = False,
        leased: bool = False,
    ) -> None:
        if not isinstance(name, str) or not name or not name.isprintable() or name != name.strip():
            raise ConfigurationError(f"Downstream: {name!r} is no name; give a word, such as 'bank'")
        one_of(f"{name}: on_store_down", on_store_down, ("allow", "refuse"))
        self.name = name
        self.limits: tuple[Limit, ...] = limits(rate, name)
        if not isinstance(leased, bool):
            raise ConfigurationError(f"{name}: leased={leased!r} is neither True nor False")
        if leased:
            leasable(name, self.limits, cost)
        self.concurrency = _concurrency(name, concurrency)
        self.circuit_policy = _of(name, "circuit", circuit, CircuitBreaker)
        self.timeout = _timeout(name, timeout)
        self.retry = _of(name, "retry", retry, Retry)
        self.fallback = _of(name, "fallback", fallback, Fallback)
        self.cost: Cost = cost if callable(cost) else _cost(name, cost)
        self.key: str | None = None
        self._store = store
        self._desk: Desk | None = None
        self.guard = Guard(
            name,
            limits=self.limits,
            concurrency=self.concurrency,
            breaker=self.circuit_policy,
            on_store_down=on_store_down,
            max_wait=seconds(max_wait, what=f"{name}: max_wait"),
            shadow=shadow,
            desk=self._open,
            leased=leased,
        )
        tallies = self.guard.tallies
        self.tries = Tries(
            name,
            self.retry,
            self.timeout,
            again=tallies.retries,
            exhausted=tallies.exhausted,
            late=tallies.timeouts,
        )
        self._chain = (
            None
            if self.fallback is None
            else FallbackChain(
                name,
                self.fallback,
                self.circuit_policy,
                notify=lambda event: self._open().notify(event),
                tally=tallies.fallbacks,
            )
        )
        if store is None:
            bind(self)

    def __repr__(self) -> str:
        return f"Downstream({self.name!r})"

    # -- one call ---------------------------------------------------------------------------------------------------

    def call(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """``fn(*args, **kwargs)``, guarded. Raises Refused, DownstreamTimeout, or what *fn* raised last."""
        if self._chain is None:
            return self._call(fn, args, kwargs)
        try:
            result = self._call(fn, args, kwargs)
        except Exception as exc:
            if not self._chain.answers(exc):
                raise
            return cast(T, self._chain.answer(exc, fn, args, kwargs))
        self._chain.remember(fn, args, kwargs, result)
        return result

    async def acall(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The same for an async function. The event loop never waits for a store that is elsewhere."""
        if self._chain is None:
            return await self._acall(fn, args, kwargs)
        try:
            result = await self._acall(fn, args, kwargs)
        except Exception as exc:
            if not self._chain.answers(exc):
                raise
            return cast(T, await self._chain.aanswer(exc, fn, args, kwargs))
        self._chain.remember(fn, args, kwargs, result)
        return result

    def _call(self, fn: Callable[..., T], args: Sequence[Any], kwargs: Mapping[str, Any]) -> T:
        guard = self.guard
        cost = self.cost
        passed = None if self.key is not None else guard.at_once(cost(*args, **kwargs) if callable(cost) else cost)
        if passed is None:
            passed = by_thread(guard.enter(self._asked(fn, args, kwargs)))
        token = covering.set({**covering.get(), self.name: passed})
        try:
            result = self.tries.run(fn, args, kwargs, passed, self._pay(passed, fn, args, kwargs))
            if isinstance(result, CoroutineType):
                result.close()
                raise ConfigurationError(f"{self.name}: {fn!r} is async; use acall, or the decorator")
        except BaseException as exc:
            covering.reset(token)
            tell = guard.leave(passed, exc)
            if tell is not None:
                tell()
            raise
        covering.reset(token)
        tell = guard.leave(passed, None)
        if tell is not None:
            tell()
        return result

    async def _acall(self, fn: Callable[..., Awaitable[T]], args: Sequence[Any], kwargs: Mapping[str, Any]) -> T:
        async with PermitBlock(self.guard, self._asked(fn, args, kwargs)) as block:
            passed = block.passed
            return await self.tries.arun(fn, args, kwargs, passed, self._apay(passed, fn, args, kwargs))

    def _asked(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        cost = self.cost
        return Call(float(cost(*args, **kwargs)) if callable(cost) else cost, self.key, fn, args, kwargs)

    def _pay(
        self, passed: Pass, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Callable[[], None] | None:
        if self.retry is None:
            return None
        return lambda: by_thread(self.guard.pay(passed, self._asked(fn, args, kwargs)))

    def _apay(
        self, passed: Pass, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Callable[[], Awaitable[None]] | None:
        if self.retry is None:
            return None
        return lambda: by_loop(self.guard.pay(passed, self._asked(fn, args, kwargs)))

    # -- a decorator ------------------------------------------------------------------------------------------------

    def __call__(self, fn: F) -> F:
        """A decorator: each call of *fn* (a function, an async one, a generator) is guarded.

        A generator is one call from its first item to its end, so it is neither retried, timed out nor replaced; one
        that is not read to its end says nothing about the downstream.
        """
        if not callable(fn):
            raise ConfigurationError(f"{self.name}: {fn!r} cannot be called; decorate a function")
        if inspect.iscoroutinefunction(fn):

            @functools.wraps(fn)
            async def of_loop(*args: Any, **kwargs: Any) -> Any:
                return await self.acall(fn, *args, **kwargs)

            return cast(F, of_loop)
        if inspect.isasyncgenfunction(fn):

            @functools.wraps(fn)
            async def of_items(*args: Any, **kwargs: Any) -> Any:
                async with PermitBlock(self.guard, self._asked(fn, args, kwargs)):
                    async for item in fn(*args, **kwargs):
                        yield item

            return cast(F, of_items)
        if inspect.isgeneratorfunction(fn):

            @functools.wraps(fn)
            def of_generator(*args: Any, **kwargs: Any) -> Any:
                with PermitBlock(self.guard, self._asked(fn, args, kwargs)):
                    return (yield from fn(*args, **kwargs))

            return cast(F, of_generator)

        def of_thread(*args: Any, **kwargs: Any) -> Any:
            return self.call(fn, *args, **kwargs)

        if self._circuit_alone():
            assert self.guard.circuit is not None
            return cast(F, self.guard.circuit.guard(fn, of_thread, self.guard.ended))
        if self.retry is not None and self._retry_alone():
            return cast(F, self.tries.guard(fn))
        return cast(F, functools.wraps(fn)(of_thread))

    def _circuit_alone(self) -> bool:
        others = (self.limits, self.concurrency, self.timeout, self.retry, self.fallback)
        return self.circuit_policy is not None and not any(others)

    def _retry_alone(self) -> bool:
        return not any((self.limits, self.concurrency, self.timeout, self.circuit_policy, self.fallback))

    # -- a block ----------------------------------------------------------------------------------------------------

    def permit(
        self,
        *,
        cost: float | None = None,
        key: str | None = None,
        of: Callable[..., Any] | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        also: tuple[RateAsk, ...] = (),
        covers: bool = True,
    ) -> PermitBlock:
        """A block that is one call: admitted at its start, judged by how it ends. Neither retried nor replaced.

        ``Timeout.total`` is the budget of what the block calls. It does not end the block: one that took longer has
        failed, for the circuit and the figures, and nothing is raised, because its work is done.

        key: whose call it is, for limits with a key; else found with *of*, *args* and *kwargs*, the function that is
        called and its arguments. also: further rates, decided together with the downstream's own. A call to the same
        downstream inside the block is covered by its permit once, and by its slot always; without *covers* by neither,
        and the caller sees to the time as well.
        """
        named = kwargs or {}
        if cost is None:
            if callable(self.cost) and of is None and not args and not named:
                raise ConfigurationError(f"{self.name}: its cost is a function of the arguments; give permit(cost=...)")
            found = self.cost(*args, **named) if callable(self.cost) else self.cost
        else:
            found = _cost(self.name, cost)
        call = Call(float(found), key or self.key, of, args, named, also)
        return PermitBlock(self.guard, call, covers=covers, total=self.tries.total if covers else None)

    def using(self, *, cost: float | None = None, key: str | None = None) -> Downstream:
        """The same downstream, circuit and counts and all, with another cost or for this key.

        ``bank.using(key="acme").call(fn)``.
        """
        other = object.__new__(Downstream)
        other.__dict__.update(self.__dict__)
        if cost is not None:
            other.cost = _cost(self.name, cost)
        if key is not None:
            other.key = key
        return other

    def instead(
        self, error: BaseException, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """What the fallback gives for a call that ended with *error*; raises that where there is none."""
        if self._chain is None:
            raise error
        return self._chain.answer(error, fn, args, kwargs)

    def remember(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], value: Any) -> None:
        """A good answer that was not got by `call`: the fallback may give it later."""
        if self._chain is not None:
            self._chain.remember(fn, args, kwargs, value)

    def pause(self, seconds: float, *, why: str) -> None:
        """Let no call of the fleet through for so long, because the downstream asked for it. One round trip."""
        self.guard.pause(number(f"{self.name}: pause", seconds, least=0.0), why=why)

    async def apause(self, seconds: float, *, why: str) -> None:
        """The same for async code."""
        await aside(lambda: self.pause(seconds, why=why))

    # -- how it stands ----------------------------------------------------------------------------------------------

    @property
    def circuit(self) -> Circuit | None:
        """This process's view of the fleet's circuit (``.view``, ``.state``), None where none is declared."""
        return self.guard.circuit if self.circuit_policy is not None else None

    @property
    def permits(self) -> PermitStore:
        """The permit store, opened when it is first asked for."""
        return self.guard.desk().store

    @property
    def desk(self) -> Desk:
        """Where this process asks that store."""
        return self.guard.desk()

    def stats(self) -> DownstreamStats:
        """What this process saw."""
        return stats(self.guard)

    def explain(self) -> list[str]:
        """What is declared, in the order in which it is asked, and how it stands: one line each, for people."""
        return explain(self.guard, retry=self.retry, timeout=self.timeout, fallback=self.fallback)

    def _open(self) -> Desk:
        desk = self._desk
        if desk is None:
            desk = self._desk = desk_of(self._store)
        return desk

    def rebind(self) -> None:
        """The application uses another store from now on."""
        self._desk = None
        if self.guard.circuit is not None:
            self.guard.circuit.sleep()


def _of(name: str, what: str, value: Any, kind: type[T]) -> T | None:
    if value is not None and not isinstance(value, kind):
        raise ConfigurationError(f"{name}: {what} {value!r} is no {kind.__name__}; give {kind.__name__}(...)")
    return value


def _concurrency(name: str, value: Concurrency | int | None) -> Concurrency | None:
    if isinstance(value, int):
        return Concurrency(value)
    return _of(name, "concurrency", value, Concurrency)


def _timeout(name: str, value: Timeout | Duration | None) -> Timeout | None:
    if value is None or isinstance(value, Timeout):
        return value
    return Timeout(total=seconds(value, what=f"{name}: timeout"))


def _cost(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigurationError(f"{name}: cost {value!r} must be a number, more than 0")
    return float(value)
