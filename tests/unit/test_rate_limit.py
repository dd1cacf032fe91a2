"""``@rate_limit``: a limit round one function, per client and per role, sync and async."""

from __future__ import annotations

import asyncio
import inspect
import time
from typing import Any

import pytest

from taskguard.edge import rate_limit
from taskguard.errors import ConfigurationError, RateLimitedError, StoreUnavailable
from taskguard.limiter.limiter import Limiter
from taskguard.limiter.rulebook import FixedRules
from taskguard.permits import Answer, Ask
from taskguard.rules import Rule
from taskguard.stores.memory import MemoryPermits
from tests.clocks import ManualClock


class Away(MemoryPermits):
    """Permits that are away."""

    def admit(self, ask: Ask) -> Answer:
        raise StoreUnavailable("store does not answer; wait")


@pytest.fixture
def permits(clock: ManualClock) -> MemoryPermits:
    """An empty store."""
    return MemoryPermits(clock)


def outcomes(function: Any, *calls: tuple[Any, ...]) -> list[Any]:
    """What each call returns; "refused" where it was."""
    found = []
    for args in calls:
        try:
            answer = function(*args)
            found.append(asyncio.run(answer) if inspect.isawaitable(answer) else answer)
        except RateLimitedError:
            found.append("refused")
    return found


def test_a_function_is_called_as_often_as_its_limit_says(permits: MemoryPermits) -> None:
    """And then refuses with when to come back."""

    @rate_limit("2/minute", store=permits)
    def look(user: str) -> str:
        """Look."""
        return f"looked {user}"

    assert outcomes(look, ("ann",), ("bob",), ("ann",)) == ["looked ann", "looked bob", "refused"]
    with pytest.raises(RateLimitedError) as refused:
        look("ann")
    assert refused.value.retry_after == pytest.approx(30, abs=0.1)
    assert "its limit is used up; come again in 30 s" in str(refused.value)
    assert look.__doc__ == "Look."


def test_each_client_has_its_own(permits: MemoryPermits) -> None:
    """By template, and by function."""

    @rate_limit("1/minute", client="{user}", store=permits)
    def by_template(user: str) -> str:
        return user

    @rate_limit("1/minute", client=lambda user: user[0], store=permits)
    def by_function(user: str) -> str:
        return user

    assert outcomes(by_template, ("ann",), ("bob",), ("ann",), ("abe",)) == ["ann", "bob", "refused", "abe"]
    assert outcomes(by_function, ("ann",), ("bob",), ("abe",)) == ["ann", "bob", "refused"]


@pytest.mark.parametrize("client", ["{user}", None])
def test_each_role_has_its_own_limit(permits: MemoryPermits, client: str | None) -> None:
    """Per client of a role, or for all of a role together."""

    @rate_limit({"free": "1/minute", "premium": "3/minute"}, client=client, role="{role}", store=permits)
    def look(user: str, role: str) -> str:
        return role

    assert outcomes(look, *[("ann", "premium")] * 4) == ["premium"] * 3 + ["refused"]
    again = "refused" if client is None else "free"
    assert outcomes(look, ("bob", "free"), ("eve", "free"), ("bob", "free")) == ["free", again, "refused"]


def test_a_role_that_is_not_declared_is_told(permits: MemoryPermits) -> None:
    """It would be without a limit; ``*`` has one for the others."""

    @rate_limit({"free": "1/minute"}, client="{user}", role="{role}", store=permits)
    def strict(user: str, role: str) -> str:
        return role

    with pytest.raises(ConfigurationError, match="role 'gold' has no limit; add it to free, or"):
        strict("ann", "gold")

    @rate_limit({"free": "1/minute", "*": "2/minute"}, role=lambda user, role: role, store=permits)
    def open_to_all(user: str, role: str) -> str:
        return role

    assert outcomes(open_to_all, *[("ann", "gold")] * 3) == ["gold", "gold", "refused"]
    assert outcomes(open_to_all, *[("ann", "")] * 3) == ["", "", "refused"]
    assert outcomes(open_to_all, *[("ann", "free")] * 2) == ["free", "refused"]


def test_async_functions_are_limited_too(permits: MemoryPermits) -> None:
    """And stay async."""

    @rate_limit("1/minute", client="{user}", store=permits)
    async def look(user: str) -> str:
        return user

    assert inspect.iscoroutinefunction(look)
    assert outcomes(look, ("ann",), ("ann",), ("bob",)) == ["ann", "refused", "bob"]


