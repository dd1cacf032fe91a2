"""Idempotency keys: what makes one, and what is refused, when declared and when called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.utils.json import dumps, loads

from taskguard.errors import ConfigurationError
from taskguard.idempotency import KeyMaker, check_key, key_maker


class Colour(str, Enum):  # noqa: UP042 - what older code writes
    RED = "red"


class Level(IntEnum):
    HIGH = 3


def charge(order_id: Any, amount: Any = 0, *lines: Any, currency: str = "EUR", **extra: Any) -> None:
    """A task's signature with every kind of parameter but one."""


def only(first: Any, /, second: Any = 2) -> None:
    """A positional-only parameter."""


def maker(declared: Any, function: Callable[..., Any] = charge) -> KeyMaker:
    made = key_maker(declared, inspect.signature(function), task="shop.charge")
    assert made is not None
    return made


def test_without_a_declaration_there_is_no_maker() -> None:
    """The task id is the key then."""
    assert key_maker(None, inspect.signature(charge), task="t") is None


@pytest.mark.parametrize(
    ("template", "args", "kwargs", "key"),
    [
        ("charge:{order_id}", (7,), {}, "charge:7"),
        ("charge:{order_id}", (), {"order_id": "o-1"}, "charge:o-1"),
        ("{order_id}", ("o-1",), {}, "o-1"),
        ("{order_id}:{currency}", (7,), {}, "7:EUR"),
        ("{order_id}:{currency}", (7, 5), {"currency": "SEK"}, "7:SEK"),
        ("{order_id}/{amount:.2f}", (7, 2.5), {}, "7/2.50"),
        ("{order_id:%Y%m%d}{amount:03d}", (date(2024, 1, 2), 5), {}, "20240102005"),
        ("{order_id[id]}", ({"id": 9},), {}, "9"),
        ("{order_id[lines][1]}", ({"lines": [1, "b"]},), {}, "b"),
        ("{order_id.customer.name}", (SimpleNamespace(customer=SimpleNamespace(name="ann")),), {}, "ann"),
        ("{lines[0]}", (1, 2, "x"), {}, "x"),
        ("{extra[ref]}", (1,), {"ref": "r", "currency": "SEK"}, "r"),
        ("{{{order_id}}}", (7,), {}, "{7}"),
        ("nightly", (1,), {}, "nightly"),
        ("{order_id}", (True,), {}, "True"),
        ("{order_id}", (Decimal("1.10"),), {}, "1.10"),
        ("{order_id}", (UUID(int=1),), {}, "00000000-0000-0000-0000-000000000001"),
        ("{order_id}", (datetime(2024, 1, 2),), {}, "2024-01-02 00:00:00"),
        ("{order_id}", ("Zoë Ω\u00a0x",), {}, "Zoë Ω\u00a0x"),
    ],
)
def test_a_template_is_filled_from_the_arguments(template: str, args: Any, kwargs: Any, key: str) -> None:
    """Positional, keyword and default; items and attributes; formats."""
    assert maker(template)(args, kwargs) == key


@given(st.integers() | st.text("abc:", min_size=1), st.integers())
def test_positional_and_keyword_spelling_give_one_key(order_id: Any, amount: int) -> None:
    """As the task itself would receive it."""
    key = maker("{order_id}:{amount}")
    assert key((order_id, amount), {}) == key((), {"amount": amount, "order_id": order_id})
    assert key((order_id, amount), {}) == key((order_id,), {"amount": amount}) == f"{order_id}:{amount}"


@pytest.mark.parametrize("value", [Colour.RED, Level.HIGH, 1.5, "x", Decimal("1.0"), UUID(int=5), date(2024, 1, 2)])
def test_a_key_is_the_same_before_and_after_the_wire(value: Any) -> None:
    """A producer that asks for uniqueness and the worker make the same key."""
    key = maker("k:{order_id}")
    assert key((value,), {}) == key(tuple(loads(dumps([value]))), {})


