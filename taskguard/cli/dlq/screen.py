"""Dead letters on a terminal. Ids are never cut, because they are what the next command needs; long errors are."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from taskguard.cli.dlq.selection import no_letter
from taskguard.cli.screen import cell, console, table
from taskguard.cli.text import age, clean, plural
from taskguard.clock import iso
from taskguard.deadletters import Tally
from taskguard.letter import DeadLetter
from taskguard.record import Attempt, Reason

WIDE = 120
"""Columns from which a letter fits on one line."""

BODY_SHOWN = 2000


def letters(found: Iterable[DeadLetter], *, limit: int, now: float) -> None:
    """A table of letters, at most *limit* of them (0: all), and how many more there are."""
    screen = console()
    wide = screen.width >= WIDE
    rows = table()
    rows.add_column("id", no_wrap=True, style="cyan", min_width=20)
    rows.add_column("age", no_wrap=True, justify="right", min_width=4)
    rows.add_column("reason", no_wrap=True, min_width=15)
    if wide:
        rows.add_column("task", no_wrap=True, overflow="ellipsis", ratio=3)
        rows.add_column("queue", no_wrap=True, overflow="ellipsis", ratio=1)
        rows.add_column("tries", no_wrap=True, justify="right", min_width=5)
        rows.add_column("error", no_wrap=True, overflow="ellipsis", ratio=5)
    else:
        rows.add_column("task and error", no_wrap=True, overflow="ellipsis", ratio=1)
    remaining = iter(found)
    for letter in islice(remaining, limit or None):
        start = (cell(letter.id), cell(age(now - letter.dead_at)), _reason(letter.failure.reason))
        task, error = cell(letter.record.task, "bold"), cell(letter.error, "dim")
        if wide:
            rows.add_row(*start, task, cell(letter.record.queue), str(len(letter.attempts)), error)
        else:
            rows.add_row(*start, Group(_cut(task), _cut(error)) if error.plain else _cut(task))
    if not rows.row_count:
        screen.print(no_letter(), soft_wrap=True)
        return
    screen.print(rows)
    more = sum(1 for _ in remaining)
    shown = f"{rows.row_count:,} of {rows.row_count + more:,} dead letters; --limit 0 shows all, filters show fewer"
    screen.print(shown if more else plural(rows.row_count, "dead letter"), style="dim")


def _cut(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _reason(reason: Reason) -> Text:
    match reason:
        case Reason.POISON | Reason.PERMANENT_ERROR | Reason.MAX_RETRIES:
            return Text(reason, style="red")
        case _:
            return Text(reason, style="yellow")


def letter(shown: DeadLetter, *, now: float) -> None:
    """One letter whole."""
    screen = console()
    facts = Table.grid(padding=(0, 2), expand=True)
    facts.add_column(no_wrap=True, style="dim")
    facts.add_column(overflow="fold", ratio=1)
    record, failure, envelope = shown.record, shown.failure, shown.envelope
    facts.add_row("id", Text(shown.id, style="cyan"))
    facts.add_row("task", cell(record.task, "bold"))
    facts.add_row("task id", cell(record.task_id))
    if record.key != record.task_id:
        facts.add_row("key", cell(record.key))
    facts.add_row("queue", cell(record.queue or "-"))
    facts.add_row("dead", f"{iso(shown.dead_at)} ({age(now - shown.dead_at)} ago)")
    facts.add_row("reason", _reason(failure.reason))
    facts.add_row("error", _block(shown.error))
    facts.add_row("group", shown.group)
    if envelope is not None and envelope.deadline_at is not None:
        facts.add_row("deadline", iso(envelope.deadline_at))
    for name, value in (("args", shown.args), ("kwargs", shown.kwargs)):
        facts.add_row(name, _block(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    if envelope is not None and shown.arguments is None:
        facts.add_row("body", f"{clean(envelope.content_type)}, {plural(len(envelope.body), 'byte')}, not decoded")
        facts.add_row("", _block(shown.body))
    screen.print(facts)
    if shown.attempts:
        screen.print(Padding(_attempts(shown.attempts), (1, 0, 0, 0)))
    if failure.traceback:
        screen.print(Padding(_block(failure.traceback, limit=len(failure.traceback)), (1, 0, 0, 2)))
    screen.print()


def _block(text: str, *, limit: int = BODY_SHOWN) -> Text:
    more = f"\n… {plural(len(text) - limit, 'character')} more; `dlq export` has all" if len(text) > limit else ""
    return Text(clean(text[:limit], lines=True), overflow="fold").append(more, style="dim")


def _attempts(attempts: Iterable[Attempt]) -> Table:
    rows = table()
    rows.add_column("at", no_wrap=True, min_width=25)
    rows.add_column("outcome", no_wrap=True, min_width=7)
    rows.add_column("worker", overflow="fold", ratio=2)
    rows.add_column("error", overflow="fold", ratio=3)
    for attempt in attempts:
        rows.add_row(
            iso(attempt.at), cell(attempt.outcome), cell(attempt.worker.partition("/")[0]), cell(attempt.error)
        )
    return rows


def groups(tallies: list[Tally], *, now: float) -> None:
    """A table of causes."""
    screen = console()
    if not tallies:
        screen.print(no_letter(), soft_wrap=True)
        return
    wide = screen.width >= WIDE
    rows = table()
    rows.add_column("group", no_wrap=True, style="cyan", min_width=8)
    rows.add_column("count", no_wrap=True, justify="right", min_width=5)
    rows.add_column("first", no_wrap=True, justify="right", min_width=5)
    rows.add_column("last", no_wrap=True, justify="right", min_width=4)
    rows.add_column("reason", no_wrap=True, min_width=15)
    if wide:
        rows.add_column("sample", no_wrap=True, style="cyan", min_width=20)
        rows.add_column("task", no_wrap=True, overflow="ellipsis", ratio=3)
        rows.add_column("error", no_wrap=True, overflow="ellipsis", ratio=5)
    else:
        rows.add_column("task and error", no_wrap=True, overflow="ellipsis", ratio=1)
    for tally in tallies:
        sample = tally.sample
        task, error = cell(sample.record.task, "bold"), cell(sample.error, "dim")
        start = (sample.group, f"{tally.count:,}", *_ages(tally, now), _reason(sample.failure.reason))
        if wide:
            rows.add_row(*start, sample.id, task, error)
        else:
            rows.add_row(*start, Group(_cut(task), _cut(error)) if error.plain else _cut(task))
    screen.print(rows)
    screen.print("`taskguard dlq requeue --group GROUP` requeues all of one cause", style="dim")


def stats(tallies: list[Tally], *, now: float) -> None:
    """A table of counts by task and reason."""
    screen = console()
    if not tallies:
        screen.print(no_letter(), soft_wrap=True)
        return
    rows = table()
    rows.add_column("task", no_wrap=True, overflow="ellipsis", ratio=1)
    rows.add_column("reason", no_wrap=True, min_width=15)
    rows.add_column("count", no_wrap=True, justify="right", min_width=5)
    rows.add_column("first", no_wrap=True, justify="right", min_width=5)
    rows.add_column("last", no_wrap=True, justify="right", min_width=4)
    for tally in tallies:
        task = cell(tally.sample.record.task, "bold")
        rows.add_row(task, _reason(tally.sample.failure.reason), f"{tally.count:,}", *_ages(tally, now))
    screen.print(rows)
    screen.print(plural(sum(tally.count for tally in tallies), "dead letter"), style="dim")


def _ages(tally: Tally, now: float) -> tuple[str, str]:
    return age(now - tally.oldest_at), age(now - tally.newest_at)
