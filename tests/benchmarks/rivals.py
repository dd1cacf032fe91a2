"""The same work as other libraries do it, each as its documentation says, with the fastest of its options.

Each admits practically all calls (a million a second), or refuses practically all (one an hour) where *refusing*.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable

from redis import Redis

from tests.benchmarks.slices import Subject

MANY = 1_000_000
"""Permits a second that nobody uses up. limits and throttled-py take whole numbers only."""


def fixed_window_of_limits(url: str, namespace: str, *, refusing: bool = False) -> Subject:
    from limits import RateLimitItemPerHour, RateLimitItemPerSecond
    from limits.storage import RedisStorage
    from limits.strategies import FixedWindowRateLimiter

    limiter = FixedWindowRateLimiter(RedisStorage(url))
    item = RateLimitItemPerHour(1) if refusing else RateLimitItemPerSecond(MANY)
    return lambda: limiter.hit(item, f"{namespace}.limits")


def memory_of_limits() -> Subject:
    from limits import RateLimitItemPerSecond
    from limits.storage import MemoryStorage
    from limits.strategies import MovingWindowRateLimiter

    limiter, item = MovingWindowRateLimiter(MemoryStorage()), RateLimitItemPerSecond(1000)
    return lambda: limiter.hit(item, "key")


def gcra_of_throttled(url: str, namespace: str, *, refusing: bool = False) -> Subject:
    from throttled import RedisStore, Throttled, per_hour, per_sec

    quota = per_hour(1, burst=1) if refusing else per_sec(MANY, burst=MANY)
    limiter = Throttled(key=f"{namespace}.throttled", using="gcra", quota=quota, store=RedisStore(server=url))
    return limiter.limit


def gcra_of_throttled_in_memory() -> Subject:
    from throttled import MemoryStore, Throttled, per_sec

    quota = per_sec(MANY, burst=MANY)
    return Throttled(key="key", using="gcra", quota=quota, store=MemoryStore()).limit


def gcra_of_pyrate(url: str, namespace: str, *, refusing: bool = False) -> Subject:
    from pyrate_limiter import GCRA, Duration, Limiter, Rate, RedisStateStore, StateBucket

    rate = Rate(1, Duration.HOUR) if refusing else Rate(MANY, Duration.SECOND)
    store = RedisStateStore(Redis.from_url(url), f"{namespace}.pyrate")
    limiter = Limiter(StateBucket([rate], store=store, algorithm=GCRA()))
    return lambda: limiter.try_acquire("key", blocking=False)


def circuit_of_pybreaker() -> Subject:
    from pybreaker import CircuitBreaker

    return CircuitBreaker(fail_max=5, reset_timeout=30)(_nothing)  # type: ignore[no-any-return]


def circuit_of_circuitbreaker() -> Subject:
    from circuitbreaker import circuit

    return circuit(failure_threshold=5)(_nothing)


def _nothing() -> None:
    """The guarded call."""


def bare_wrapper() -> Subject:
    """The least that a guard can be: a wrapper with a ``try``."""

    def wrapped(*args: object, **options: object) -> object:
        try:
            return _nothing(*args, **options)
        except Exception:
            raise

    return wrapped


def lock_and_clock() -> Subject:
    """The least that an exact limiter in memory must do."""
    lock, clock = threading.Lock(), time.monotonic

    def take() -> float:
        with lock:
            return clock()

    return take


def stacked(url: str, namespace: str) -> Subject:
    """limits' fixed window, pybreaker's circuit in Redis, and the usual semaphore: a sorted set of expiring members."""
    from pybreaker import CircuitBreaker, CircuitRedisStorage

    hit = fixed_window_of_limits(url, f"{namespace}.stacked")
    redis = Redis.from_url(url)
    circuit = CircuitBreaker(
        fail_max=5, reset_timeout=30, state_storage=CircuitRedisStorage("closed", redis, namespace=namespace)
    )
    key = f"{namespace}.semaphore"
    acquire: Callable[..., object] = redis.register_script(
        "redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[1]) "
        "if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end "
        "redis.call('ZADD', KEYS[1], ARGV[3], ARGV[4]) redis.call('PEXPIRE', KEYS[1], 60000) return 1"
    )

    def call() -> object:
        assert hit()
        holder, now = uuid.uuid4().hex, time.time()
        assert acquire(keys=[key], args=[now, 10, now + 30, holder])
        try:
            return circuit.call(_nothing)
        finally:
            redis.zrem(key, holder)

    return call
