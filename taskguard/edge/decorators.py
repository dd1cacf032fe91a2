"""``@rate_limit("10/minute", client=..., role=...)``: a limit round one function, per client and per role."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

from taskguard.downstream.desk import bind, desk_of
from taskguard.errors import ConfigurationError
from taskguard.idempotency import key_maker
from taskguard.limiter.decision import Decision, refusal
from taskguard.limiter.identity import name as named
from taskguard.limiter.identity import of_call
from taskguard.limiter.limiter import Limiter, OnStoreDown
from taskguard.limiter.rulebook import FixedRules
from taskguard.policies.checks import number
from taskguard.policies.rates import Rate
from taskguard.ports import PermitStore
from taskguard.rules import Identity, Rule

F = TypeVar("F", bound=Callable[..., Any])
Limits = str | Rate | Sequence[str | Rate]
Teller = str | Callable[..., object]
OTHERS = "*"
"""The role of all that are not named."""
_STRANGE = re.compile(r"[^\w.:@+-]", re.ASCII)


def rate_limit(
    limits: Limits | Mapping[str, Limits] | None = None,
    *,
    client: Teller | None = None,
    role: Teller | None = None,
    cost: float | Callable[..., float] = 1.0,
    name: str | None = None,
    fallback: Callable[..., Any] | None = None,
    max_wait: float = 0.0,
    on_store_down: OnStoreDown = "allow",
    store: str | PermitStore | None = None,
    limiter: Limiter | None = None,
) -> Callable[[F], F]:
    """Limit the calls of a function, sync or async.

    limits: text or policies; or by role, ``{"free": "10/minute", "premium": "100/minute"}``, with ``"*"`` for the
        others. Without any, the rules of *limiter* decide; they know the function by its *name*, as endpoint.
    client, role: a template over the arguments (``"{user_id}"``) or a function of them. Without *client* all callers
        share the limit (of their role).
    cost: permits a call takes, or a function of the arguments.
    fallback: called with the arguments instead, when the call is refused. max_wait: seconds it may wait for its turn.
    store: URL or PermitStore; None: the application's, see `taskguard.install`; else this process's memory.
    Raises RateLimitedError, with ``retry_after``, where it is refused and there is no fallback; out of a ReliableTask
    that defers the task to its own slot. Raises ConfigurationError for what cannot work, here, and for a call whose
    role is not among the declared ones.
    """

    def decorate(function: F) -> F:
        guard = _Guard(
            function,
            limits,
            client=client,
            role=role,
            cost=cost,
            name=name,
            fallback=fallback,
            max_wait=max_wait,
            on_store_down=on_store_down,
            store=store,
            limiter=limiter,
        )
        if inspect.iscoroutinefunction(function):

            @wraps(function)
            async def acall(*args: Any, **kwargs: Any) -> Any:
                identity, price = guard.asked(args, kwargs)
                decision = await guard.limiter.aenter(identity, price, max_wait=guard.max_wait, name=guard.name)
                if decision.allowed:
                    return await function(*args, **kwargs)
                answer = guard.refuse(decision, args, kwargs)
                return await answer if inspect.isawaitable(answer) else answer

            return cast(F, acall)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            identity, price = guard.asked(args, kwargs)
            decision = guard.limiter.enter(identity, price, max_wait=guard.max_wait, name=guard.name)
            return function(*args, **kwargs) if decision.allowed else guard.refuse(decision, args, kwargs)

        return cast(F, call)

    return decorate


class _Guard:
    """One decorated function."""

    def __init__(
        self,
        function: Callable[..., Any],
        limits: Limits | Mapping[str, Limits] | None,
        *,
        client: Teller | None,
        role: Teller | None,
        cost: float | Callable[..., float],
        name: str | None,
        fallback: Callable[..., Any] | None,
        max_wait: float,
        on_store_down: OnStoreDown,
        store: str | PermitStore | None,
        limiter: Limiter | None,
    ) -> None:
        self.name = name or f"{function.__module__}.{function.__qualname__}"
        what = f"rate_limit of {self.name}"
        if (limits is None) == (limiter is None):
            raise ConfigurationError(f"{what}: give either limits, such as '10/minute', or a limiter that has rules")
        if fallback is not None and not callable(fallback):
            raise ConfigurationError(f"{what}: fallback {fallback!r} cannot be called; give a function")
        self.roles: tuple[str, ...] = ()
        if isinstance(limits, Mapping):
            self.roles = tuple(limits)
            if role is None or not limits:
                raise ConfigurationError(f"{what}: limits by role need the roles, and role= that tells a call's")
        self.what = what
        self.fallback = fallback
        self.max_wait = number(f"{what}: max_wait", max_wait, least=0.0)
        self.cost = cost if callable(cost) else number(f"{what}: cost", cost, least=0.0)
        signature = inspect.signature(function)
        self._client = _teller(client, signature, "client", what)
        self._role = _teller(role, signature, "role", what)
        self._rules = None if limits is None else self._declared(limits)
        self._given = limiter
        self._store = store
        self._on_store_down = on_store_down
        self._limiter: Limiter | None = limiter
        if limiter is None and store is None:
            bind(self)

    def rebind(self) -> None:
        """The application's store is another one from now on."""
        self._limiter = None

    def _declared(self, limits: Limits | Mapping[str, Limits]) -> FixedRules:
        each = "*" if self._client is not None else ""
        per = ("client", "endpoint") if each else ("endpoint", "tier")
        by_role: Mapping[str, Limits] = limits if isinstance(limits, Mapping) else {OTHERS: limits}
        rules = []
        for role, rates in by_role.items():
            given: Any = rates
            tier = "" if role == OTHERS else role
            rules.append(
                Rule(
                    id="call" if not tier else f"call-{_STRANGE.sub('_', tier)}",
                    limits=given,
                    client=each,
                    endpoint=self.name,
                    tier=tier,
                    over_limit="queue",  # for whoever waits, or comes back
                    per=per,
                    tiers=self.roles,
                )
            )
        return FixedRules(*rules)

    @property
    def limiter(self) -> Limiter:
        """Made at the first call: the application's store is known only then."""
        made = self._limiter
        if made is None:
            assert self._rules is not None
            desk = desk_of(self._store)
            made = self._limiter = Limiter(self._rules, desk.store, on_store_down=self._on_store_down, clock=desk.clock)
        return made

    def asked(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Identity, float]:
        """Who calls, and what it costs."""
        client = self._client(args, kwargs) if self._client is not None else ""
        role = self._role(args, kwargs) if self._role is not None else ""
        if self.roles and role not in self.roles and OTHERS not in self.roles:
            raise ConfigurationError(
                f"{self.what}: role {role!r} has no limit; add it to {', '.join(self.roles)}, or '*' for the others"
            )
        cost = self.cost(*args, **kwargs) if callable(self.cost) else self.cost
        return of_call(client=client, endpoint=self.name, tier=role), number(f"{self.what}: cost", cost, least=0.0)

    def refuse(self, decision: Decision, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The fallback's answer. Raises RateLimitedError without one."""
        if self.fallback is not None:
            return self.fallback(*args, **kwargs)
        raise refusal(decision, self.name)


def _teller(
    declared: Teller | None, signature: inspect.Signature, part: str, what: str
) -> Callable[[Sequence[Any], Mapping[str, Any]], str] | None:
    if declared is None:
        return None
    if callable(declared):
        function: Callable[..., object] = declared
        return lambda args, kwargs: named(function(*args, **kwargs))
    try:
        maker = key_maker(declared, signature, task=what)
    except ConfigurationError as exc:
        raise ConfigurationError(str(exc).replace("idempotency_key", part)) from None
    assert maker is not None

    def told(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        try:
            return named(maker(args, kwargs))
        except ConfigurationError as exc:
            raise ConfigurationError(str(exc).replace("idempotency key", part)) from None

    return told
