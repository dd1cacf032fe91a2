"""The envelope and its wire form."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from taskguard.envelope import Envelope, record_id
from taskguard.errors import MessageError

text = st.text(max_size=20)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
envelopes = st.builds(
    Envelope,
    task=text,
    task_id=text,
    key=text,
    body=st.binary() | st.text().map(lambda s: s.encode("utf-8", "surrogatepass")),
    content_type=text,
    content_encoding=text,
    headers=st.dictionaries(text, plain, max_size=4),
    properties=st.dictionaries(text, plain, max_size=4),
    exchange=text,
    routing_key=text,
    queue=text,
    fingerprint=text,
    sequence=st.integers(0, 2**31 - 1),
    deadline_at=st.none() | st.floats(0, 1e11),
)


SIMPLE = Envelope(task="shop.charge", task_id="task-1", key="order-1", body=b"[]")


@given(envelopes)
def test_a_message_is_the_same_in_a_pools_child(envelope: Envelope) -> None:
    """The parent pickles it with the request."""
    assert pickle.loads(pickle.dumps(envelope)) == envelope


@given(envelopes)
def test_a_message_comes_back_from_rest_as_it_was(envelope: Envelope) -> None:
    """Body, headers and routing survive the wire form, whatever bytes and characters they hold."""
    assert Envelope.from_wire(envelope.to_wire()) == envelope


@given(envelopes)
def test_the_wire_form_is_json_that_any_database_takes(envelope: Envelope) -> None:
    """Plain ASCII, so that an operator needs nothing but a database client."""
    assert isinstance(json.loads(envelope.to_wire().decode("ascii")), dict)


def test_a_text_body_can_be_read_in_the_wire_form() -> None:
    """Nobody has to decode base64 to see the arguments of a dead letter."""
    wire = json.loads(SIMPLE.replace(body='[["naïve"], {}, {}]'.encode()).to_wire())
    assert wire["body"] == '[["naïve"], {}, {}]'
    assert "body64" not in wire


NULLS = ("shadow", "eta", "expires", "group", "group_index", "parent_id", "stamped_headers")
USUAL = SIMPLE.replace(
    headers={"id": SIMPLE.task_id, "task": SIMPLE.task, **dict.fromkeys(NULLS)},
    properties={"correlation_id": SIMPLE.task_id, "delivery_mode": 2},
)


def test_what_celery_s_messages_say_alike_is_not_kept() -> None:
    """Nulls, and an id for the third time, are an eighth of a small message."""
    wire = json.loads(USUAL.to_wire())
    assert wire["headers"] == {"id": SIMPLE.task_id, "task": SIMPLE.task}
    assert wire["properties"] == {"delivery_mode": 2}


@given(
    st.fixed_dictionaries({}, optional={name: st.none() | st.just("set") for name in NULLS}),
    st.sampled_from([{}, {"correlation_id": SIMPLE.task_id}, {"correlation_id": "other"}, {"correlation_id": None}]),
)
@example(dict.fromkeys(NULLS), {"correlation_id": SIMPLE.task_id})
@example({**dict.fromkeys(NULLS), "eta": "set"}, {"correlation_id": SIMPLE.task_id})
def test_what_is_left_out_comes_back(headers: dict[str, object], properties: dict[str, object]) -> None:
    """And what was not there does not."""
    envelope = SIMPLE.replace(headers={"id": SIMPLE.task_id, **headers}, properties=properties)
    assert Envelope.from_wire(envelope.to_wire()) == envelope


def test_a_binary_body_is_kept_byte_for_byte() -> None:
    """Pickle, msgpack and garbage rest as they came."""
    envelope = SIMPLE.replace(body=bytes(range(256)))
    assert Envelope.from_wire(envelope.to_wire()).body == bytes(range(256))


def test_the_wire_form_can_be_read_as_text() -> None:
    """Some database drivers return text."""
    assert Envelope.from_wire(SIMPLE.to_wire().decode()) == SIMPLE


HOSTILE = [
    b"",
    b"null",
    b"1",
    b'"v"',
    b"[1]",
    b"{}",
    b"\xff\xfe\x00",
    b'{"v":1}',
    b'{"v":2,"task":"a"}',
    b'{"v":[],"task":"a"}',
    b'{"v":1,"task":"a","task_id":"b","key":"c"}',
    b'{"v":1,"task":"a","task_id":"b","key":"c","body":1}',
    b'{"v":1,"task":"a","task_id":"b","key":"c","body":"\\ud800"}',
    b'{"v":1,"task":"a","task_id":"b","key":"c","body64":"?"}',
    b'{"v":1,"task":"a","task_id":"b","key":"c","body64":5}',
    b'{"v":1,"task":"a","task_id":"b","key":"c","body":"","body64":"AA=="}',
    b'{"v":1,"task":"a","task_id":"b","key":"c","body":"","colour":"red"}',
    b"[" * 100_000,
    b'{"v":' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("wire", HOSTILE, ids=lambda wire: repr(wire[:60]))
def test_what_is_no_message_is_refused(wire: bytes) -> None:
    """Only MessageError comes out, and it shows the beginning of what was read."""
    with pytest.raises(MessageError) as caught:
        Envelope.from_wire(wire)
    assert len(str(caught.value)) < 500


@given(st.binary() | st.text() | plain.map(json.dumps))
@example(b"\x80")
def test_nothing_but_a_message_error_comes_out_of_hostile_bytes(wire: bytes | str) -> None:
    """Garbage in a store does not stop the relay."""
    with pytest.raises(MessageError):
        Envelope.from_wire(wire)


FIELDS = [field.name for field in dataclasses.fields(Envelope) if field.name != "body"]


@given(envelopes, st.sampled_from([*FIELDS, "v", "body", "body64"]), plain)
def test_a_message_with_one_bad_field_is_refused_or_whole(envelope: Envelope, name: str, value: object) -> None:
    """What is read back can be written again as the same message, and its ids can be made."""
    wire = {**json.loads(envelope.to_wire()), name: value}
    try:
        read = Envelope.from_wire(json.dumps(wire))
    except MessageError:
        return
    assert Envelope.from_wire(read.to_wire()) == read
    assert (len(read.id), len(read.copy_id)) == (20, 20)


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_another_type_is_refused(name: str) -> None:
    """A task name that is a number must not go on to fail somewhere else."""
    wire = {**json.loads(SIMPLE.to_wire()), name: ["x"]}
    with pytest.raises(MessageError):
        Envelope.from_wire(json.dumps(wire))


def test_ids_hang_on_task_and_key_and_copies_on_the_task_id_too() -> None:
    """One record per execution key, one per message beside it."""
    assert SIMPLE.id == SIMPLE.replace(task_id="task-2", sequence=7, body=b"x").id
    assert SIMPLE.id != SIMPLE.replace(task="shop.refund").id
    assert SIMPLE.id != SIMPLE.replace(key="order-2").id
    assert SIMPLE.copy_id != SIMPLE.id
    assert SIMPLE.copy_id != SIMPLE.replace(task_id="task-2").copy_id


def test_ids_are_the_same_in_every_process() -> None:
    """A record written by one release is found by the next."""
    assert record_id("shop.charge", "order-1") == SIMPLE.id == "69c36d63ef422591c7d5"


@given(st.lists(text, min_size=1, max_size=3), st.lists(text, min_size=1, max_size=3))
@example(["task", "key\0task-1"], ["task", "key", "task-1"])
def test_different_parts_never_share_an_id(one: list[str], other: list[str]) -> None:
    """Keys are made from users' arguments: no character in one may lead to the record of another."""
    assert (record_id(*one) == record_id(*other)) == (one == other)


@pytest.mark.parametrize(("headers", "retries"), [({}, 0), ({"retries": 3}, 3), ({"retries": None}, 0)])
def test_retries_are_counted_as_celery_does(headers: dict[str, object], retries: int) -> None:
    """The header may be missing or empty."""
    assert SIMPLE.replace(headers=headers).retries == retries


def test_an_envelope_cannot_be_changed() -> None:
    """What was fingerprinted and claimed stays what it was."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        SIMPLE.task = "other"  # type: ignore[misc]
