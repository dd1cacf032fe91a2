"""How many calls a period may see. Five algorithms, one vocabulary: *limit* permits per *per* seconds.

A call may cost more than one permit. A cost above what a policy can ever admit at once (`most`) is refused for good.
"""

from __future__ import annotations

from dataclasses import dataclass

from taskguard.clock import Duration, seconds
from taskguard.errors import ConfigurationError
from taskguard.policies.checks import number

LONGEST = 366 * 86400.0
"""Seconds of the longest period: a state must end some day."""


@dataclass(frozen=True, slots=True)
class _Rate:
    limit: float
    per: Duration = 1.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        limit = number(f"{name}.limit", self.limit, least=0.0)
        if limit == 0:
            raise ConfigurationError(
                f"{name}.limit: 0 admits nothing; give more, or force the circuit open to stop calls"
            )
        per = seconds(self.per, what=f"{name}.per")
        if not 1e-3 <= per <= LONGEST:
            raise ConfigurationError(f"{name}.per: {self.per!r} is out of range; give 1 ms to 366 days")
        if limit / per > 1e6:
            raise ConfigurationError(f"{name}: {limit:g} per {per:g} s is over a million a second; that limits nothing")
        object.__setattr__(self, "limit", limit)
        object.__setattr__(self, "per", per)

    @property
    def period(self) -> float:
        """``per``, in seconds."""
        return float(self.per)  # type: ignore[arg-type]

    @property
    def interval(self) -> float:
        """Seconds from one permit to the next in the long run."""
        return self.period / self.limit

    @property
    def most(self) -> float:
        """The largest cost that can ever be admitted."""
        return self.limit


@dataclass(frozen=True, slots=True)
class TokenBucket(_Rate):
    """A bucket that holds *burst* tokens and gets *limit* new ones every *per* seconds. Source: GCRA, ITU-T I.371.

    At most ``burst + limit * w / per`` permits in any window of *w* seconds. *burst* is *limit* where it is not given,
    and 1 at least; "N at once, from a full bucket" means N, not N + 1.
    """

    burst: float | None = None

    def __post_init__(self) -> None:
        _Rate.__post_init__(self)
        burst = max(self.limit, 1.0) if self.burst is None else number("TokenBucket.burst", self.burst, least=0.0)
        if burst < 1:
            raise ConfigurationError(f"TokenBucket.burst: {self.burst!r} admits no call at all; give 1 or more")
        object.__setattr__(self, "burst", burst)

    @property
    def most(self) -> float:
        assert self.burst is not None
        return self.burst


@dataclass(frozen=True, slots=True)
class LeakyBucket(_Rate):
    """One permit every ``per / limit`` seconds, none saved up: a bucket of one, paced. Source: GCRA with burst 1.

    A call of cost *n* pushes the next one back by *n* intervals.
    """

    @property
    def most(self) -> float:
        return max(self.limit, 1.0)


@dataclass(frozen=True, slots=True)
class FixedWindow(_Rate):
    """*limit* permits in each window of *per* seconds, which begin at multiples of *per* since 1970.

    Cheap and exact in each window, but two windows' worth may fall within one *per* across an edge: never the default.
    """

    def __post_init__(self) -> None:
        _Rate.__post_init__(self)
        _admits_one(self)


@dataclass(frozen=True, slots=True)
class SlidingWindow(_Rate):
    """Two counters; the older fades out as the window moves. Source: sliding window counter, Cloudflare 2017.

    Where calls before the edge were even, at most *limit* in any window; where they were bunched just before it, at
    most twice that, as with `FixedWindow`.
    """

    def __post_init__(self) -> None:
        _Rate.__post_init__(self)
        _admits_one(self)


@dataclass(frozen=True, slots=True)
class SlidingLog(_Rate):
    """Remembers every permit of the last *per* seconds: exactly *limit* in any window, at the price of that memory.

    *limit* is at most 100,000; choose `TokenBucket` for more.
    """

    def __post_init__(self) -> None:
        _Rate.__post_init__(self)
        if self.limit > 100_000 or self.limit < 1:
            raise ConfigurationError(f"SlidingLog.limit: {self.limit:g} is out of range; give 1 to 100000")


def _admits_one(window: FixedWindow | SlidingWindow) -> None:
    if window.limit < 1:
        name = type(window).__name__
        raise ConfigurationError(
            f"{name}.limit: {window.limit:g} in each window admits no call; write the same rate with a longer per"
        )


Rate = TokenBucket | LeakyBucket | FixedWindow | SlidingWindow | SlidingLog
