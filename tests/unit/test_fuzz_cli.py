"""Hostile letters on an operator's terminal, hostile words on the command line, hostile files and settings."""

from __future__ import annotations

import inspect
import json
import unicodedata
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from taskguard.cli import cli
from taskguard.clock import iso
from taskguard.envelope import Envelope
from taskguard.errors import ConfigurationError, MessageError
from taskguard.idempotency import key_maker
from taskguard.letter import DeadLetter
from taskguard.letterfile import from_line, to_line
from taskguard.record import Attempt, Failure, Reason, Record, State
from taskguard.settings import Settings
from taskguard.stores import open_store
from tests.unit.letters import HOSTILE, bury, message

bounded = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
hostile_text = st.text(max_size=40) | st.sampled_from(
    [HOSTILE, "\x1b[31m", "\r\x1b[K", "\u202e\u2066", "\x9b2J", "\u200b", "[/]"]
)
HUGE = 10**400
odd = (
    st.sampled_from([None, True, -1, HUGE, float("nan"), float("inf"), "", "\ud800", "\x00", [], {}, [[]], {"v": 1}])
    | st.text()
)


def typed(*words: str) -> Result:
    """A command as it is typed at a terminal of 100 columns."""
    empty = {"TASKGUARD_STORE": None, "TASKGUARD_NAMESPACE": None, "COLUMNS": "100"}
    return CliRunner().invoke(cli, words, env=empty, prog_name="taskguard", input="")


def unsafe(shown: str) -> set[str]:
    """The characters in *shown* that move a cursor, turn text around or cannot be seen."""
    return {c for c in shown if c != "\n" and unicodedata.category(c) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}}


def holds_to_its_word(result: Result) -> None:
    """No traceback, and nothing but text on the terminal."""
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (0, 1, 2)
    assert not unsafe(result.output)
    assert "Traceback (most" not in result.output


@bounded
@given(hostile_text, hostile_text, hostile_text, st.sampled_from(["list", "show", "groups", "stats", "search"]))
def test_no_letter_reaches_the_terminal(text: str, error: str, body: str, command: str) -> None:
    """Control characters, ANSI escapes, bidirectional overrides and markup are shown, never obeyed."""
    namespace = uuid.uuid4().hex
    store = open_store("memory://", namespace=namespace)
    task_id = f"id{text}"
    letter = message(
        task=f"t{text}", task_id=task_id, key=f"k{error}", queue=text, body=body.encode("utf-8", "surrogatepass")
    )
    why = Failure(reason=Reason.REJECTED, error_type=f"E{text}", message=error, traceback=f"{error}\n{text}")
    id = bury(store, letter, why)
    words = {"show": ("show", id), "search": ("search", "t")}.get(command, (command,))
    for options in ((), ("--json",)):
        result = typed("--store", "memory://", "--namespace", namespace, "dlq", *words, *options)
        holds_to_its_word(result)
        assert result.exit_code == 0


COMMANDS = [["dlq", name] for name in ("list", "search", "show", "groups", "stats", "requeue", "edit", "purge")] + [
    ["status"], ["revoke"], ["dlq"], [],
]  # fmt: skip
OPTIONS = [
    "--args",
    "--kwargs",
    "--key",
    "--rate",
    "--deadline",
    "--older-than",
    "--reason",
    "--limit",
    "--task",
    "--all",
    "--json",
    "-y",
]


@bounded
@given(
    st.sampled_from(COMMANDS),
    st.lists(
        st.sampled_from(OPTIONS) | hostile_text | st.sampled_from(["9" * 400, "nan", "-1", "1e999", "[" * 999]),
        max_size=5,
    ),
)
def test_no_words_break_the_command_line(command: list[str], words: list[str]) -> None:
    """An answer or one line of complaint, whatever is typed, with a letter there to be changed."""
    namespace = uuid.uuid4().hex
    bury(open_store("memory://", namespace=namespace), message())
    words = [word.replace("\x00", "") for word in words]  # no shell can pass it on
    holds_to_its_word(typed("--store", "memory://", "--namespace", namespace, *command, *words))


def line_of(**changes: Any) -> str:
    """One line of `dlq export`, with these fields changed, named as ``wire__task`` where they are inside another."""
    record = Record(
        id="x", task="t", task_id="id", key="k", state=State.DEAD, primary=False, wire=message().to_wire(),
        failure=Failure.of(Reason.POISON, ValueError("no")).to_json(),
        history=Attempt(at=1.5, worker="w", outcome="crash").to_json(),
    )  # fmt: skip
    outer = json.loads(to_line(DeadLetter.of(record)))
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if part == "history":
            outer[part][0][field] = value
        elif field:
            outer[part][field] = value
        else:
            outer[part] = value
    return json.dumps(outer)


