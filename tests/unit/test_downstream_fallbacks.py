"""What is given instead of an answer: in order, for declared errors only, and never hiding what went wrong."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from taskguard.downstream.caching import LastAnswers
from taskguard.errors import CircuitOpenError, ConfigurationError, DownstreamTimeout, RateLimitedError
from taskguard.policies import (
    Alternative,
    CircuitBreaker,
    Default,
    Degraded,
    Fallback,
    FallbackEvent,
    FixedWindow,
    QueueForLater,
    Retry,
    Stale,
    Timeout,
)
from tests.clocks import ManualClock
from tests.unit.permithouse import PermitHouse


@pytest.fixture
def permits() -> PermitHouse:
    return PermitHouse()


def fail(*_: Any, **__: Any) -> Any:
    raise ConnectionError("down")


def test_the_first_part_that_can_answers(permits: PermitHouse) -> None:
    """A part that fails hands on; the callback hears which one answered, and why."""
    told: list[FallbackEvent] = []
    bank = permits.downstream(
        fallback=Fallback(
            Stale(max_age=60),
            Alternative(fail),
            Degraded(lambda error, amount: (str(error), amount)),
            Default("never"),
            on=ConnectionError,
            on_fallback=told.append,
        )
    )
    assert bank.call(fail, 5) == ("down", 5)
    assert [(event.downstream, event.kind, str(event.error)) for event in told] == [("bank", "degraded", "down")]
    assert bank.stats().fallback_total == 1
    assert [event.key for event in permits.told("fallback")] == ["bank"]


def test_only_declared_errors_lead_to_it(permits: PermitHouse) -> None:
    """Every other one is raised as it is; by default a refusal, a timeout and the circuit's expected ones are."""
    bank = permits.downstream(fallback=Fallback(Default("stand-in")), rate=FixedWindow(3, per=60))
    with pytest.raises(ConnectionError):
        bank.call(fail)

    async def hang() -> None:
        await asyncio.sleep(10)

    def late() -> None:
        raise DownstreamTimeout("late")

    assert bank.call(late) == "stand-in"
    bank.call(lambda: None)
    assert bank.call(lambda: "real") == "stand-in"
    guarded = permits.downstream(
        "guarded", fallback=Fallback(Default("stand-in")), circuit=CircuitBreaker(expected=(ConnectionError,))
    )
    assert guarded.call(fail) == "stand-in"
    with pytest.raises(ZeroDivisionError):
        guarded.call(lambda: 1 / 0)
    timed = permits.downstream("timed", fallback=Fallback(Default("stand-in")), timeout=Timeout(total=0.02))
    assert asyncio.run(timed.acall(hang)) == "stand-in"


def test_when_nobody_answers_the_error_is_the_first_one(permits: PermitHouse) -> None:
    """With what each part said as notes."""

    def broken() -> None:
        raise ValueError("the other is down too")

    bank = permits.downstream(fallback=Fallback(Stale(max_age=5), Alternative(broken), on=ConnectionError))
    with pytest.raises(ConnectionError, match="down") as caught:
        bank.call(fail)
    assert caught.value.__notes__ == [
        "fallback stale: no earlier answer is kept",
        "fallback alternative: ValueError('the other is down too')",
    ]


def test_the_last_good_answer_to_the_same_question_is_kept(permits: PermitHouse) -> None:
    """By all arguments; with its age; not past its time."""
    clock = ManualClock()
    bank = permits.downstream(
        fallback=Fallback(
            Stale(max_age=60, cache=LastAnswers(clock=clock), with_age=True), Default(None), on=ConnectionError
        )
    )
    down = [False]

    def price(item: str, currency: str = "EUR") -> str:
        if down[0]:
            raise ConnectionError
        return f"{item} in {currency}"

    assert bank.call(price, "tea") == "tea in EUR"
    assert bank.call(price, "tea", currency="USD") == "tea in USD"
    down[0] = True
    clock.advance(60)
    assert bank.call(price, "tea") == ("tea in EUR", 60.0)
    assert bank.call(price, "tea", currency="USD") == ("tea in USD", 60.0)
    assert bank.call(price, "milk") is None
    clock.advance(0.001)
    assert bank.call(price, "tea") is None


def test_stale_answers_may_have_a_key_of_their_own(permits: PermitHouse) -> None:
    """A template or a function over the arguments."""
    bank = permits.downstream(fallback=Fallback(Stale(max_age=60, key="{item}"), on=ConnectionError))
    answers = iter(["fresh"])

    def price(item: str, trace: object) -> str:
        try:
            return next(answers)
        except StopIteration:
            raise ConnectionError from None

    assert bank.call(price, "tea", object()) == "fresh"
    assert bank.call(price, "tea", object()) == "fresh"


