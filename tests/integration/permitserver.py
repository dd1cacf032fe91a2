"""What is asked of a permit store on Redis, whole."""

from __future__ import annotations

from taskguard.permits import Ask, CircuitAsk, Outcomes, RateAsk, Slot, SlotAsk
from taskguard.policies.circuit import CircuitBreaker
from taskguard.policies.rates import Rate
from taskguard.stores.redis.permits import RedisPermits
from tests.contracts.permits import EVERY_RATE, kind

BREAKER = CircuitBreaker(minimum_calls=2, wait_in_open=30)


def ask_for_all(name: str, holder: str, rate: Rate, *, release: str | None = None, book: bool = False) -> Ask:
    """Rate, place and circuit of one name."""
    return Ask(
        rates=(RateAsk(name, rate),), slot=SlotAsk(name, 2, holder, 5.0), circuit=CircuitAsk(name, BREAKER, holder),
        release=() if release is None else (Slot(name, release),), book=book,
    )  # fmt: skip


def everything(permits: RedisPermits, name: str) -> None:
    """Each operation, so that each kind of key is written."""
    for rate in EVERY_RATE:
        permits.admit(Ask(rates=(RateAsk(f"{name} {kind(rate)}", rate),)))
    for _ in range(5):
        permits.admit(ask_for_all(name, "h", EVERY_RATE[0], book=True))
    permits.admit(ask_for_all(name, "other", EVERY_RATE[0]))
    permits.renew_slots([Slot(name, "h")], lease=1)
    permits.release([Slot(name, "h")])
    permits.report(name, BREAKER, Outcomes(0, 1, 0, 0))
    permits.adapt(name, 5, why="told so")
    permits.pause(name, until=permits.now() + 60, who="ann", why="deploy")
