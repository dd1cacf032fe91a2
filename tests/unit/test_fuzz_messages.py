"""Hostile messages at a worker's reception: the real consumer, requests and gate, in this process."""

from __future__ import annotations

import json
import pickle
import uuid
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskguard.celery.flaws import flaw_of
from taskguard.record import Record, State
from tests.fuzz.reception import Reception

HEADERS = [
    "id", "task", "lang", "root_id", "parent_id", "group", "group_index", "retries", "timelimit", "argsrepr", "origin",
    "eta", "expires", "shadow", "stamps", "stamped_headers", "taskguard", "compression", "ignore_result", "x-death",
]  # fmt: skip
STAMP = ["key", "fp", "seq", "deadline_ms", "delay"]
EMBED = ["callbacks", "errbacks", "chain", "chord"]
HUGE = 10**400
ODD = [
    None, True, 0, -1, 2**31, 2**63, HUGE, 1e308, float("nan"), float("inf"), "", "x", "\ud800", "\x00", "a" * 70_000,
    [], [1], [1, 2], ["a", {}], [HUGE, 1], [float("nan"), 1], {}, {"a": 1}, {"__class__": "x"}, [{"task": "work"}],
    "0s",     [{"task": 5}], {"task": "work", "args": 5}, "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59",
]  # fmt: skip
odd = st.sampled_from(ODD) | st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*STAMP, *EMBED, "task"]), inner),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def reception() -> Reception:
    """One for the module: what it keeps of other messages does not matter."""
    return Reception(uuid.uuid4().hex)


def headers_of(marker: str, **changes: Any) -> dict[str, Any]:
    """The headers of a message to ``work`` with these changed."""
    return {"id": marker, "task": "work", "lang": "py", "retries": 0, **changes}


def body_of(marker: str, embed: Any = None) -> bytes:
    """The body of protocol 2."""
    return json.dumps([[marker], {}, embed or {}]).encode()


def ends_in_sight(reception: Reception, marker: str, body: Any, headers: Any, **options: Any) -> Record | None:
    """The worker lives, the broker's copy is gone, and the message is a record or has run. Returns the record."""
    delivery = reception.deliver(body, headers, **options)
    assert delivery.answers in (["ack"], ["reject"])
    # Of readable messages that share a made-up id, one stands for all: they are deliveries of one message.
    ids = {marker, headers.get("id") if isinstance(headers.get("id"), str) else marker}
    found = [r for r in reception.records() if r.task_id in ids or marker.encode() in (r.wire or b"")]
    found.sort(key=lambda record: record.task_id != marker and marker.encode() not in (record.wire or b""))
    assert found or marker in reception.runs
    return found[0] if found else None


def new_marker() -> str:
    """A task id, and an argument by which its message is known again."""
    return uuid.uuid4().hex


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", "\ud800"), ("task", []), ("task", {}), ("expires", HUGE), ("shadow", [1]), ("stamped_headers", 5),
        ("stamped_headers", ["a", {}]), ("timelimit", ["a", {}]), ("timelimit", [HUGE, 1]), ("retries", "x"),
        ("eta", "9999-12-31T23:59:59-23:59"), ("group", 5), ("id", "a" * 70_000), ("x-nested", [[[[]]]] * 2),
    ],
    ids=lambda value: repr(value)[:24],
)  # fmt: skip
def test_a_header_that_once_killed_a_worker_is_a_dead_letter(reception: Reception, name: str, value: Any) -> None:
    """Each ended the parent process, or its message, in silence. A header Celery does not read is let through."""
    marker = new_marker()
    record = ends_in_sight(reception, marker, body_of(marker), headers_of(marker, **{name: value}))
    assert record is not None
    assert record.state is (State.DONE if name == "x-nested" else State.DEAD)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", None), ("id", 5), ("id", []), ("eta", ""), ("eta", "0001-01-01T00:00:00+23:59"), ("timelimit", 5),
        ("timelimit", "x"), ("expires", {}), ("retries", HUGE), ("callbacks", 5), ("chord", "x"),
        ("task", "work\ud800"),
    ],
    ids=lambda value: repr(value)[:24],
)  # fmt: skip
def test_a_field_of_protocol_1_that_once_killed_a_worker_is_a_dead_letter(
    reception: Reception, name: str, value: Any
) -> None:
    """Celery makes headers of the fields of an old body, unchecked."""
    marker = new_marker()
    body = {"task": "work", "id": marker, "args": [marker], "kwargs": {}, name: value}
    record = ends_in_sight(reception, marker, json.dumps(body).encode(), {})
    assert record is not None
    assert record.state is State.DEAD