PLACES = [
    "v", "wire", "failure", "history__at_ms", "history__worker", "history__error", "failure__reason",
    "failure__message", "failure__arguments", "wire__task", "wire__key", "wire__sequence", "wire__deadline_at",
    "wire__headers", "wire__body", "wire__properties", "wire__body64", "wire__v",
]  # fmt: skip


@bounded
@given(st.dictionaries(st.sampled_from(PLACES), odd, max_size=2))
@example({"history__at_ms": HUGE})
@example({"history__at_ms": float("inf")})
@example({"wire__deadline_at": HUGE})
@example({"wire__sequence": HUGE})
@example({"wire__headers": {"retries": HUGE}})
def test_no_file_breaks_the_import(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A line is refused in one line, or becomes a letter that every command can show and export again."""
    inside = {name.partition("__")[0] for name in changes if "__" in name}
    line = line_of(**{name: value for name, value in changes.items() if "__" in name or name not in inside})
    with suppress(MessageError):
        from_line(line)
    file = tmp_path / "letters.jsonl"
    file.write_text(line + "\n")
    where = ("--store", "memory://", "--namespace", uuid.uuid4().hex, "dlq")
    holds_to_its_word(typed(*where, "import", str(file)))
    for command in (["list"], ["export"], ["stats"], ["requeue", "--all", "-y"]):
        holds_to_its_word(typed(*where, *command))


@bounded
@given(st.binary(max_size=200) | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_no_bytes_break_the_import(tmp_path: Path, data: bytes) -> None:
    """Files of any kind."""
    file = tmp_path / "letters.jsonl"
    file.write_bytes(data)
    holds_to_its_word(typed("--store", "memory://", "--namespace", uuid.uuid4().hex, "dlq", "import", str(file)))


@bounded
@given(
    st.sampled_from([Failure, Attempt]),
    st.dictionaries(st.sampled_from(["reason", "message", "arguments", "at_ms", "worker", "outcome", "x"]), odd),
)
def test_no_record_breaks_a_letter(kind: type, fields: dict[str, Any]) -> None:
    """What a foreign hand wrote into a store is shown as empty."""
    text = json.dumps(fields)
    failure, history = (text, "") if kind is Failure else ("", text)
    record = Record(
        id="x", task="t", task_id="id", key="k", state=State.DEAD, primary=False, failure=failure, history=history
    )
    shown = DeadLetter.of(record)
    json.dumps(shown.as_dict())
    assert "t" in shown.text()


@bounded
@given(st.dictionaries(st.sampled_from(list(Settings.__dataclass_fields__)), odd))
def test_no_setting_is_taken_for_another(environ: dict[str, Any]) -> None:
    """From the environment or the configuration: what is read is in range, or refused."""
    texts = {f"TASKGUARD_{name.upper()}": str(value) for name, value in environ.items() if value is not HUGE}
    for conf, env in (({f"taskguard_{name}": value for name, value in environ.items()}, {}), ({}, texts)):
        try:
            found = Settings.read({}, conf, env)
        except ConfigurationError:
            continue
        assert 0 < found.lease < 1e11
        assert found.max_crashes >= 1


@pytest.mark.parametrize("at", [1e300, -1e300, float("inf"), float("nan")])
def test_an_instant_outside_every_calendar_can_be_shown(at: float) -> None:
    """A letter with a hostile deadline is still listed."""
    assert iso(at)


@pytest.mark.parametrize("field", ["sequence", "deadline_at"])
@pytest.mark.parametrize("value", [HUGE, -HUGE, 1e308, float("inf"), float("nan")], ids=repr)
def test_a_number_no_store_can_hold_is_refused(field: str, value: Any) -> None:
    """Before it reaches one."""
    wire = {**json.loads(message().to_wire()), field: value}
    with pytest.raises(MessageError):
        Envelope.from_wire(json.dumps(wire))


@bounded
@given(
    st.text(alphabet="{}!:[]._abc0 order", max_size=20),
    st.recursive(odd, lambda inner: st.lists(inner, max_size=2), max_leaves=3),
)
def test_no_key_template_is_evaluated(template: str, value: Any) -> None:
    """A template and an argument make a key or a ConfigurationError."""

    def body(order: Any = None, a: Any = None) -> None: ...

    try:
        make = key_maker(template, inspect.signature(body), task="shop.charge")
        assert make is not None
        key = make((value,), {})
    except ConfigurationError:
        return
    assert 0 < len(key) <= 512
