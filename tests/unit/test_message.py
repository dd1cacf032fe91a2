"""From Celery's messages to envelopes and back: nothing is lost on the way, and nothing that arrives can break it."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from hypothesis import given
from hypothesis import strategies as st

import taskguard
from taskguard import ReliableTask
from taskguard.celery import message as messages
from taskguard.celery.consumer import flaw_of
from taskguard.envelope import Envelope

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def app(namespace: str) -> Celery:
    """An application whose broker is process memory."""
    app = Celery(f"m-{namespace}", broker="memory://", set_as_current=False)
    app.conf.task_default_queue = namespace
    taskguard.install(app, store="memory://", namespace=namespace)
    return app


@pytest.fixture
def charge(app: Celery) -> Any:
    """A task with a key and a deadline."""

    @app.task(base=ReliableTask, shared=False, name="shop.charge", idempotency_key="charge:{order_id}", deadline=60)
    def charge(order_id: int, cents: int = 100) -> None: ...

    app.finalize()
    return app.tasks["shop.charge"]


def received(app: Celery) -> Any:
    """The next message in the application's queue."""
    with app.connection_for_read() as connection:
        queue = app.amqp.queues[app.conf.task_default_queue]
        return queue(connection.default_channel).get(no_ack=True)


def test_a_message_arrives_as_it_was_sent(app: Celery, charge: Any) -> None:
    """Key, fingerprint, deadline, queue and the very bytes."""
    charge.apply_async((7,), priority=3)
    message = received(app)
    envelope = messages.received_envelope(message, charge)
    assert (envelope.task, envelope.key, envelope.sequence) == ("shop.charge", "charge:7", 0)
    assert (envelope.body, envelope.queue) == (messages.as_bytes(message.body), app.conf.task_default_queue)
    assert envelope.properties["priority"] == 3
    assert envelope.fingerprint == charge.fingerprint_for((), {"order_id": 7, "cents": 100})
    assert envelope.deadline_at is not None
    assert Envelope.from_wire(envelope.to_wire()) == envelope


def test_a_message_of_a_plain_producer_gets_its_key_on_arrival(app: Celery, charge: Any) -> None:
    """A producer that knows nothing of taskguard is no way around it."""
    other = Celery("plain", broker="memory://", set_as_current=False)
    other.conf.task_default_queue = app.conf.task_default_queue
    other.send_task("shop.charge", (7,))
    envelope = messages.received_envelope(received(app), charge)
    assert envelope.key == "charge:7"
    assert envelope.fingerprint == charge.fingerprint_for((7,), {})


@pytest.mark.parametrize(
    ("stamp", "expires", "deadline"),
    [
        ({}, None, None),
        ({"deadline_ms": 5_000}, None, 5.0),
        ({"deadline_ms": "soon"}, None, None),
        ("not a stamp", None, None),
        ({}, "1970-01-01T00:00:09+00:00", 9.0),
        ({"deadline_ms": 5_000}, "1970-01-01T00:00:09+00:00", 5.0),
        ({"deadline_ms": 50_000}, "1970-01-01T00:00:09+00:00", 9.0),
        ({}, datetime(1970, 1, 1, 0, 0, 9, tzinfo=UTC), 9.0),
        ({}, "next week", None),
    ],
)
def test_the_deadline_is_the_earlier_of_two(stamp: Any, expires: Any, deadline: float | None) -> None:
    """taskguard's and Celery's ``expires``; what is no instant is none."""
    assert messages.deadline_of({"taskguard": stamp, "expires": expires}) == deadline


@given(st.dictionaries(st.sampled_from(["key", "fp", "seq", "deadline_ms"]), JSON))
def test_no_stamp_breaks_the_envelope(stamp: dict[str, Any]) -> None:
    """Whatever a foreign producer writes under our header, the message has a key and can rest."""
    envelope = messages.envelope_of(
        task_id="id",
        name="shop.charge",
        task=None,
        args=(),
        kwargs={},
        message_headers={"taskguard": stamp},
        body=b"[]",
        content_type="application/json",
        content_encoding="utf-8",
        properties={},
        delivery={},
    )
    assert envelope.key
    assert Envelope.from_wire(envelope.to_wire()).key == envelope.key


