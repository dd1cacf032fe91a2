"""Several addresses of one service: calls are balanced over them, and one that fails is left out until it recovers.

Each endpoint has a circuit of its own in the fleet's store. Who picks skips those that are known to be open, without
asking anybody; one that is due for a probe is offered the call, so recovery needs no traffic of its own. A call that
fails is not sent to another endpoint by itself: put the endpoints into a downstream with a `Retry` for that, and each
try picks anew.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, get_args

from taskguard.downstream.blocks import PermitBlock
from taskguard.downstream.desk import Desk
from taskguard.downstream.service import Downstream, OnStoreDown
from taskguard.downstream.tending import begins_anew
from taskguard.errors import CircuitOpenError, ConfigurationError, RateLimitedError, Refused
from taskguard.policies.checks import one_of
from taskguard.policies.circuit import CircuitBreaker
from taskguard.ports import PermitStore

P = ParamSpec("P")
T = TypeVar("T")

Balance = Literal["round_robin", "random", "least_connections"]


class Endpoint:
    """One address: its downstream (``<name>@<url>``), and how many calls of this process are under way to it."""

    def __init__(self, url: str, downstream: Downstream) -> None:
        self.url, self.downstream = url, downstream
        self.active = 0

    @property
    def open_for(self) -> float | None:
        """Seconds for which its circuit is known to let nothing through; None: it may be tried."""
        circuit = self.downstream.circuit
        return None if circuit is None else circuit.refused_for()


class Endpoints:
    """The endpoints *urls* of the service *name*.

    balance: "round_robin" takes one after the other; "random" any; "least_connections" the one to which the fewest
        calls of this process are under way.
    circuit: what leaves an endpoint out; each has its own. Other options are those of `Downstream`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        name: str = "endpoints",
        balance: Balance = "round_robin",
        circuit: CircuitBreaker | None = None,
        store: str | PermitStore | Desk | None = None,
        on_store_down: OnStoreDown = "allow",
    ) -> None:
        one_of(f"{name}: balance", balance, get_args(Balance))
        if isinstance(urls, str) or not urls:
            raise ConfigurationError(f"{name}: {urls!r} is no list of addresses; give ['https://a', 'https://b']")
        if len(set(urls)) != len(urls):
            raise ConfigurationError(f"{name}: an address is given twice in {list(urls)!r}; leave one out")
        self.name, self.balance = name, balance
        breaker = circuit or CircuitBreaker()
        self.endpoints = tuple(
            Endpoint(url, Downstream(f"{name}@{url}", circuit=breaker, store=store, on_store_down=on_store_down))
            for url in urls
        )
        self._turn = itertools.count()
        self.after_fork()
        begins_anew(self)

    def after_fork(self) -> None:
        """The calls under way are the parent's."""
        self._lock = threading.Lock()
        for endpoint in self.endpoints:
            endpoint.active = 0

    def call(self, fn: Callable[Concatenate[str, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """``fn(url, *args, **kwargs)`` with one of the addresses. Raises CircuitOpenError where all are left out."""
        with self.pick() as url:
            return fn(url, *args, **kwargs)

    async def acall(self, fn: Callable[Concatenate[str, P], Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The same for an async function."""
        async with self.apick() as url:
            return await fn(url, *args, **kwargs)

    @contextmanager
    def pick(self) -> Iterator[str]:
        """A block that is one call to the address it gives."""
        waits: list[float | None] = []
        for endpoint in self._in_turn(waits):
            block = endpoint.downstream.permit()
            try:
                block.__enter__()
            except (CircuitOpenError, RateLimitedError) as refused:  # open, or paused by its own Retry-After
                waits.append(refused.retry_after)
                continue
            with _entered(block), self._counted(endpoint):
                yield endpoint.url
            return
        raise self._all_out(waits)

    @asynccontextmanager
    async def apick(self) -> AsyncIterator[str]:
        """The same for async code."""
        waits: list[float | None] = []
        for endpoint in self._in_turn(waits):
            block = endpoint.downstream.permit()
            try:
                await block.__aenter__()
            except (CircuitOpenError, RateLimitedError) as refused:
                waits.append(refused.retry_after)
                continue
            async with _aentered(block):
                with self._counted(endpoint):
                    yield endpoint.url
            return
        raise self._all_out(waits)

    def _in_turn(self, waits: list[float | None]) -> Iterator[Endpoint]:
        """The endpoints in the order in which they are tried; of those left out, *waits* gets how long."""
        first = next(self._turn) % len(self.endpoints)
        order = [*self.endpoints[first:], *self.endpoints[:first]]
        if self.balance == "random":
            random.shuffle(order)
        elif self.balance == "least_connections":
            order.sort(key=lambda endpoint: endpoint.active)  # stable: of equals, whose turn it is
        for endpoint in order:
            left = endpoint.open_for
            if left is None:
                yield endpoint
            else:
                waits.append(None if left == float("inf") else left)

    @contextmanager
    def _counted(self, endpoint: Endpoint) -> Iterator[None]:
        with self._lock:
            endpoint.active += 1
        try:
            yield
        finally:
            with self._lock:
                endpoint.active = max(0, endpoint.active - 1)

    def _all_out(self, waits: Sequence[float | None]) -> Refused:
        soonest = min((wait for wait in waits if wait is not None), default=None)
        when = "they stay so until an operator closes one" if soonest is None else f"try again in {soonest:.3g} s"
        return CircuitOpenError(
            f"{self.name}: the circuits of all {len(self.endpoints)} endpoints are open; {when}",
            retry_after=soonest,
            downstream=self.name,
            limit=self.name,
        )

    def stats(self) -> dict[str, dict[str, Any]]:
        """By address: the circuit's state, and calls under way from this process."""
        return {
            endpoint.url: {
                "state": None if endpoint.downstream.circuit is None else endpoint.downstream.circuit.state,
                "active": endpoint.active,
            }
            for endpoint in self.endpoints
        }


@contextmanager
def _entered(block: PermitBlock) -> Iterator[None]:
    try:
        yield
    except BaseException as exc:
        block.__exit__(type(exc), exc, exc.__traceback__)
        raise
    block.__exit__(None, None, None)


@asynccontextmanager
async def _aentered(block: PermitBlock) -> AsyncIterator[None]:
    try:
        yield
    except BaseException as exc:
        await block.__aexit__(type(exc), exc, exc.__traceback__)
        raise
    await block.__aexit__(None, None, None)
