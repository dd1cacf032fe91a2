"""Eager mode: the same task, called here and now, gives what plain Celery gives, and goes through the gate."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery, Task
from freezegun import freeze_time

from taskguard import Budget, DeadlineExceeded, KeyReused, ReliableTask, Retry, RetryEvent
from taskguard.record import Reason, State
from tests.integration.scenes import SCENES, Stage, shown, stage


@pytest.fixture
def reliable(namespace: str) -> Stage:
    """Eager mode with taskguard."""
    return stage(ReliableTask, namespace)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_eager_mode_is_as_in_plain_celery(scene: Callable[[Stage], Any], namespace: str) -> None:
    """Results, states, retries, hooks and signals: the same acts give the same play."""
    plain, reliable = stage(Task, namespace), stage(ReliableTask, namespace)
    expected = scene(plain)
    assert scene(reliable) == expected
    assert reliable.log == plain.log


# -- and through the gate ----------------------------------------------------------------------------------------------


def test_a_duplicate_is_given_the_result_and_does_not_run(reliable: Stage) -> None:
    """However its arguments are spelt, and under its own id."""

    @reliable.task(idempotency_key="charge:{order_id}")
    def charge(order_id: int, cents: int = 100) -> dict[str, int]:
        reliable.log.append(order_id)
        return {"charged": cents}

    first, second = charge.delay(7), charge.delay(order_id=7)
    assert first.id != second.id
    assert first.get() == second.get() == {"charged": 100}
    assert reliable.log == [7]


def test_a_key_with_other_arguments_fails(reliable: Stage) -> None:
    """The first call's result is not handed to a call that meant something else."""

    @reliable.task(idempotency_key="charge:{order_id}")
    def charge(order_id: int, cents: int) -> int:
        return cents

    charge.delay(7, 100)
    with pytest.raises(KeyReused):
        charge.delay(7, 999).get()
    assert [record.key for record in reliable.dead()] == ["charge:7"]


def test_a_key_can_be_given_with_the_call(reliable: Stage) -> None:
    """``apply_async`` and ``apply`` know ``idempotency_key``."""

    @reliable.task
    def charge() -> int:
        reliable.log.append("run")
        return 1

    for call in (charge.apply_async, charge.apply):
        assert call(idempotency_key="mine").get() == 1
    assert reliable.log == ["run"]


@pytest.mark.parametrize("how", ["seconds", "instant", "expires"])
def test_what_is_late_does_not_run(reliable: Stage, how: str) -> None:
    """A deadline that has passed by the time the body could begin is a dead letter."""

    @reliable.task
    def charge() -> None:
        reliable.log.append("run")

    past = datetime.now(UTC) - timedelta(seconds=5)
    options: dict[str, Any] = {
        "seconds": {"deadline": 0},
        "instant": {"deadline": past},
        "expires": {"expires": past},
    }[how]
    result = charge.apply_async(**options)
    assert result.state == "FAILURE"
    assert isinstance(result.result, DeadlineExceeded)
    assert reliable.log == []
    assert Reason.EXPIRED in reliable.dead()[0].failure


def test_the_declared_deadline_is_counted_from_the_call(reliable: Stage) -> None:
    """`remaining` is what is left of it in the run."""

    @reliable.task(bind=True, deadline=300)
    def charge(self: Any) -> float:
        return self.remaining()

    with freeze_time("2026-01-02 03:04:05"):
        assert charge.delay().get() == 300
        assert charge.apply_async(deadline=60).get() == 60
        assert charge.apply().get() == 300


def test_the_earlier_deadline_is_inherited_inside(reliable: Stage) -> None:
    """What a run starts is worth no more time than the run itself."""

    @reliable.task(bind=True)
    def inner(self: Any) -> float | None:
        return self.remaining()

    @reliable.task(bind=True)
    def outer(self: Any, deadline: float | None) -> Any:
        return inner.apply_async(deadline=deadline).result

    with freeze_time("2026-01-02 03:04:05"):
        assert outer.apply_async((None,), deadline=60).get() == 60
        assert outer.apply_async((10,), deadline=60).get() == 10
        assert outer.apply_async((90,), deadline=60).get() == 60
        assert outer.delay(None).get() is None


def test_a_failure_leaves_a_dead_letter(reliable: Stage) -> None:
    """With its reason: permanent at once, or retries used up."""

    @reliable.task(max_retries=1)
    def broken(error: str) -> None:
        reliable.log.append(error)
        raise ValueError("never") if error == "value" else TimeoutError("bank")

    broken.delay("value")
    broken.delay("timeout")
    reasons = [record.failure for record in reliable.dead()]
    assert Reason.PERMANENT_ERROR in reasons[0]
    assert Reason.MAX_RETRIES in reasons[1]
    assert reliable.log == ["value", "timeout", "timeout"]


