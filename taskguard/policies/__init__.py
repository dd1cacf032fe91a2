"""Policies: frozen declarations, validated when they are made, so that a mistake fails at import and not at night.

A policy imports nothing, decides nothing and performs nothing; the domain reads it. Durations may be given as seconds
or ``timedelta`` and are kept as seconds.
"""

from taskguard.policies.adaptive import Adaptive
from taskguard.policies.calls import (
    Alternative,
    Concurrency,
    Default,
    Degraded,
    Fallback,
    FallbackEvent,
    Limit,
    QueueForLater,
    Stale,
    Timeout,
)
from taskguard.policies.circuit import CircuitBreaker, CircuitChange
from taskguard.policies.rates import FixedWindow, LeakyBucket, Rate, SlidingLog, SlidingWindow, TokenBucket
from taskguard.policies.retry import Backoff, Budget, Jitter, Retry, RetryEvent

__all__ = [
    "Adaptive",
    "Alternative",
    "Backoff",
    "Budget",
    "CircuitBreaker",
    "CircuitChange",
    "Concurrency",
    "Default",
    "Degraded",
    "Fallback",
    "FallbackEvent",
    "FixedWindow",
    "Jitter",
    "LeakyBucket",
    "Limit",
    "QueueForLater",
    "Rate",
    "Retry",
    "RetryEvent",
    "SlidingLog",
    "SlidingWindow",
    "Stale",
    "Timeout",
    "TokenBucket",
]
