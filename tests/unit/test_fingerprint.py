"""Fingerprints: equal for the same call, on both sides of the broker; different for another."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.utils.json import dumps, loads

from taskguard.errors import ConfigurationError
from taskguard.fingerprint import canonical, fingerprint

keys = st.text(max_size=5) | st.integers() | st.booleans() | st.none()
atoms = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.decimals(allow_nan=False)
    | st.uuids()
    | st.dates()
    | st.times()
    | st.datetimes(timezones=st.none() | st.just(UTC) | st.just(timezone(timedelta(hours=2))))
)
payloads = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


def order(order_id: int, amount: int, /, currency: str = "EUR", *, note: str | None = None, tags: Any = ()) -> None:
    """A task's signature with every kind of parameter a caller can spell."""


ORDER = inspect.signature(order)
LOCK = threading.Lock()


class Colour(str, Enum):  # noqa: UP042 - what older code writes
    RED = "red"


class Level(IntEnum):
    HIGH = 3


class Point(NamedTuple):
    x: int
    y: int


@dataclass
class Money:
    amount: Decimal
    currency: str


class Slotted:
    __slots__ = ("tags",)

    def __init__(self, tags: set[str]) -> None:
        self.tags = tags


class Jsonable:
    def __json__(self) -> dict[str, int]:
        return {"a": 1}


@given(payloads)
def test_the_form_is_the_same_before_and_after_the_wire(value: Any) -> None:
    """Celery's JSON makes lists of tuples and strings of keys; the form has them so from the start."""
    assert canonical(loads(dumps(value))) == canonical(value)


@given(st.dictionaries(keys, atoms, max_size=6), st.randoms())
def test_the_order_of_a_dict_does_not_count(value: dict[Any, Any], rng: Any) -> None:
    """At any depth."""
    distinct = {json.dumps({key: 0}): (key, item) for key, item in value.items()}
    items = list(distinct.values())
    shuffled = rng.sample(items, len(items))
    assert canonical([dict(items)]) == canonical([dict(shuffled)])


@given(payloads)
def test_the_form_is_ascii_json(value: Any) -> None:
    """An operator can read it."""
    json.loads(canonical(value).decode("ascii"))


def test_values_of_different_kinds_differ() -> None:
    """What a task can tell apart has fingerprints that differ."""
    values = [1, 1.0, "1", True, None, "None", "", [], {}, b"1", Decimal(1), [1], {"1": 1}, {1}, date(2024, 1, 1)]
    assert len({canonical(value) for value in values}) == len(values)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, 2), [1, 2]),
        ({1: "a", "1": "b"}, {"1": "b"}),
        ({2: "a", 10: "b"}, {"10": "b", "2": "a"}),
        (Colour.RED, "red"),
        (Level.HIGH, 3),
        ({Colour.RED: 1}, {"red": 1}),
        (Point(1, 2), [1, 2]),
        (OrderedDict(b=1, a=2), {"a": 2, "b": 1}),
        (Jsonable(), {"a": 1}),
        ({"b", "a"}, frozenset({"a", "b"})),
        (type("Half", (float,), {})(0.5), 0.5),
    ],
)
def test_values_that_the_wire_makes_equal_are_equal(one: Any, other: Any) -> None:
    """Subclasses of plain types travel as the plain type."""
    assert canonical(one) == canonical(other)


@pytest.mark.parametrize(
    "value",
    [datetime(2024, 1, 2, tzinfo=UTC), date(2024, 1, 2), time(1, 2), Decimal("1.10"), UUID(int=1), b"\xff", b"text"],
)
def test_tagged_types_are_written_as_kombu_writes_them(value: Any) -> None:
    """The form can be compared with a message body."""
    assert json.loads(canonical(value)) == json.loads(dumps(value))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Money(Decimal("1.50"), "EUR"),
        lambda: Slotted({"a", "b", "c"}),
        lambda: {"levels": {Money(Decimal(1), "EUR").currency: timedelta(seconds=1)}},
        lambda: bytearray(b"abc"),
        lambda: (order, Money, len),
        lambda: {(1, 2): "pair"},
        lambda: range(3),
        lambda: (Ellipsis, NotImplemented),
        lambda: ValueError("x"),
    ],
)
def test_objects_that_only_pickle_can_send_have_a_form_without_addresses(make: Any) -> None:
    """Two equal objects at different addresses are equal."""
    one, other = make(), make()
    assert canonical(one) == canonical(other)
    assert b"0x" not in canonical(one)


