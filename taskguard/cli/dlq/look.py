"""Reading dead letters: ``list``, ``search``, ``show``, ``groups``, ``stats``."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import click

from taskguard.cli.connection import with_store
from taskguard.cli.dlq.selection import with_filter
from taskguard.cli.output import json_option, print_json
from taskguard.clock import iso
from taskguard.deadletters import DeadLetters, Tally
from taskguard.letter import DeadLetter, Filter
from taskguard.ports import MessageStore

TABLE_LIMIT = 100

limit_option = click.option(
    "--limit",
    type=click.IntRange(min=0),
    metavar="N",
    help=f"At most so many, 0 for all; a table has {TABLE_LIMIT} unless told, JSON all.",
)


@click.command("list")
@with_store
@with_filter
@limit_option
@json_option
def list_letters(store: MessageStore, wanted: Filter, limit: int | None, as_json: bool) -> None:
    """List dead letters, the oldest first."""
    _print(store, DeadLetters(store).select(wanted), limit, as_json)


@click.command("search")
@click.argument("words", metavar="TEXT")
@with_store
@with_filter
@limit_option
@json_option
def search(store: MessageStore, words: str, wanted: Filter, limit: int | None, as_json: bool) -> None:
    """List dead letters that hold TEXT anywhere in them."""
    letters = (letter for letter in DeadLetters(store).select(wanted) if words.casefold() in letter.text().casefold())
    _print(store, letters, limit, as_json)


def _print(store: MessageStore, letters: Iterable[DeadLetter], limit: int | None, as_json: bool) -> None:
    if as_json:
        print_json(letter.as_dict() for letter in islice(letters, limit or None))
        return
    from taskguard.cli.dlq import screen

    screen.letters(letters, limit=TABLE_LIMIT if limit is None else limit, now=store.now())


@click.command("show")
@click.argument("names", nargs=-1, required=True, metavar="ID...")
@with_store
@json_option
def show(store: MessageStore, names: tuple[str, ...], as_json: bool) -> None:
    """Show dead letters whole. ID may be the beginning of one, or a task id."""
    desk = DeadLetters(store)
    found = [letter for id in desk.resolve(names) if (letter := desk.find(id))]
    if as_json:
        print_json(letter.as_dict() for letter in found)
        return
    from taskguard.cli.dlq import screen

    for letter in found:
        screen.letter(letter, now=store.now())


@click.command("groups")
@with_store
@with_filter
@json_option
def groups(store: MessageStore, wanted: Filter, as_json: bool) -> None:
    """Count dead letters by cause, the most frequent first."""
    tallies = DeadLetters(store).groups(wanted)
    if as_json:
        print_json(
            {"group": t.sample.group, **_tally(t), "error": t.sample.error, "sample": t.sample.id} for t in tallies
        )
        return
    from taskguard.cli.dlq import screen

    screen.groups(tallies, now=store.now())


@click.command("stats")
@with_store
@with_filter
@json_option
def stats(store: MessageStore, wanted: Filter, as_json: bool) -> None:
    """Count dead letters by task and reason."""
    tallies = DeadLetters(store).stats(wanted)
    if as_json:
        print_json(_tally(tally) for tally in tallies)
        return
    from taskguard.cli.dlq import screen

    screen.stats(tallies, now=store.now())


def _tally(tally: Tally) -> dict[str, object]:
    return {
        "task": tally.sample.record.task,
        "reason": tally.sample.failure.reason.value,
        "count": tally.count,
        "first_at": iso(tally.oldest_at),
        "last_at": iso(tally.newest_at),
    }
