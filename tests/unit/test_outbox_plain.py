"""Plain calls: sent the short way, they are the message that Celery makes; and what is not plain goes Celery's way."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import celery
import pytest
from celery import Celery, signals
from celery.utils.saferepr import saferepr
from hypothesis import example, given
from hypothesis import strategies as st
from kombu import Exchange, Queue
from sqlalchemy import create_engine

from taskguard import ReliableTask, install
from taskguard.celery.composing import Composed, compose
from taskguard.celery.plain import PlainCalls, flat_repr
from taskguard.envelope import Envelope, ready_item
from taskguard.stores.sql import SQLStore

NOWHERE = "redis://127.0.0.1:1/0"

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=40)
values = st.recursive(
    scalars | st.dates() | st.decimals(allow_nan=False) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
stamps = st.fixed_dictionaries(
    {},
    optional={
        "key": st.sampled_from(["k", "", "\ud800", 5, None]),
        "deadline_ms": st.sampled_from([1, 2**80, float("nan"), None, "x"]),
        "fp": st.just("f"),
        "seq": st.integers(-1, 2),
    },
)
headers = st.dictionaries(st.sampled_from(["trace", "shadow"]), st.text(max_size=4), max_size=2)
headers |= st.fixed_dictionaries({}, optional={"taskguard": stamps, "trace": st.text(max_size=4)})
plain_options: dict[str, Any] = {
    "task_id": st.uuids().map(str),
    "queue": st.sampled_from(["fast", "celery", None]),
    "priority": st.integers(0, 9) | st.none(),
    "shadow": st.text(max_size=5),
    "time_limit": st.integers(1, 99),
    "soft_time_limit": st.integers(1, 99) | st.none(),
    "ignore_result": st.booleans(),
    "deadline": st.floats(1e9, 1.1e9) | st.none(),
    "idempotency_key": st.sampled_from(["mine", None]),
    "ordering_key": st.integers(0, 3) | st.none(),
    "headers": headers,
}
other_options: dict[str, Any] = {
    "queue": st.sampled_from(["apart", Queue("own", Exchange("own"), routing_key="own")]),
    "serializer": st.sampled_from(["json", "pickle", None]),
    "compression": st.sampled_from(["gzip", None]),
    "expires": st.sampled_from([None, "2999-01-01"]),
    "root_id": st.just("root"),
    "link": st.just(()),
    "exchange": st.sampled_from([None, "other"]),
    "delivery_mode": st.sampled_from([None, 1]),
}
options = st.fixed_dictionaries({}, optional=plain_options)
options |= st.fixed_dictionaries({}, optional={**plain_options, **other_options})

EVERYTHING: dict[str, Any] = {
    "task_id": "t", "queue": "fast", "priority": 4, "shadow": "other", "time_limit": 5, "soft_time_limit": 3,
    "ignore_result": True, "deadline": 9, "idempotency_key": "mine", "ordering_key": 2, "headers": {"trace": "t"},
}  # fmt: skip
"""What a plain call may say."""


def make_app(**conf: Any) -> Celery:
    """An application without a broker in reach."""
    app = Celery("plain", broker=NOWHERE, backend=NOWHERE, set_as_current=False)
    app.conf.update(task_queues=[Queue("celery"), Queue("fast"), Queue("apart", Exchange("apart", "topic"), "a.b")])
    app.conf.update(conf)
    install(app, store=conf.get("taskguard_store", "sqlite:///nowhere.sqlite3"), namespace="plain")

    @app.task(name="charge", base=ReliableTask, shared=False, typing=False, deadline=3600)
    def charge(*args: Any, **kwargs: Any) -> None: ...

    return app


@pytest.fixture(scope="module")
def app() -> Iterator[Celery]:
    """One for all."""
    app = make_app()
    sent(app, (), None, {})
    yield app
    app.close()


def sent(app: Celery, args: Any, kwargs: Any, given: dict[str, Any]) -> tuple[Any, list[Composed]]:
    """The result of a call, and its message."""
    return compose(app, lambda producer: app.tasks["charge"].apply_async(args, kwargs, producer=producer, **given))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, *, off: bool = False) -> Iterator[list[bool]]:
    """Which calls were plain; *off*: none is."""
    found: list[bool] = []
    call = PlainCalls.call

    def spy(self: PlainCalls, *args: Any) -> Any:
        made = None if off else call(self, *args)
        found.append(made is not None)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(PlainCalls, "call", spy)
        yield found


def parts(message: Composed) -> Any:
    """What there is of it, but for its deadline, which counts from the call, and the tag of its queue item."""
    envelope = message.envelope
    stamp = {name: value for name, value in envelope.headers["taskguard"].items() if name != "deadline_ms"}
    headers = {**envelope.headers, "taskguard": stamp}
    ready, bare = ready_item(message.wire), {"headers": {}, "properties": {}, "deadline_at": None}
    rested = Envelope.from_wire(message.wire).replace(**bare)
    properties = sorted(envelope.properties.items())
    return (
        envelope.replace(**bare),
        headers,
        properties,
        ready and ready[0],
        rested,
        message.due_at_ms,
        message.ordering,
    )


@given(st.lists(values, max_size=3).map(tuple), st.dictionaries(st.text(max_size=5), values, max_size=3), options)
@example((1,), {"card": "x" * 50}, {})
@example(("x" * 2000, "it's"), {"a": b"\xff"}, {"queue": "fast", "priority": 3})
@example((1, 2.5, None, True), {"a": "it's"}, EVERYTHING)
@example((), {}, {"headers": {"taskguard": {"key": "\ud800"}}})
@example((), {}, {"headers": {"taskguard": {"key": "mine", "seq": 2}}, "ignore_result": True})
def test_a_plain_call_is_the_message_that_celery_makes(app: Celery, args: Any, kwargs: Any, given: Any) -> None:
    """Whatever is said, either way gives the same message and the same result, or is refused alike."""
    given = {"task_id": "chosen", **given}
    monkeypatch = pytest.MonkeyPatch()
    outcomes: list[Any] = []
    deadlines: list[float | None] = []
    for off in (False, True):
        with counted(monkeypatch, off=off):
            try:
                result, [message] = sent(app, args, kwargs, {**given, "headers": dict(given.get("headers") or {})})
            except Exception as exc:
                outcomes.append((type(exc), str(exc)))
            else:
                outcomes.append(
                    (type(result), result.id, result.ignored, result.backend is app.backend, parts(message))
                )
                deadlines.append(message.envelope.deadline_at)
    assert repr(outcomes[0]) == repr(outcomes[1])
    assert deadlines[:1] == pytest.approx(deadlines[1:], abs=60)


@given(st.lists(scalars, max_size=4), st.dictionaries(scalars, scalars, max_size=4), st.integers(1, 200))
def test_flat_values_are_shown_as_celery_shows_them(given: list[Any], named: dict[Any, Any], most: int) -> None:
    """Or left to Celery."""
    for value in (given, tuple(given), named):
        assert flat_repr(value, most) in ("", saferepr(value, most))


def test_the_commonest_calls_are_plain(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments, a queue, an id, a key, an ordering key, a priority."""
    given: tuple[dict[str, Any], ...] = (
        {}, {"queue": "fast"}, {"task_id": "t"}, {"idempotency_key": "k"}, {"ordering_key": 4}, {"priority": 4},
        {"headers": {"trace": "t"}}, {"deadline": 5}, {"queue": Queue("apart2", Exchange("", "direct"))}, EVERYTHING,
    )  # fmt: skip
    with counted(monkeypatch) as plain:
        for each in given:
            sent(app, (1,), {"card": "x"}, each)
        sent(app, ([Decimal(1)],), None, {})
    assert plain == [True] * len(given) + [False], "values in values are shown as Celery shows them"


