"""The end of the demo: the table, as text or JSON, and the commands that go on from there."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from taskguard.demo.contestants import LEASE, VISIBILITY_TIMEOUT
from taskguard.demo.ledger import Reckoning

Row = tuple[str, Sequence[int], str]


def table(columns: Mapping[str, Reckoning]) -> Table:
    """The columns side by side, by title."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=True, show_footer=False)
    shown.add_column("")
    for title in columns:
        shown.add_column(title, justify="right", min_width=12)
    for name, values, style in _rows(list(columns.values())):
        cells = [Text(f"{value:,}", style=_style(style, value)) for value in values]
        shown.add_row(Text(name, style="dim" if name.startswith("  ") else ""), *cells)
    return shown


def _style(style: str, value: int) -> str:
    if style == "verdict":
        return "bold red" if value else "bold green"
    return style


def _rows(columns: Sequence[Reckoning]) -> list[Row]:
    def row(name: str, field: str, style: str = "") -> Row:
        return name, [getattr(column, field) for column in columns], style

    reasons = dict.fromkeys(reason for column in columns for reason in column.dead)
    rows: list[Row] = [
        row("orders", "orders"),
        row("messages sent", "sent"),
        row("  duplicates among them", "duplicates", "dim"),
        row("messages delivered", "delivered"),
        row("calls to the bank", "calls"),
        row("  answered 503, being down", "unavailable", "dim"),
        row("  answered 429, being asked too often", "limited", "dim"),
        row("  refused, account frozen", "refused", "dim"),
        row("  repeated, known by their key", "repeated", "dim"),
        row("charges by the bank", "charges", "bold"),
        row("duplicates suppressed before the bank", "suppressed"),
        row("half done when their worker was killed", "held"),
        row("  rescued", "rescued", "green"),
        ("dead letters", [sum(column.dead.values()) for column in columns], "magenta"),
        *((f"  {reason}", [column.dead.get(reason, 0) for column in columns], "dim") for reason in reasons),
        row("discarded, visibly", "discarded"),
        row("lost", "lost", "verdict"),
    ]
    if any(column.hidden for column in columns):
        rows.append(row("  of them hidden in the broker", "hidden", "dim"))
    rows.append(row("charged twice", "charged_twice", "verdict"))
    if any(column.contradictions for column in columns):
        rows.append(row("charged, and dead or discarded as well", "contradictions", "verdict"))
    return rows


STOCK_NOTES = (
    "Plain Celery runs with acks_late, prefetch 1, retries with backoff and half of the bank's limit for each worker; "
    "a worker that dies is started again. What it calls dead letters here are failures in its result backend: visible, "
    "but the message is gone.",
    "It gives the bank the task's id as Idempotency-Key, the only name it has for a piece of work. Without one, the "
    "repeated calls would be charges too.",
    "Orders hidden in the broker come back after the visibility timeout, an hour by default; a shorter one runs long "
    "tasks twice. Custody makes it safe: taskguard runs "
    f"with {VISIBILITY_TIMEOUT:.0f} s here, and a lease of {LEASE:.0f} s.",
    "The misshapen messages come last, because the first of them stops its workers for good.",
)


def outage(columns: Mapping[str, Reckoning]) -> Text:
    """One sentence for each column: what the bank was asked while it was down."""
    sentences = []
    for title, it in columns.items():
        probes = f"{it.probes} probe{'' if it.probes == 1 else 's'}"
        how = f": {it.unavailable - it.probes} until its circuit opened, then {probes}" if it.probes else ""
        sentences.append(f"{title} called it {it.unavailable:,} times{how}")
    return Text(f"While the bank was down, {'; '.join(sentences)}.")


def verdict(columns: Mapping[str, Reckoning]) -> Text:
    """One line: what the bank's books say of the first column."""
    ours = next(iter(columns.values()))
    if ours.good:
        return Text(f"✓ {ours.orders} orders, none lost, none charged twice, by the bank's own books", "bold green")
    return Text(
        f"✗ {ours.lost} orders lost, {ours.charged_twice} charged twice, {ours.contradictions} in two places",
        "bold red",
    )


def as_json(columns: Mapping[str, Reckoning], **about: Any) -> str:
    """The same as JSON: one object for each column, and *about*."""
    return json.dumps({**about, **{title: asdict(column) for title, column in columns.items()}}, indent=2)


def print_report(console: Console, columns: Mapping[str, Reckoning]) -> None:
    """Print the table with what must be known to read it."""
    console.print(table(columns))
    if len(columns) > 1:
        for note in STOCK_NOTES:
            console.print(Padding(Text(note, style="dim"), (0, 2)))
        console.print()
    console.print(Padding(outage(columns), (0, 1)))
    console.print(Padding(verdict(columns), (0, 1)))


def print_closing(console: Console, *, dead: Mapping[str, int], store: str, namespace: str) -> None:
    """Print the commands that work on what is left."""
    name = _own_name()
    options = f"--store {store} --namespace {namespace}"

    def line(text: str) -> None:
        console.print(Text(f"\n {text}"))

    def command(*lines: str) -> None:
        console.print(Text(" \\\n".join(f"     {line}" for line in lines), style="cyan"), soft_wrap=True)

    line(f"Its {sum(dead.values())} dead letters are kept, and the servers they need are up:")
    command(f"{name} dlq list {options}")
    if dead.get("permanent_error"):
        line("The bank has thawed the frozen accounts; their orders can be charged now:")
        command(f"{name} dlq requeue --reason permanent_error --yes", f"  {options}")
        command(f"{name} demo --worker")
    line("End what the demo has left running:")
    command(f"{name} demo --stop")


def _own_name() -> str:
    """How to call this program: by name where the shell finds it, else as it was called."""
    called = sys.argv[0]
    return called if Path(called).name == "taskguard" and not shutil.which("taskguard") else "taskguard"
