"""What an operator sees when something is wrong: one line with the way out, and never a traceback."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from taskguard.cli import cli
from taskguard.cli.complaints import complaining
from taskguard.cli.text import age, clean, one_line, plural
from tests.unit.letters import HOSTILE


def run(*words: str, env: dict[str, str | None] | None = None) -> Result:
    """Type a command, with nothing of taskguard in the environment."""
    empty: dict[str, str | None] = {"TASKGUARD_STORE": None, "TASKGUARD_NAMESPACE": None}
    return CliRunner().invoke(cli, words, env=empty | (env or {}), prog_name="taskguard")


@pytest.mark.parametrize(
    ("words", "status", "part"),
    [
        (["dlq", "list"], 1, "no store is named; give --store URL"),
        (["dlq", "list", "--store", "foo://x"], 1, "'foo://x' is not a store URL; use one of redis://"),
        (["dlq", "list", "--store", "redis://127.0.0.1:1/0"], 1, "does not answer"),
        (["dlq", "list", "--store", "postgresql+psycopg://u:secret@127.0.0.1:1/x"], 1, "check that the server is up"),
        (["dlq", "list", "--store", "sqlite:////no/such/directory/x.db"], 1, "/no/such/directory"),
        (["--store", "memory://", "dlq", "show", "nope"], 1, "no dead letter has the id 'nope'"),
        (["--store", "memory://", "dlq", "edit", "nope", "--args", "[]"], 1, "no dead letter has the id 'nope'"),
        (["--store", "memory://", "dlq", "requeue", "nope"], 1, "no dead letter has the id 'nope'"),
        (["--store", "memory://", "dlq", "list", "--older-than", "old"], 2, "'old' is not a duration"),
        (["--store", "memory://", "dlq", "requeue", "--all", "--rate", "fast"], 2, "'fast' is not a rate; write 50/s"),
        (["--store", "memory://", "dlq", "requeue", "--all", "--rate", "0/s"], 2, "'0/s' is not a rate"),
        (["--store", "memory://", "dlq", "edit", "x", "--args", "{}"], 2, "JSON of another kind; write a list"),
        (["--store", "memory://", "dlq", "edit", "x", "--kwargs", "{"], 2, "'{' is not JSON"),
        (["--store", "memory://", "dlq", "edit", "x"], 2, "Nothing to change"),
        (["--store", "memory://", "dlq", "requeue"], 2, "Say which dead letters"),
        (["--store", "memory://", "dlq", "purge", "x", "--all"], 2, "only one of the three"),
        (["--store", "memory://", "dlq", "list", "--reason", "bored"], 2, "'bored' is not one of"),
        (["--store", "memory://", "dlq", "export", "--json"], 2, "name one"),
        (["--store", "memory://", "dlq", "export", "/no/such/directory/x"], 1, "cannot be written"),
        (["--store", "memory://", "dlq", "import", "/no/such/file"], 2, "No such file"),
        (["--store", "memory://", "--namespace", "a b", "status"], 1, "namespace: 'a b' must be a word"),
        (["dlq", "list", "-A", "no_such_module"], 1, "-A no_such_module: cannot be loaded (ModuleNotFoundError"),
        (["dlq", "list", "-A", "os.path"], 1, "name a module that holds a Celery app"),
        (["relay"], 1, "name the app with -A"),
        (["--bogus"], 2, "No such option"),
        (["bogus"], 2, "No such command 'bogus'; see `taskguard --help`"),
        (["revoke"], 2, "Missing argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_mistake_is_one_line_with_the_way_out(words: list[str], status: int, part: str) -> None:
    """Status 1, or 2 for what was typed wrongly; secrets in a URL are not repeated."""
    result = run(*words)
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == status
    assert result.stderr.startswith("taskguard: ")
    assert result.stderr.count("\n") == 1
    assert part in result.stderr
    assert "secret" not in result.stderr
    assert result.stdout == ""


def test_settings_in_the_environment_are_checked() -> None:
    """A bad one is named."""
    assert "lease: 'x' is not a duration" in run("status", "--store", "memory://", env={"TASKGUARD_LEASE": "x"}).stderr


def test_help_needs_no_store() -> None:
    """Nor a command."""
    assert "dlq" in run("--help").output
    for words in (["dlq", "--help"], ["dlq", "requeue", "-h"], ["relay", "--help"], ["status", "--help"]):
        assert run(*words).exit_code == 0, words


@pytest.mark.parametrize("words", [["dlq", "list"], ["status"]], ids=" ".join)
def test_without_rich_tables_name_the_extra(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery brings click but not rich; JSON works without it."""
    real = builtins.__import__

    def without_rich(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "rich":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    for module in [name for name in sys.modules if name.startswith("taskguard.cli.") and name.endswith("screen")]:
        monkeypatch.delitem(sys.modules, module)
    for package in ("taskguard.cli", "taskguard.cli.dlq"):
        monkeypatch.delattr(sys.modules[package], "screen", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_rich)
    result = run(*words, "--store", "memory://")
    assert result.exit_code == 1
    assert result.stderr == (
        "taskguard: tables need rich, which is not installed; pip install 'taskguard[cli]', or add --json\n"
    )
    assert run(*words, "--store", "memory://", "--json").exit_code == 0


@pytest.mark.parametrize("bug", [KeyError("x"), ModuleNotFoundError("no", name="numpy"), BrokenPipeError(32, "pipe")])
def test_a_bug_keeps_its_traceback(bug: Exception) -> None:
    """Only what the operator can mend is told in one line; a closed pipe is click's to end quietly."""
    with pytest.raises(type(bug)), complaining():
        raise bug


def test_a_failing_disk_is_a_complaint(tmp_path: Path) -> None:
    """Not a traceback."""
    with pytest.raises(click.ClickException, match="Is a directory"), complaining():
        tmp_path.open("w")


def test_hostile_text_is_shown_escaped() -> None:
    """Terminal sequences, bidirectional overrides and lone surrogates; printable text of any script stays."""
    assert clean("naïve 日本") == "naïve 日本"
    assert clean(HOSTILE) == ("\\x1b[2J\\x1b]0;owned\\x07 [bold]markup[/] \\u202eright to left\\u2066 \\x9b31m \\ud800")
    assert clean("a\nb") == "a\\nb"
    assert clean("a\nb\x00", lines=True) == "a\nb\\x00"
    assert one_line(" a\n  b ") == "a b"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (-3, "0s"), (59.9, "59s"), (60, "1m"), (7199, "1h"), (200000, "2d")]
)
def test_ages_are_short(seconds: float, text: str) -> None:
    """The largest whole unit."""
    assert age(seconds) == text


def test_counts_have_their_noun() -> None:
    """One letter, two letters."""
    assert (plural(1, "letter"), plural(2000, "letter")) == ("1 letter", "2,000 letters")