@given(st.binary(), st.dictionaries(st.text(max_size=5), JSON, max_size=3) | JSON, st.none() | st.text(max_size=9))
def test_whatever_arrives_can_rest(body: bytes, found: Any, content_type: str | None) -> None:
    """A dead letter keeps the bytes as they came, and its id is the same each time they come."""
    message = SimpleNamespace(
        headers=found, body=body, content_type=content_type, content_encoding=None, delivery_info=None, properties=None,
        errors=(),
    )  # fmt: skip
    first, second = messages.raw_envelope(message), messages.raw_envelope(message)
    assert first.copy_id == second.copy_id
    assert Envelope.from_wire(first.to_wire()).body == body


@pytest.mark.parametrize(
    ("body", "expected"),
    [(b"\xff", b"\xff"), ("é", "é".encode()), (bytearray(b"a"), b"a"), (memoryview(b"a"), b"a"), (7, b"7")],
)
def test_a_body_is_bytes_whatever_the_transport_made_of_it(body: Any, expected: bytes) -> None:
    """Text, buffers and surprises."""
    assert messages.as_bytes(body) == expected


@given(JSON)
def test_a_result_comes_back_as_it_was(value: Any) -> None:
    """What a duplicate is told is what the run returned."""
    app = Celery("results", set_as_current=False)
    assert messages.decode_result(app, messages.encode_result(app.conf.result_serializer, value)) == value


def test_a_result_of_a_serializer_of_bytes_comes_back_too() -> None:
    """Pickle, where the application accepts it."""
    app = Celery("results", set_as_current=False)
    app.conf.update(result_serializer="pickle", result_accept_content=["pickle"])
    assert messages.decode_result(app, messages.encode_result(app.conf.result_serializer, {1, 2})) == {1, 2}


def test_the_context_of_a_message_at_rest_has_its_workflow(app: Celery, charge: Any) -> None:
    """The result backend is told of chord, group and errbacks by it."""
    charge.apply_async((7,), link_error=charge.s(8), group_id="g")
    envelope = messages.received_envelope(received(app), charge)
    context = messages.context_of(app, envelope)
    assert (context.group, len(context.errbacks), context.args) == ("g", 1, [7])


def test_the_context_of_an_unreadable_message_is_its_headers(app: Celery) -> None:
    """Nobody fails over a body that is a dead letter anyway."""
    envelope = Envelope(task="t", task_id="id", key="id", body=b"\xff", headers={"group": "g"})
    assert messages.context_of(app, envelope).group == "g"


GOOD = {"id": "id", "task": "shop.charge"}


@pytest.mark.parametrize(
    ("headers", "body", "flaw"),
    [
        (GOOD, [[], {}, {}], None),
        (GOOD, [[], {}, None], None),
        (GOOD | {"eta": "2026-01-01T00:00:00+00:00", "timelimit": [None, None]}, [[], {}, {}], None),
        (GOOD | {"id": 7}, [[], {}, {}], "not a task id"),
        (GOOD | {"id": ""}, [[], {}, {}], "not a task id"),
        (GOOD | {"eta": "soon"}, [[], {}, {}], "not an instant"),
        (GOOD | {"eta": [1]}, [[], {}, {}], "not an instant"),
        (GOOD | {"expires": {"at": 1}}, [[], {}, {}], "not an instant"),
        (GOOD | {"timelimit": 5}, [[], {}, {}], "timelimit"),
        (GOOD, [[], {}], "the body is not"),
        (GOOD, [{}, [], {}], "the body is not"),
        (GOOD, "text", "the body is not"),
        (GOOD, None, "the body is not"),
        (GOOD, 7, "the body is not"),
    ],
)
def test_a_message_of_the_wrong_shape_is_found_out(headers: dict[str, Any], body: Any, flaw: str | None) -> None:
    """Before Celery unpacks it, which would kill the worker."""
    found = flaw_of(SimpleNamespace(headers=headers, payload=body))
    assert (found is None) if flaw is None else (found is not None and flaw in found)