def test_a_retry_policy_decides(reliable: Stage) -> None:
    """How often, and what; each wait is told to ``on_retry``."""
    told: list[RetryEvent] = []
    policy = Retry(max_retries=2, first_delay=10, jitter="none", retry_on=(KeyError,), on_retry=told.append)

    @reliable.task(retry=policy, name="shop.flaky")
    def flaky(error: str) -> None:
        reliable.log.append(error)
        raise {"key": KeyError("k"), "value": ValueError("v")}[error]

    assert shown(flaky.delay("key")) == ("FAILURE", "KeyError('k')")
    assert shown(flaky.delay("value")) == ("FAILURE", "ValueError('v')")
    assert reliable.log == ["key", "key", "key", "value"]
    assert [(event.task, event.attempt, event.delay) for event in told] == [
        ("shop.flaky", 1, 10),
        ("shop.flaky", 2, 20),
    ]


def test_a_retry_policy_listens_to_retry_after(reliable: Stage) -> None:
    """The other side's wish is the least wait."""

    class TooManyRequests(Exception):
        status_code, retry_after = 429, 40

    told: list[RetryEvent] = []

    @reliable.task(retry=Retry(max_retries=1, first_delay=1, jitter="none", on_retry=told.append))
    def flaky() -> None:
        raise TooManyRequests

    flaky.delay()
    assert [event.delay for event in told] == [40]


def test_a_retry_budget_ends_the_retries(reliable: Stage) -> None:
    """At most a share of the first tries is retried, whatever each task may."""

    @reliable.task(retry=Retry(max_retries=9, budget=Budget(ratio=0.5, min_per_second=0, window=60)), bind=True)
    def flaky(self: Any) -> None:
        reliable.log.append(self.request.retries)
        raise TimeoutError("bank")

    for _ in range(4):
        flaky.delay()
    assert reliable.log == [0, 0, 1, 0, 0, 1]


def test_a_dead_letter_is_not_run_again_under_its_key(reliable: Stage) -> None:
    """Another call of the key begins another life; the letter stays."""

    @reliable.task(idempotency_key="charge:{order_id}")
    def charge(order_id: int) -> str:
        reliable.log.append(order_id)
        if len(reliable.log) == 1:
            raise ValueError("no such card")
        return "paid"

    assert charge.delay(7).state == "FAILURE"
    assert charge.delay(7).get() == "paid"
    assert len(reliable.dead()) == 1


def test_the_run_sees_its_custody(reliable: Stage) -> None:
    """Token, execution key and attempt; a later attempt has a later token."""

    @reliable.task(bind=True, idempotency_key="charge:{order_id}", max_retries=1, name="shop.charge")
    def charge(self: Any, order_id: int) -> list[Any]:
        reliable.log.append((self.custody.key, self.custody.attempt, self.custody.token, self.custody_lost))
        if self.custody.attempt == 1:
            self.retry(countdown=0)
        return []

    charge.delay(7)
    (key, first, token, lost), (_, second, later, _) = reliable.log
    namespace = reliable.app.taskguard.settings.namespace  # type: ignore[attr-defined]
    assert (key, first, second, lost) == (f"{namespace}:shop.charge:charge:7", 1, 2, False)
    assert 0 < token < later


def test_a_plain_call_runs_without_custody(reliable: Stage) -> None:
    """A task is a function, too: no store, no key, token 0."""

    @reliable.task(bind=True, idempotency_key="charge:{order_id}")
    def charge(self: Any, order_id: int) -> tuple[int, bool, float | None]:
        return self.custody.token, self.custody_lost, self.remaining()

    assert [charge(7), charge(7)] == [(0, False, None)] * 2


def test_without_a_store_eager_mode_uses_process_memory(namespace: str) -> None:
    """A project's tests need no configuration."""
    app = Celery(f"eager-{namespace}", broker="memory://", set_as_current=False)
    app.conf.update(task_always_eager=True, taskguard_namespace=namespace)

    @app.task(base=ReliableTask, shared=False, idempotency_key="k")
    def charge() -> int:
        return 1

    assert charge.delay().get() == 1
    assert app.taskguard.store.find(  # type: ignore[attr-defined]
        next(iter(app.taskguard.store.scan(State.DONE))).id  # type: ignore[attr-defined]
    )
