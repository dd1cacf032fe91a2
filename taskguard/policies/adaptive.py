"""A limit that finds its own place between two bounds."""

from __future__ import annotations

from dataclasses import dataclass

from taskguard.clock import Duration, seconds
from taskguard.errors import ConfigurationError
from taskguard.policies.checks import number


@dataclass(frozen=True, slots=True)
class Adaptive:
    """Additive increase, multiplicative decrease, between *least* and *most* calls per *per* seconds, for the fleet.

    start: where it begins. increase: added each *interval* in which calls ended well and the limit was in use.
    decrease: the factor it is multiplied by, at most once per *interval*, when the downstream said 429 or 503 or took
        longer than *latency* seconds.
    burst: of the token bucket that enforces it; None: a tenth of a second's worth, 1 at least.
    Source: AIMD, Chiu and Jain 1989.
    """

    start: float
    least: float
    most: float
    increase: float = 1.0
    decrease: float = 0.5
    per: Duration = 1.0
    interval: Duration = 1.0
    latency: Duration | None = None
    burst: float | None = None

    def __post_init__(self) -> None:
        for name in ("start", "least", "most", "increase"):
            value = number(f"Adaptive.{name}", getattr(self, name), least=0.0)
            if value == 0:
                raise ConfigurationError(f"Adaptive.{name}: 0 never lets a call through again; give more")
            object.__setattr__(self, name, value)
        if not self.least <= self.start <= self.most:
            raise ConfigurationError(
                f"Adaptive: start {self.start:g} is not between least {self.least:g} and most {self.most:g}; order them"
            )
        decrease = number("Adaptive.decrease", self.decrease, least=0.0)
        if not 0 < decrease < 1:
            raise ConfigurationError(
                f"Adaptive.decrease: {self.decrease!r} is no factor; give more than 0, less than 1"
            )
        object.__setattr__(self, "decrease", decrease)
        for name in ("per", "interval", "latency"):
            if getattr(self, name) is not None:
                value = seconds(getattr(self, name), what=f"Adaptive.{name}")
                if value == 0:
                    raise ConfigurationError(f"Adaptive.{name}: 0 measures nothing; give more than zero seconds")
                object.__setattr__(self, name, value)
        if self.burst is not None:
            burst = number("Adaptive.burst", self.burst, least=1.0)
            object.__setattr__(self, "burst", burst)

    @property
    def period(self) -> float:
        """``per``, in seconds."""
        return float(self.per)  # type: ignore[arg-type]
