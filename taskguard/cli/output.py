"""What all commands share in talking back: JSON, questions, progress. Imports rich only where it draws."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import click

from taskguard.cli.complaints import Complaint

T = TypeVar("T")

json_option = click.option("--json", "as_json", is_flag=True, help="Print a list of JSON objects.")
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")


def print_json(items: Iterable[Any]) -> None:
    """Print a JSON list, an item a line, as the items come. ASCII alone: whatever a message holds is escaped."""
    separator = "[\n"
    for item in items:
        click.echo(f"{separator}{json.dumps(item, default=str)}", nl=False)
        separator = ",\n"
    click.echo("[]" if separator == "[\n" else "\n]")


def confirm(question: str, *, yes: bool) -> None:
    """Go on only if the operator says so. Raises Complaint when there is nobody to ask."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise Complaint(f"{question} stdin is no terminal, so nobody can answer; add --yes")
    click.confirm(question, abort=True, err=True)


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """*items*, with a bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, what, total=total, console=Console(stderr=True), transient=True)