def test_an_id_is_a_random_uuid(app: Celery) -> None:
    """Of the fourth version, written as the library writes it."""
    for _ in range(50):
        result, _ = sent(app, (), None, {})
        made = uuid.UUID(result.id)
        assert (str(made), made.version, made.variant) == (result.id, 4, uuid.RFC_4122)


def test_what_is_more_goes_celerys_way(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Delays, links, other exchanges, compression, headers of Celery's own."""
    given: tuple[dict[str, Any], ...] = (
        {"link": app.tasks["charge"].s()}, {"queue": "apart"}, {"compression": "gzip"}, {"expires": 60},
        {"headers": {"retries": 3}}, {"exchange": "other", "routing_key": "r"}, {"root_id": "r"}, {"reply_to": "r"},
    )  # fmt: skip
    with counted(monkeypatch) as plain:
        for each in given:
            sent(app, (1,), {"card": "x"}, each)
        assert plain == [False] * len(given)
        _, [later] = sent(app, (1,), None, {"countdown": 60})
    assert later.due_at_ms is not None


def test_listeners_hear_of_every_message(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """And may change its headers, as ever."""

    def listen(headers: dict[str, Any], **_: Any) -> None:
        headers["heard"] = "yes"

    signals.before_task_publish.connect(listen)
    try:
        _, [message] = sent(app, (1,), None, {})
    finally:
        signals.before_task_publish.disconnect(listen)
    assert message.envelope.headers["heard"] == "yes"
    _, [message] = sent(app, (1,), None, {})
    assert "heard" not in message.envelope.headers


@pytest.mark.parametrize(
    ("routes", "expected"),
    [
        ({"charge": {"queue": "fast"}}, ("fast", True)),
        ({"char*": "fast"}, ("fast", True)),
        ({"other": {"queue": "fast"}}, ("celery", True)),
        ({"charge": {"queue": "fast", "priority": 3}}, ("fast", False)),
        ((lambda name, *args, **kwargs: {"queue": "fast"},), ("fast", False)),
    ],
)
def test_routes_are_followed(routes: Any, expected: tuple[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """The configured ones on the short way, a router of the user's own on Celery's; a call's own queue goes first."""
    app = make_app(task_routes=routes)
    sent(app, (1,), None, {})
    with counted(monkeypatch) as plain:
        _, [message] = sent(app, (1,), None, {})
        _, [other] = sent(app, (1,), None, {"queue": "celery"})
    assert (message.envelope.queue, plain[0]) == expected
    assert other.envelope.queue == "celery"
    app.close()


def test_what_is_configured_later_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default queue and the routes are asked for at each call, as Celery does, where it does."""

    def queues(*, off: bool) -> list[str]:
        app, found = make_app(), []
        with counted(monkeypatch, off=off):
            for later in ({}, {"task_default_queue": "fast"}, {"task_routes": {"charge": "celery"}}):
                app.conf.update(later)
                found.append(sent(app, (1,), None, {})[1][0].envelope.queue)
        app.close()
        return found

    assert queues(off=False) == queues(off=True)
    assert queues(off=False)[:2] == ["celery", "fast"]


def test_a_celery_with_its_own_way_of_sending_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass, or a library that wraps ``send_task``, is not passed by."""

    class Own(Celery):
        def send_task(self, *args: Any, **options: Any) -> Any:
            return super().send_task(*args, **options)

    app = Own("own", broker=NOWHERE, set_as_current=False)
    install(app, store="sqlite:///nowhere.sqlite3", namespace="plain")

    @app.task(name="charge", base=ReliableTask, shared=False)
    def charge() -> None: ...

    with counted(monkeypatch) as plain:
        sent(app, (), None, {})
        sent(app, (), None, {})
    assert plain == [False]
    app.close()


def test_a_fork_says_where_its_messages_come_from(app: Celery) -> None:
    """The process id in a message's origin is the sender's, and the tags of its queue items are its own."""

    def told() -> tuple[str, str]:
        item = json.loads((ready_item(sent(app, (1,), None, {})[1][0].wire) or (b"", b""))[1])
        return item["headers"]["origin"], item["properties"]["delivery_tag"]

    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, json.dumps(told()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    origin, tag = json.loads(os.read(read, 1000))
    os.close(read)
    os.close(write)
    own = told()
    assert (origin.partition("@")[0], own[0].partition("@")[0]) == (f"gen{child}", f"gen{os.getpid()}")
    assert tag != own[1]


def test_a_call_inside_a_run_names_its_parent(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which Celery knows."""
    task = app.tasks["charge"]
    task.push_request(id="outer", root_id="first", called_directly=False, children=[])
    celery._state._task_stack.push(task)
    try:
        with counted(monkeypatch) as plain:
            result, [message] = sent(app, (1,), None, {})
        children = task.request.children
    finally:
        celery._state._task_stack.pop()
        task.pop_request()
    found = message.envelope.headers
    assert (plain, found["parent_id"], found["root_id"], children) == ([False], "outer", "first", [result])


def test_rows_are_written_as_sqlalchemy_would(tmp_path: Path) -> None:
    """Where the caller's connection translates schemas, and where a name is what databases refuse."""
    url = f"sqlite:///{tmp_path / 'plain.sqlite3'}"
    app = make_app(taskguard_store=url)
    store = SQLStore.from_url(url, namespace="plain")
    store.ping()
    engine = create_engine(url).execution_options(schema_translate_map={None: "main"})
    with engine.begin() as connection:
        app.tasks["charge"].apply_async((1,), session=connection)
    with create_engine(url).begin() as connection:
        app.tasks["charge"].apply_async((1,), session=connection, task_id="a\\b\0c")
    assert [record.task_id for record in store.outbox.peek(9)][1:] == ["a\\b\0c"]
    for each in (engine, store, app):
        each.dispose() if each is engine else each.close()