def test_work_may_be_queued_for_later(permits: PermitHouse) -> None:
    """A task or signature is published with the arguments, a function is called; the declared answer is given."""
    published: list[tuple[Any, ...]] = []

    class Task:
        def apply_async(self, args: Any, kwargs: Any) -> None:
            published.append((args, kwargs))

    by_task = permits.downstream(fallback=Fallback(QueueForLater(Task(), answer="queued"), on=ConnectionError))
    assert by_task.call(fail, 1, item="tea") == "queued"
    assert published == [((1,), {"item": "tea"})]
    kept: list[int] = []
    by_function = permits.downstream("f", fallback=Fallback(QueueForLater(kept.append), on=ConnectionError))
    assert by_function.call(fail, 7) is None
    assert kept == [7]


def test_async_parts_are_awaited_by_acall_and_refused_by_call(permits: PermitHouse) -> None:
    """A coroutine that nobody awaits would be no answer."""

    async def other(amount: int) -> int:
        return amount + 1

    async def afail(amount: int) -> int:
        raise ConnectionError

    bank = permits.downstream(fallback=Fallback(Alternative(other), on=ConnectionError))
    assert asyncio.run(bank.acall(afail, 5)) == 6
    with pytest.raises(ConnectionError) as caught:
        bank.call(fail, 5)
    assert "use acall" in caught.value.__notes__[0]


def test_an_open_circuit_is_answered_by_the_fallback(permits: PermitHouse) -> None:
    """The fallback is round all: refused calls too get an answer, and nothing reaches the downstream."""
    bank = permits.downstream(
        circuit=CircuitBreaker(minimum_calls=1), fallback=Fallback(Default("stand-in"), on=(CircuitOpenError,))
    )
    with pytest.raises(ConnectionError):
        bank.call(fail)
    assert bank.call(fail) == "stand-in"


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Fallback(), "no part answers"),
        (lambda: Fallback(5), "is no part"),  # type: ignore[arg-type]
        (lambda: Fallback(Default(1), Default(2)), "put it last"),
        (lambda: Fallback(Default(1), on=5), "no exception class"),  # type: ignore[arg-type]
        (lambda: Fallback(Alternative(5)), "cannot be called"),  # type: ignore[arg-type]
        (lambda: Fallback(Stale(max_age=0)), "keeps nothing"),
        (lambda: Fallback(QueueForLater(5)), "cannot be called"),
    ],
)
def test_a_fallback_that_cannot_work_is_a_mistake(make: Any, complaint: str) -> None:
    """Told where it is declared."""
    with pytest.raises(ConfigurationError, match=complaint):
        make()


def test_a_refusal_of_another_downstream_inside_is_not_this_ones_business(permits: PermitHouse) -> None:
    """Unless it is declared: Refused is, whoever refused."""
    inner = permits.downstream("inner", rate=FixedWindow(1, per=60))
    inner.call(lambda: None)
    outer = permits.downstream("outer", fallback=Fallback(Default("stand-in"), on=ConnectionError))
    with pytest.raises(RateLimitedError):
        outer.call(lambda: inner.call(lambda: None))


def test_a_good_answer_that_cannot_be_kept_is_still_given(
    permits: PermitHouse, caplog: pytest.LogCaptureFixture
) -> None:
    """Arguments without a form make no key: that is told, and the call has gone well."""
    bank = permits.downstream(fallback=Fallback(Stale(max_age=60), on=ConnectionError))
    assert bank.call(lambda lock: 5, threading.Lock()) == 5
    assert "cannot be kept for Stale" in caplog.text


def plain() -> int:
    """No async function."""
    return 5


async def awaited() -> int:
    """An async one."""
    return 5


@pytest.mark.parametrize("mode", ["acall of a plain function", "call of an async one"])
@pytest.mark.parametrize("timeout", [None, 5])
def test_a_function_of_the_wrong_kind_is_a_mistake_that_nothing_hides(
    permits: PermitHouse, mode: str, timeout: float | None
) -> None:
    """It is neither failure nor success, is not tried again, and no fallback answers it."""
    bank = permits.downstream(
        circuit=CircuitBreaker(minimum_calls=1),
        timeout=timeout,
        retry=Retry(max_retries=3, first_delay=0.001, retry_if=lambda exc: True),
        fallback=Fallback(Default("hidden"), on=Exception),
    )

    def mistaken() -> object:
        if mode.startswith("acall"):
            return asyncio.run(bank.acall(plain))  # type: ignore[arg-type]
        return bank.call(awaited)

    with pytest.raises(ConfigurationError, match=r"is not async; use call|is async; use acall"):
        mistaken()
    stats = bank.stats()
    assert (stats.circuit_breaker_failures_total, stats.circuit_breaker_success_total) == (0, 0)
    assert (stats.fallback_total, stats.retry_attempts_total) == (0, 0)
    assert stats.circuit_breaker_state == "closed"
