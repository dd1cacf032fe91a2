"""Scenes for eager mode: what tasks do when they are called here and now, on a stage of either base class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from celery import Celery, Task, chain, chord, group, signals
from celery.exceptions import Ignore, Reject

import taskguard
from taskguard import ReliableTask
from taskguard.record import Record, State


@dataclass
class Stage:
    """One eager application and what its tasks did."""

    app: Celery
    base: type[Task]
    log: list[Any] = field(default_factory=list)

    def task(self, function: Callable[..., Any] | None = None, **options: Any) -> Any:
        declare = self.app.task(base=self.base, shared=False, **options)
        return declare if function is None else declare(function)

    def dead(self) -> list[Record]:
        return list(self.app.taskguard.store.scan(State.DEAD))  # type: ignore[attr-defined]


def stage(base: type[Task], namespace: str) -> Stage:
    """An application whose every ``delay`` runs at once."""
    app = Celery(f"eager-{namespace}", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.task_always_eager = True
    if issubclass(base, ReliableTask):
        taskguard.install(app, store="memory://", namespace=namespace)
    return Stage(app, base)


def shown(result: Any) -> tuple[str, str]:
    """A result as a caller sees it."""
    return result.state, repr(result.result)


# -- as plain Celery ---------------------------------------------------------------------------------------------------


def returns(s: Stage) -> Any:
    @s.task
    def add(x: int, y: int = 1) -> int:
        s.log.append("run")
        return x + y

    return [shown(add.delay(1)), shown(add.delay(1, y=5)), shown(add.apply((2, 3))), add(4, 5)]


def fails(s: Stage) -> Any:
    @s.task
    def broken() -> None:
        s.log.append("run")
        raise LookupError("no such card")

    return shown(broken.delay())


def propagates(s: Stage) -> Any:
    @s.task
    def broken() -> None:
        raise LookupError("no such card")

    with pytest.raises(LookupError) as caught:
        broken.apply(throw=True)
    with pytest.raises(LookupError):
        broken.delay().get()
    return repr(caught.value)


def retries_and_succeeds(s: Stage) -> Any:
    @s.task(bind=True, max_retries=3)
    def flaky(self: Any, failures: int) -> str:
        s.log.append(self.request.retries)
        if self.request.retries < failures:
            raise self.retry(countdown=3600, exc=OSError("bank down"))
        return "paid"

    return [shown(flaky.delay(0)), shown(flaky.delay(2)), shown(flaky.delay(3))]


def retries_in_vain(s: Stage) -> Any:
    @s.task(bind=True, max_retries=2)
    def flaky(self: Any) -> None:
        s.log.append(self.request.retries)
        self.retry(countdown=3600, exc=OSError("bank down"))

    return shown(flaky.delay())


def retries_in_vain_without_a_cause(s: Stage) -> Any:
    @s.task(bind=True, max_retries=1, name="shop.flaky")
    def flaky(self: Any) -> None:
        s.log.append(self.request.retries)
        self.retry()

    return shown(flaky.apply(task_id="the-id"))


def retries_with_other_arguments(s: Stage) -> Any:
    @s.task(bind=True)
    def downwards(self: Any, n: int, step: int = 1) -> str:
        s.log.append((n, step, self.request.retries))
        if n > 0:
            self.retry(args=(n - step,), kwargs={"step": step}, countdown=1)
        return "ground"

    return shown(downwards.delay(4, step=2))


def retries_with_a_bound_of_its_own(s: Stage) -> Any:
    @s.task(bind=True, max_retries=9)
    def flaky(self: Any) -> None:
        s.log.append(self.request.retries)
        self.retry(max_retries=1, exc=OSError("bank down"))

    return shown(flaky.delay())


def retries_for_ever(s: Stage) -> Any:
    @s.task(bind=True, max_retries=None)
    def flaky(self: Any) -> str:
        s.log.append(self.request.retries)
        if self.request.retries < 7:
            self.retry()
        return "at last"

    return shown(flaky.delay())


def retries_by_itself(s: Stage) -> Any:
    @s.task(bind=True, autoretry_for=(ConnectionError,), max_retries=2, retry_backoff=5, retry_jitter=False)
    def flaky(self: Any, error: str) -> None:
        s.log.append(self.request.retries)
        raise {"connection": ConnectionResetError("gone"), "value": ValueError("never")}[error]

    return [shown(flaky.delay("connection")), shown(flaky.delay("value"))]


def retries_not_what_it_must_not(s: Stage) -> Any:
    @s.task(bind=True, autoretry_for=(OSError,), dont_autoretry_for=(FileNotFoundError,), max_retries=2)
    def flaky(self: Any, there: bool) -> None:
        s.log.append(self.request.retries)
        raise PermissionError("no") if there else FileNotFoundError("no")

    return [shown(flaky.delay(True)), shown(flaky.delay(False))]


def retries_with_options(s: Stage) -> Any:
    @s.task(bind=True, autoretry_for=(OSError,), retry_kwargs={"max_retries": 1, "countdown": 1})
    def flaky(self: Any) -> None:
        s.log.append(self.request.retries)
        raise OSError("bank down")

    return shown(flaky.delay())


def throws_what_is_expected(s: Stage) -> Any:
    @s.task(throws=(LookupError,))
    def expected() -> None:
        raise LookupError("no such card")

    return shown(expected.delay())


def ignores(s: Stage) -> Any:
    @s.task
    def ignored() -> None:
        raise Ignore

    return ignored.delay().state


def rejects(s: Stage) -> Any:
    @s.task
    def rejected() -> None:
        raise Reject("not mine")

    return shown(rejected.delay())[0]


def calls_hooks(s: Stage) -> Any:
    class Loud(s.base):  # type: ignore[name-defined,misc]
        abstract = True

        def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
            s.log.append(("before_start", args, kwargs))

        def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
            s.log.append(("on_success", retval, args, kwargs))

        def on_failure(self, exc: BaseException, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            s.log.append(("on_failure", repr(exc), args, kwargs))

        def on_retry(self, exc: BaseException, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            s.log.append(("on_retry", repr(exc), args, kwargs))

        def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            s.log.append(("after_return", status, repr(retval), args, kwargs))

    @s.app.task(base=Loud, shared=False, bind=True, max_retries=1, name="shop.loud")
    def loud(self: Any, how: str, *, often: int = 0) -> str:
        if how == "fail":
            raise LookupError("no such card")
        if self.request.retries < often:
            self.retry(exc=OSError("bank down"), countdown=1)
        return "paid"

    return [shown(loud.delay("well")), shown(loud.delay("fail")), shown(loud.delay("again", often=1))]


def sends_signals(s: Stage) -> Any:
    @s.task(bind=True, max_retries=1, name="shop.signalled")
    def signalled(self: Any, how: str) -> str:
        if how == "fail":
            raise LookupError("no such card")
        if how == "retry" and not self.request.retries:
            self.retry(exc=OSError("bank down"), countdown=1)
        return "paid"

    names = ("task_prerun", "task_postrun", "task_success", "task_failure", "task_retry")
    receivers = []
    for name in names:

        def receive(sender: Any = None, name: str = name, **_: Any) -> None:
            if getattr(sender, "app", None) is s.app:
                s.log.append(name)

        getattr(signals, name).connect(receive, weak=False)
        receivers.append((getattr(signals, name), receive))
    try:
        return [shown(signalled.delay(how)) for how in ("well", "fail", "retry")]
    finally:
        for signal, receive in receivers:
            signal.disconnect(receive)


def links(s: Stage) -> Any:
    @s.task
    def add(x: int, y: int) -> int:
        s.log.append(("add", x, y))
        return x + y

    @s.task
    def broken(x: int) -> None:
        raise LookupError(x)

    @s.task
    def mourn(*args: Any) -> None:
        s.log.append("mourn")

    return [
        shown(add.apply_async((1, 2), link=add.s(10))),
        shown(broken.apply_async((1,), link_error=mourn.s())),
    ]


def chains(s: Stage) -> Any:
    @s.task
    def add(x: int, y: int) -> int:
        s.log.append(("add", x, y))
        return x + y

    return [
        shown(chain(add.s(1, 2), add.s(3), add.s(4)).apply_async()),
        chain(add.s(1, 2), add.si(5, 5)).apply().get(),
        sorted(group(add.s(n, n) for n in range(3)).apply_async().get()),
    ]


def chords(s: Stage) -> Any:
    @s.task
    def double(x: int) -> int:
        return 2 * x

    @s.task
    def total(numbers: list[int]) -> int:
        s.log.append(numbers)
        return sum(numbers)

    return [
        chord([double.s(n) for n in range(4)])(total.s()).get(),
        (group(double.s(1), double.s(2)) | total.s()).apply().get(),
        double.map([1, 2, 3]).apply().get(),
        total.starmap([([1, 2],), ([3],)]).apply().get(),
        double.chunks([(1,), (2,), (3,)], 2).group().apply().get(),
    ]


def replaces(s: Stage) -> Any:
    @s.task
    def double(x: int) -> int:
        return 2 * x

    @s.task(bind=True)
    def delegating(self: Any, x: int) -> None:
        s.log.append("delegating")
        self.replace(double.s(x))

    return shown(delegating.apply((4,)))


SCENES: list[Callable[[Stage], Any]] = [
    returns,
    fails,
    propagates,
    retries_and_succeeds,
    retries_in_vain,
    retries_in_vain_without_a_cause,
    retries_with_other_arguments,
    retries_with_a_bound_of_its_own,
    retries_for_ever,
    retries_by_itself,
    retries_not_what_it_must_not,
    retries_with_options,
    throws_what_is_expected,
    ignores,
    rejects,
    calls_hooks,
    sends_signals,
    links,
    chains,
    chords,
    replaces,
]