@pytest.mark.parametrize(
    "embed",
    [{"chain": "x"}, {"chain": [1]}, {"chain": [{"task": "work"}]}, {"callbacks": [{}]}, {"chord": 5}],
    ids=repr,
)
def test_a_canvas_that_is_none_is_refused_before_the_task_runs(reception: Reception, embed: dict[str, Any]) -> None:
    """After the run nobody could send it, nor tell its failure."""
    marker = new_marker()
    record = ends_in_sight(reception, marker, body_of(marker, embed), headers_of(marker))
    assert record is not None
    assert record.state is State.DEAD
    assert marker not in reception.runs


@pytest.mark.parametrize("deadline", [HUGE, float("nan"), float("inf"), -1e308, True, "soon"], ids=repr)
def test_a_deadline_no_clock_can_show_is_none(reception: Reception, deadline: Any) -> None:
    """The message runs, as one without."""
    marker = new_marker()
    stamp = {"deadline_ms": deadline if deadline is not True else 10**20, "seq": HUGE, "key": 5}
    ends_in_sight(reception, marker, body_of(marker), headers_of(marker, taskguard=stamp))
    assert marker in reception.runs


def test_nothing_is_unpickled(reception: Reception) -> None:
    """Not by the worker, and not for the dead letter."""

    class Bomb:
        def __reduce__(self) -> Any:
            return pytest.fail, ("executed",)

    marker = new_marker()
    body = pickle.dumps(([Bomb()], {}, {}))
    kind = {"content_type": "application/x-python-serialize", "content_encoding": "binary"}
    record = ends_in_sight(reception, marker, body, headers_of(marker), **kind)
    assert record is not None
    assert record.state is State.DEAD


def test_a_delayed_message_of_a_plain_producer_rests_and_leaves_the_broker(reception: Reception) -> None:
    """Its acknowledgement is made as Celery makes one."""
    marker = new_marker()
    record = ends_in_sight(reception, marker, body_of(marker), headers_of(marker, eta="2999-01-01T00:00:00+00:00"))
    assert record is not None
    assert record.state is State.PENDING


