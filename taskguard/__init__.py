"""taskguard: a reliability toolkit for Celery.

``from taskguard import ReliableTask`` and run your workers as before; `install` says where the store is.
"""

from taskguard.celery.install import install
from taskguard.celery.task import ReliableTask
from taskguard.downstream.caching import cached
from taskguard.downstream.endpoints import Endpoints
from taskguard.downstream.gathering import agather, gather
from taskguard.downstream.local import LocalRate
from taskguard.downstream.pools import AsyncBulkhead, ThreadPoolBulkhead
from taskguard.downstream.service import Downstream
from taskguard.edge import ASGIRateLimit, WSGIRateLimit, open_limiter, rate_limit
from taskguard.errors import (
    BulkheadFullError,
    CircuitOpenError,
    ConfigurationError,
    CustodyLost,
    DeadLetter,
    DeadlineExceeded,
    DownstreamTimeout,
    DuplicateTask,
    KeyReused,
    PoisonedTask,
    RateLimitedError,
    Refused,
    RetriesExhausted,
    StoreError,
    StoreUnavailable,
    TaskguardError,
)
from taskguard.events import Event
from taskguard.policies import (
    Adaptive,
    Alternative,
    Budget,
    CircuitBreaker,
    CircuitChange,
    Concurrency,
    Default,
    Degraded,
    Fallback,
    FallbackEvent,
    FixedWindow,
    LeakyBucket,
    Limit,
    QueueForLater,
    Retry,
    RetryEvent,
    SlidingLog,
    SlidingWindow,
    Stale,
    Timeout,
    TokenBucket,
)
from taskguard.rules import Rule
from taskguard.settings import Settings
from taskguard.stores import open_rules, open_store

__all__ = [
    "ASGIRateLimit",
    "Adaptive",
    "Alternative",
    "AsyncBulkhead",
    "Budget",
    "BulkheadFullError",
    "CircuitBreaker",
    "CircuitChange",
    "CircuitOpenError",
    "Concurrency",
    "ConfigurationError",
    "CustodyLost",
    "DeadLetter",
    "DeadlineExceeded",
    "Default",
    "Degraded",
    "Downstream",
    "DownstreamTimeout",
    "DuplicateTask",
    "Endpoints",
    "Event",
    "Fallback",
    "FallbackEvent",
    "FixedWindow",
    "KeyReused",
    "LeakyBucket",
    "Limit",
    "LocalRate",
    "PoisonedTask",
    "QueueForLater",
    "RateLimitedError",
    "Refused",
    "ReliableTask",
    "RetriesExhausted",
    "Retry",
    "RetryEvent",
    "Rule",
    "Settings",
    "SlidingLog",
    "SlidingWindow",
    "Stale",
    "StoreError",
    "StoreUnavailable",
    "TaskguardError",
    "ThreadPoolBulkhead",
    "Timeout",
    "TokenBucket",
    "WSGIRateLimit",
    "agather",
    "cached",
    "gather",
    "install",
    "open_limiter",
    "open_rules",
    "open_store",
    "rate_limit",
]