def test_objects_that_differ_in_state_differ() -> None:
    """State counts, not identity."""
    assert canonical(Money(Decimal(1), "EUR")) != canonical(Money(Decimal(2), "EUR"))
    assert canonical(Slotted({"a"})) != canonical(Slotted({"b"}))


def test_the_fingerprint_is_the_same_in_every_process() -> None:
    """No hash seed and no set order leaks into it."""
    program = (
        "from taskguard.fingerprint import fingerprint;"
        "print(fingerprint(({'a','b','c','d'}, {'y': 1, 'x': frozenset('xyz')}), {'k': ValueError('v')}))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(seen) == 1


def recursive() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (threading.Lock(), "lock: a value of this type has no stable form"),
        ((x for x in "ab"), "generator: a value of this type has no stable form"),
        (recursive(), "nested too deeply, or in itself"),
        (10**5000, "cannot be written as JSON"),
    ],
    ids=["lock", "generator", "recursive", "huge"],
)
def test_a_value_without_a_stable_form_is_refused(value: Any, message: str) -> None:
    """Better no fingerprint than one that differs from run to run."""
    with pytest.raises(ConfigurationError, match=message):
        canonical([value])


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((1, 5, "EUR"), {}),
        ((1, 5), {"currency": "".join(["E", "UR"])}),
        ((1, 5), {"note": None}),
        ((1, 5), {"tags": []}),
        ([1, 5], {"tags": (), "currency": "EUR"}),
    ],
)
def test_spelling_and_defaults_do_not_count(args: Any, kwargs: Any) -> None:
    """The same call has one fingerprint, also when a default is spelled out, or became a list on the wire."""
    assert fingerprint(args, kwargs, ORDER) == fingerprint((1, 5), {}, ORDER)


@given(st.integers(), st.text(), st.booleans(), st.booleans())
def test_positional_and_keyword_spelling_are_the_same_call(a: int, b: str, a_by_name: bool, b_by_name: bool) -> None:
    """Whichever the producer chose."""
    signature = inspect.signature(lambda a, b: None)
    b_by_name = b_by_name or a_by_name
    args = [value for value, by_name in ((a, a_by_name), (b, b_by_name)) if not by_name]
    kwargs = {name: value for name, value, by_name in (("b", b, b_by_name), ("a", a, a_by_name)) if by_name}
    assert fingerprint(args, kwargs, signature) == fingerprint((a, b), {}, signature)


def test_a_new_parameter_with_a_default_leaves_fingerprints_as_they_are() -> None:
    """A deployment does not turn the messages in the queue into conflicts."""
    before = inspect.signature(lambda a: None)
    after = inspect.signature(lambda a, b=LOCK, *, c=1: None)
    assert fingerprint((1,), {}, before) == fingerprint((1,), {}, after)
    assert fingerprint((1, LOCK), {"c": 1}, after) == fingerprint((1,), {}, after)
    assert fingerprint((1, 2), {}, after) != fingerprint((1,), {}, after)


def test_different_calls_differ() -> None:
    """Values, names and places all count."""
    open_ = inspect.signature(lambda a, /, *rest, **more: None)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((1,), {}),
        ((1, 2), {}),
        ((1, 2, 3), {}),
        ((1,), {"a": 2}),
        ((1,), {"b": 2}),
        ((), {"a": 1}),
        ((True,), {}),
    ]
    assert len({fingerprint(args, kwargs, open_) for args, kwargs in calls}) == len(calls)
    assert len({fingerprint(args, kwargs) for args, kwargs in calls}) == len(calls)


def test_a_call_that_does_not_fit_still_has_a_fingerprint() -> None:
    """The task's own TypeError is the error to show."""
    assert fingerprint((1, 2, 3, 4, 5), {"nope": 1}, ORDER) != fingerprint((1, 2, 3), {}, ORDER)


def test_a_fingerprint_is_32_hexadecimal_digits() -> None:
    """Its form is part of the record."""
    assert fingerprint((1,), {"b": [2]}) == fingerprint([1], {"b": (2,)})
    assert len(bytes.fromhex(fingerprint((), {}))) == 16
