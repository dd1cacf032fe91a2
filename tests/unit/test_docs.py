"""The documentation keeps its word: its examples run, its commands exist, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import get_args

import click
import pytest

from taskguard.cli import cli
from taskguard.custody import Claim
from taskguard.record import Reason, State
from taskguard.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return [text for name, text in BLOCK.findall(page.read_text()) if name == language]


def python(source: str, namespace: str) -> str:
    """Run *source* in an interpreter and a namespace of its own; returns what it printed."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("TASKGUARD_", "CELERY_"))}
    environ |= {"TASKGUARD_NAMESPACE": namespace, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", source], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_example_prints_what_the_readme_says(namespace: str) -> None:
    """Whoever types the ten lines sees just the lines below them."""
    readme = ROOT / "README.md"
    assert python(blocks(readme, "python")[0], namespace) in blocks(readme, "text")


def test_all_examples_run_one_after_the_other(namespace: str) -> None:
    """Every block marked python runs as it stands, after those before it, and declares tasks that Celery can build."""
    examples = [block for page in PAGES for block in blocks(page, "python")]
    assert len(examples) > 5
    python("\n".join([*examples, "app.finalize()"]), namespace)


@each_page
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    """Links within the project are relative, and name what is there."""
    for target in LINK.findall(page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        meant = (page.parent / path).resolve() if path else page
        assert meant.is_file(), target
        assert not anchor or anchor in {slug(heading) for heading in HEADING.findall(meant.read_text())}, target


def slug(heading: str) -> str:
    """The anchor that a heading gets on the web."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@each_page
def test_every_command_exists_with_its_options(page: Path) -> None:
    """What the pages tell people to type is there: the command, and each of its options."""
    for words in commands(page.read_text()):
        follow(words)


def test_commands_that_do_not_exist_are_found_out() -> None:
    """The test above would notice."""
    text = "```console\n$ taskguard status --json\n```\nand `celery -A app taskguard dlq list`"
    assert list(commands(text)) == [["status", "--json"], ["dlq", "list"]]
    for wrong in ("dlq lst", "dlq list --jsn", "--stroe x status"):
        with pytest.raises(AssertionError):
            follow(wrong.split())


def commands(text: str) -> Iterator[list[str]]:
    """The words after each ``taskguard`` that is meant to be typed."""
    typed = [line[2:] for block in BLOCK.findall(text) for line in block[1].splitlines() if line.startswith("$ ")]
    for line in [*typed, *INLINE.findall(BLOCK.sub("", text))]:
        found = re.match(r"(?:celery -A \S+ )?taskguard (\S.*)", line)
        if found:
            yield shlex.split(found[1])


def follow(words: list[str]) -> None:
    """Walk from the root command along *words*."""
    context = cli.make_context("taskguard", [], resilient_parsing=True)
    remaining = iter(words)
    for word in remaining:
        command = context.command
        if word.startswith("-"):
            known = {name: option for option in command.get_params(context) for name in option.opts}
            assert word in known, f"{context.command_path} has no option {word}"
            option = known[word]
            if isinstance(option, click.Option) and not option.is_flag:
                assert next(remaining, None) is not None, f"{word} needs a value"
        elif isinstance(command, click.Group):
            below = command.get_command(context, word)
            assert below is not None, f"{context.command_path} has no command {word}"
            context = below.make_context(word, [], parent=context, resilient_parsing=True)


def test_the_settings_page_has_every_setting_with_its_default() -> None:
    """One row for each field of `Settings`, in its order."""
    rows = re.findall(r"^\| `(\w+)` \| `?([^`|]+?)`? \|", (ROOT / "docs/settings.md").read_text(), re.MULTILINE)
    settings = fields(Settings)
    expected = [(field.name, "none" if field.default is None else str(field.default)) for field in settings]
    assert rows[: len(settings)] == expected


@pytest.mark.parametrize(
    ("page", "names"), [("architecture.md", State), ("operations.md", State), ("operations.md", Reason)]
)
def test_states_and_reasons_are_all_explained(page: str, names: type[StrEnum]) -> None:
    """No state and no reason is left out of the pages that list them."""
    text = (ROOT / "docs" / page).read_text()
    assert [name for name in names if name not in text] == []


def test_the_answers_to_a_claim_are_all_explained() -> None:
    """The table in the architecture has just the members of `Claim`."""
    table = (ROOT / "docs/architecture.md").read_text().partition("### What a claim answers")[2].partition("###")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [answer.__name__ for answer in get_args(Claim)]


def test_the_events_are_all_explained() -> None:
    """Each name that an event is given in the source has a row in the operations page, and each row a source."""
    sources = "\n".join(path.read_text() for path in (ROOT / "taskguard").rglob("*.py"))
    table = (ROOT / "docs/operations.md").read_text().partition("## Events")[2]
    rows = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert set(re.findall(r"Event\(\s*name=\"(\w+)\"", sources)) <= rows
    assert [name for name in rows if f'"{name}"' not in sources] == []


def test_make_targets_that_are_named_exist() -> None:
    """``make demo`` and its like."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"(?:`|\$ )make ([a-z-]+)", page.read_text())}
    assert {"demo", "test", "lint"} <= named <= targets
