"""What the two middlewares have in common: which request is asked for, as whom, and at what cost."""

from __future__ import annotations

from collections.abc import Callable

from taskguard.errors import ConfigurationError
from taskguard.limiter.identity import Request, RequestIdentity
from taskguard.policies.checks import number
from taskguard.rules import Identity

Cost = float | Callable[[Request], float]
Exempt = Callable[[Request], bool]


class Entrance:
    """The declaration of one middleware, checked when it is made."""

    def __init__(
        self, what: str, identity: RequestIdentity | None, *, cost: Cost, exempt: Exempt | None, max_wait: float
    ) -> None:
        if identity is not None and not isinstance(identity, RequestIdentity):
            raise ConfigurationError(f"{what}.identity: {identity!r} is none; give RequestIdentity(...)")
        self.identity = RequestIdentity() if identity is None else identity
        self.cost: Cost = cost if callable(cost) else number(f"{what}.cost", cost, least=0.0)
        if exempt is not None and not callable(exempt):
            raise ConfigurationError(f"{what}.exempt: {exempt!r} cannot be called; give a function of Request")
        self.exempt = exempt
        self.max_wait = number(f"{what}.max_wait", max_wait, least=0.0)
        self._what = what

    def asked(self, request: Request) -> tuple[Identity, float] | None:
        """Who asks for how much; None where the request is exempt or costs nothing."""
        if self.exempt is not None and self.exempt(request):
            return None
        cost = number(f"{self._what}.cost", self.cost(request), least=0.0) if callable(self.cost) else self.cost
        return (self.identity.of(request), cost) if cost else None