def test_a_fallback_answers_instead(permits: MemoryPermits) -> None:
    """Sync and async, with the same arguments."""

    async def later(user: str) -> str:
        return f"later {user}"

    @rate_limit("1/minute", store=permits, fallback=lambda user: f"not now {user}")
    def look(user: str) -> str:
        return user

    @rate_limit("1/minute", store=permits, fallback=later)
    async def alook(user: str) -> str:
        return user

    assert outcomes(look, ("ann",), ("ann",)) == ["ann", "not now ann"]
    assert outcomes(alook, ("ann",), ("ann",)) == ["ann", "later ann"]


def test_calls_may_wait_for_their_turn() -> None:
    """Paced, not refused."""

    @rate_limit("20/second burst=1", store=MemoryPermits(), max_wait=5)
    def look() -> float:
        return time.monotonic()

    times = [look() for _ in range(4)]
    assert times[-1] - times[0] > 0.14


def test_a_call_may_cost_more(permits: MemoryPermits) -> None:
    """By its arguments."""

    @rate_limit("3/minute", cost=lambda size: size, store=permits)
    def send(size: int) -> int:
        return size

    assert outcomes(send, (2,), (2,), (1,)) == [2, "refused", 1]
    with pytest.raises(RateLimitedError, match="costs more than its limit can ever admit") as refused:
        send(4)
    assert refused.value.retry_after is None


def test_two_functions_do_not_share_a_limit(permits: MemoryPermits) -> None:
    """Unless they are given one name."""

    def made(name: str | None) -> Any:
        @rate_limit("1/minute", store=permits, name=name)
        def look() -> str:
            return "looked"

        return look

    assert [*outcomes(made("a"), ()), *outcomes(made("b"), (), ())] == ["looked", "looked", "refused"]
    assert outcomes(made("a"), ()) == ["refused"]
    assert [*outcomes(made(None), ()), *outcomes(made(None), ())] == ["looked", "refused"]


def test_a_store_that_is_down_decides_as_declared() -> None:
    """Let through, or refuse and say why."""

    @rate_limit("1/minute", store=Away())
    def easy() -> str:
        return "done"

    @rate_limit("1/minute", store=Away(), on_store_down="refuse")
    def strict() -> str:
        return "done"

    assert easy() == "done"
    with pytest.raises(RateLimitedError, match="the permit store does not answer"):
        strict()


def test_the_rules_of_a_limiter_may_decide(permits: MemoryPermits) -> None:
    """They know the function by its name."""
    rules = FixedRules(Rule(id="reports", endpoint="reports.build", client="*", limits="1/minute"))

    @rate_limit(limiter=Limiter(rules, permits), client="{user}", name="reports.build")
    def build(user: str) -> str:
        return user

    assert outcomes(build, ("ann",), ("ann",), ("bob",)) == ["ann", "refused", "bob"]


def test_the_applications_store_is_found_late(permits: MemoryPermits) -> None:
    """A function is decorated at import, and the store is named afterwards."""
    from taskguard.downstream import desk

    @rate_limit("1/minute")
    def look() -> str:
        return "looked"

    desk.use(lambda: permits)
    try:
        assert outcomes(look, (), ()) == ["looked", "refused"]
        other = MemoryPermits(ManualClock())
        desk.use(lambda: other)
        assert outcomes(look, (), ()) == ["looked", "refused"]
        assert len(other)
    finally:
        desk.use(None)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({}, "give either limits"),
        ({"limits": "0/minute"}, "0 admits nothing"),
        ({"limits": "fast"}, "'fast' is not a rate"),
        ({"limits": {"free": "1/s"}}, "need the roles, and role="),
        ({"limits": {}, "role": "{user}"}, "need the roles"),
        ({"limits": "1/s", "client": "{nobody}"}, "names 'nobody'"),
        ({"limits": "1/s", "cost": -1}, "cost: -1"),
        ({"limits": "1/s", "max_wait": -1}, "max_wait: -1"),
        ({"limits": "1/s", "fallback": 7}, "fallback 7 cannot be called"),
    ],
)
def test_what_cannot_work_fails_where_it_is_declared(given: dict[str, Any], complaint: str) -> None:
    """With the name of the function."""

    def look(user: str) -> None: ...

    with pytest.raises(ConfigurationError) as failure:
        rate_limit(**given)(look)
    assert complaint in str(failure.value)
