"""Which dead letters a command means: filters for all, and ids, a group or everything for those that change them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import click

from taskguard.cli.connection import looked_in
from taskguard.cli.parameters import duration
from taskguard.deadletters import DeadLetters
from taskguard.letter import EVERYTHING, Filter
from taskguard.record import Reason

Command = Callable[..., Any]

_FILTERS = (
    click.option("--task", default="", metavar="GLOB", help="Task name, such as 'workers.*'."),
    click.option(
        "--reason",
        "reasons",
        multiple=True,
        type=click.Choice([reason.value for reason in Reason]),
        metavar="REASON",
        help=f"Why it died; may be repeated: {', '.join(Reason)}.",
    ),
    click.option("--error", default="", metavar="TEXT", help="Part of the exception's type or message."),
    click.option("--older-than", callback=duration, metavar="AGE", help="Dead for at least this long: 90s, 1h, 7d."),
    click.option("--newer-than", callback=duration, metavar="AGE", help="Dead for less than this."),
    click.option("--queue", default="", metavar="NAME", help="Queue it came from."),
    click.option("--text", default="", metavar="TEXT", help="Text anywhere in the letter."),
    click.option("--group", default="", metavar="FINGERPRINT", help="Same cause, as `dlq groups` names it."),
)


def no_letter() -> str:
    """What is said where none matches."""
    return f"No dead letter matches in the namespace {looked_in()}."


def with_filter(command: Command) -> Command:
    """Add the filter options, and hand the command the `Filter` they make as ``wanted``."""

    @wraps(command)
    def filtered(
        *args: Any,
        task: str,
        reasons: Sequence[str],
        error: str,
        older_than: float | None,
        newer_than: float | None,
        queue: str,
        text: str,
        group: str,
        **kwargs: Any,
    ) -> Any:
        wanted = Filter(
            task=task,
            reasons=frozenset(Reason(reason) for reason in reasons),
            error=error,
            queue=queue,
            text=text,
            group=group,
            older_than=older_than,
            newer_than=newer_than,
        )
        return command(*args, wanted=wanted, **kwargs)

    decorated: Command = filtered
    for option in reversed(_FILTERS):
        decorated = option(decorated)
    return decorated


def with_selection(command: Command) -> Command:
    """Add ids, filters and ``--all``, one of which must be given."""
    command = click.option("--all", "everything", is_flag=True, help="All dead letters.")(with_filter(command))
    return click.argument("names", nargs=-1, metavar="[ID]...")(command)


def selected(letters: DeadLetters, names: Sequence[str], wanted: Filter, everything: bool) -> list[str]:
    """The ids meant; the letters are not kept, because there may be very many.

    Raises UsageError when nothing was said, or two things; UnknownRecord for an id that is not there.
    """
    ways = sum((bool(names), wanted != EVERYTHING, everything))
    if ways != 1:
        raise click.UsageError(
            "Say which dead letters: ids, filters such as --reason or --group, or --all"
            + ("; only one of the three." if ways else "."),
            click.get_current_context(),
        )
    return letters.resolve(names) if names else [letter.id for letter in letters.select(wanted)]