def test_a_bug_in_the_way_of_a_message_is_the_end_of_that_message_alone(
    reception: Reception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else raises in the parent buries the message, and the next one runs."""
    marker, other = new_marker(), new_marker()
    with monkeypatch.context() as patch:
        patch.setattr("taskguard.celery.request.received_envelope", lambda *_: 1 / 0)
        record = ends_in_sight(reception, marker, body_of(marker), headers_of(marker))
    assert record is not None
    assert "ZeroDivisionError" in record.failure
    ends_in_sight(reception, other, body_of(other), headers_of(other))
    assert other in reception.runs


bounded = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@bounded
@given(st.dictionaries(st.sampled_from(HEADERS), odd, max_size=3), st.dictionaries(st.sampled_from(EMBED), odd))
def test_no_headers_kill_or_hide(reception: Reception, headers: dict[str, Any], embed: dict[str, Any]) -> None:
    """Any values in any headers, and in the canvas."""
    marker = new_marker()
    ends_in_sight(reception, marker, body_of(marker, embed), headers_of(marker, **headers))


@bounded
@given(
    st.dictionaries(st.sampled_from([*HEADERS, *EMBED, "args", "kwargs", "utc", "taskset"]), odd, max_size=3),
    st.booleans(),
)
def test_no_body_of_protocol_1_kills_or_hides(reception: Reception, fields: dict[str, Any], hybrid: bool) -> None:
    """Nor a mixture of both protocols."""
    marker = new_marker()
    body = {"task": "work", "id": marker, "args": [marker], "kwargs": {"mark": marker}, **fields}
    ends_in_sight(
        reception, marker, json.dumps({**body, "mark": marker}).encode(), headers_of(marker) if hybrid else {}
    )


@bounded
@given(st.binary(max_size=40) | odd.map(lambda value: json.dumps(value).encode()), st.booleans(), odd, odd)
def test_no_body_kills_or_hides(reception: Reception, body: bytes, named: bool, kind: Any, encoding: Any) -> None:
    """Any bytes, of any declared type and encoding."""
    marker = new_marker()
    options: dict[str, Any] = {"content_type": kind, "content_encoding": encoding} if isinstance(kind, str) else {}
    ends_in_sight(reception, marker, body, headers_of(marker) if named else {"id": marker, "mark": marker}, **options)


@bounded
@given(st.dictionaries(st.sampled_from(STAMP), odd))
def test_no_stamp_kills_or_hides(reception: Reception, stamp: dict[str, Any]) -> None:
    """Whatever claims to be ours."""
    marker = new_marker()
    if isinstance(stamp.get("key"), str):  # the key of another example would make this one its duplicate
        stamp = {**stamp, "key": stamp["key"] + marker}
    ends_in_sight(reception, marker, body_of(marker), headers_of(marker, taskguard=stamp))


def test_what_celery_sends_has_no_flaw(reception: Reception) -> None:
    """The check refuses nothing that a producer of Celery's own makes: canvases, limits, stamps, delays."""
    from celery import chain, chord, group

    app = reception.app
    work, plain = app.tasks["work"], app.tasks["plain"]
    work.apply_async((1,), link=[plain.s()], link_error=plain.s(), time_limit=5, soft_time_limit=2.5, priority=3)
    plain.apply_async((1,), expires=60, shadow="other", argsrepr="(…)", headers={"x": {"deep": [1, [2]]}})
    chain(plain.s(1), plain.s(2), chord([plain.s(3), work.s(4)], plain.s())).apply_async()
    group(plain.s(5), plain.s(6)).apply_async()
    stamped = plain.s(7)
    stamped.stamp(visitor=None, order="7", shop=["a", "b"])
    stamped.apply_async()
    app.send_task("plain", task_id="my own id")
    with app.connection_for_read() as connection:
        queue = app.amqp.queues[app.conf.task_default_queue](connection.default_channel)
        count = 0
        while (message := queue.get(no_ack=True)) is not None:
            assert flaw_of(message) is None
            count += 1
    assert count >= 7


def test_unreadable_messages_with_one_id_are_letters_of_their_own(reception: Reception) -> None:
    """The id of a message that nobody can read proves nothing; its bytes do. A redelivery adds no letter."""
    shared = new_marker()
    for body in (b"{not json", b"[not json", b"{not json"):
        reception.deliver(body, {"id": shared, "task": "work"})
    letters = [record for record in reception.records() if record.task_id == shared]
    assert len(letters) == 2


@pytest.mark.parametrize(("headers", "answer"), [({"task": "nobody"}, "reject"), ({"task": "work"}, "ack")])
def test_a_result_backend_that_raises_ends_no_worker(
    reception: Reception, monkeypatch: pytest.MonkeyPatch, headers: dict[str, Any], answer: str
) -> None:
    """The dead letter is kept, and the broker's copy goes: it would end the next worker as well."""

    def away(*args: Any, **options: Any) -> None:
        raise OSError("the result backend is away")

    monkeypatch.setattr(type(reception.app.backend), "mark_as_failure", away)
    marker = new_marker()
    delivery = reception.deliver(b"{no json", {"id": marker, **headers})
    assert delivery.answers == [answer]
    assert len([record for record in reception.records() if record.task_id == marker]) == 1