def test_a_positional_only_argument_is_not_taken_from_a_keyword() -> None:
    """The call would not work either."""
    assert maker("{first}-{second}", only)((1,), {"second": 3}) == "1-3"
    with pytest.raises(ConfigurationError, match=r"field \{first\} is not among the arguments of this call"):
        maker("{first}", only)((), {"first": 1})


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (
            "charge:{orderid}",
            "shop.charge: idempotency_key 'charge:{orderid}' names 'orderid', which is no argument of the task; "
            "there are order_id, amount, lines, currency, extra",
        ),
        ("{}", "{} does not name an argument; there are order_id"),
        ("{0}", "{0} does not name an argument"),
        ("{order_id", "is no template"),
        ("order_id}", "is no template"),
        ("{order_id.__class__}", "the attribute '__class__' is private"),
        ("{order_id._secret}", "the attribute '_secret' is private"),
        ("{order_id[a][b].__init__}", "private"),
        ("{order_id!r}", "may have a plain format after a colon, and nothing else"),
        ("{order_id:{amount}}", "may have a plain format after a colon, and nothing else"),
        ("{order_id}{amount}", "put a separator there"),
        ("{order_id.}", "does not name an argument"),
        ("", "is empty"),
        ("  ", "is empty"),
        (42, "idempotency_key 42 is neither a template nor a function"),
        (b"{order_id}", "is neither a template nor a function"),
    ],
)
def test_a_declaration_that_cannot_work_fails_when_made(declared: Any, message: str) -> None:
    """At import, not in the worker at night."""
    with pytest.raises(ConfigurationError) as caught:
        maker(declared)
    assert message in str(caught.value)


def test_a_task_without_arguments_is_told_so() -> None:
    """The list of names is not left blank."""
    with pytest.raises(ConfigurationError, match="it takes none"):
        maker("{x}", lambda: None)


@pytest.mark.parametrize(
    ("template", "args", "message"),
    [
        ("{order_id}", (None,), "field {order_id} is None, which would unite unrelated calls"),
        ("{order_id}", ("",), "field {order_id} is '', which would unite unrelated calls"),
        ("{order_id[id]}", ({"id": None},), "field {order_id[id]} is None"),
        ("{order_id}", (), "field {order_id} is not among the arguments of this call; give 'order_id'"),
        ("{order_id[id]}", ({},), "field {order_id[id]} cannot be read (KeyError: 'id')"),
        ("{order_id.id}", ({"id": 1},), "a key of a dict is written [key], an attribute .name"),
        ("{order_id[id]}", (7,), "cannot be read (TypeError"),
        ("{order_id}", ({"id": 1},), "is a dict, whose text is not the same everywhere"),
        ("{order_id}", (object(),), "is a object, whose text is not the same everywhere"),
        ("{order_id}", ({1, 2},), "is a set"),
        ("{lines}", (1, 2, 3), "is a tuple"),
        ("{order_id:.2f}", ("abc",), "cannot be written as '.2f'"),
        ("{order_id}", ("   ",), "is empty"),
        ("{order_id}", ("x" * 513,), "has 513 characters and may have 512"),
        ("{order_id}", ("a\nb",), r"has the control character '\n'"),
        ("{order_id}", ("a\x00b",), r"has the control character '\x00'"),
        ("{order_id}", ("a\ud800b",), r"has the control character '\ud800'"),
    ],
)
def test_a_call_without_a_usable_key_is_refused_in_one_line(template: str, args: Any, message: str) -> None:
    """A bad key would unite strangers or part twins; the error says which field."""
    with pytest.raises(ConfigurationError) as caught:
        maker(template)(args, {})
    assert message in str(caught.value)
    assert str(caught.value).startswith("shop.charge: ")
    assert "\n" not in str(caught.value)


def test_a_function_gets_what_the_task_gets() -> None:
    """``(*args, **kwargs)``."""
    key = maker(lambda order_id, amount=0, currency="EUR": f"{order_id}/{amount}/{currency}")
    assert key((7,), {"currency": "SEK"}) == "7/0/SEK"


@pytest.mark.parametrize(
    ("result", "message"),
    [(None, "key None is a NoneType; make it a str"), (7, "key 7 is a int"), ("", "key '' is empty"), (b"k", "bytes")],
)
def test_a_function_must_return_a_usable_key(result: Any, message: str) -> None:
    """One clear line, whatever it returned."""
    with pytest.raises(ConfigurationError) as caught:
        maker(lambda *args, **kwargs: result)((1,), {})
    assert message in str(caught.value)


def test_an_error_inside_the_function_is_shown_as_it_is() -> None:
    """Its traceback is what its author needs."""
    with pytest.raises(ZeroDivisionError):
        maker(lambda *args: 1 / 0)((1,), {})


def test_the_longest_key_is_512_characters() -> None:
    """Also for a key given explicitly."""
    assert check_key("x" * 512, task="t") == "x" * 512
    with pytest.raises(ConfigurationError, match="t: idempotency key 'xxx"):
        check_key("x" * 513, task="t")
