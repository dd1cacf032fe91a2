"""Changing dead letters: ``requeue``, ``edit``, ``purge``. None of them publishes; the relay does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from taskguard.cli import parameters
from taskguard.cli.complaints import Complaint
from taskguard.cli.connection import with_store
from taskguard.cli.dlq.selection import no_letter, selected, with_selection
from taskguard.cli.output import confirm, json_option, print_json, progress, yes_option
from taskguard.cli.text import age, one_line, plural
from taskguard.clock import iso
from taskguard.deadletters import DeadLetters, Requeued
from taskguard.letter import Filter
from taskguard.ports import MessageStore
from taskguard.record import Reason

SENDER = "A running worker or `taskguard relay` sends what is due."

deadline_option = click.option(
    "--deadline",
    callback=parameters.duration,
    metavar="SECONDS",
    help="New deadline, from the moment it is due; a past one is removed.",
)


@click.command("requeue")
@with_selection
@click.option("--rate", callback=parameters.rate, metavar="RATE", help="Pace them: 50/s, 100/m.")
@deadline_option
@click.option("--dry-run", is_flag=True, help="Say what would be requeued.")
@with_store
@yes_option
@json_option
def requeue(
    store: MessageStore,
    names: tuple[str, ...],
    wanted: Filter,
    everything: bool,
    rate: float | None,
    deadline: float | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Give dead letters all their chances back, now or paced by --rate."""
    desk = DeadLetters(store)
    ids = selected(desk, names, wanted, everything)
    if len(ids) > 1 and not dry_run:
        confirm(f"Requeue {plural(len(ids), 'dead letter')}?", yes=yes)
    results = progress(desk.requeue(ids, rate=rate, deadline=deadline, dry_run=dry_run), "requeueing", total=len(ids))
    if as_json:
        print_json(_outcome(result, dry_run) for result in results)
    else:
        _report(results, store, dry_run=dry_run)


def _outcome(result: Requeued, dry_run: bool) -> dict[str, Any]:
    letter = result.letter.as_dict() if result.letter else {"id": result.id}
    due_at = None if result.due_at is None else iso(result.due_at)
    return letter | {
        "requeued": due_at is not None and not dry_run,
        "due_at": due_at,
        "problem": result.problem,
    }


def _report(results: Iterable[Requeued], store: MessageStore, *, dry_run: bool) -> None:
    due: list[float] = []
    problems: dict[str, list[str]] = {}
    reused = 0
    for result in results:
        if result.due_at is None:
            problems.setdefault(result.problem, []).append(result.id)
            continue
        due.append(result.due_at)
        reused += result.letter is not None and result.letter.failure.reason is Reason.KEY_REUSED
    if not due and not problems:
        click.echo(no_letter())
        return
    now = store.now()
    ready = sum(at <= now for at in due)
    last = f", the last in {age(max(due) - now)}" if ready < len(due) else ""
    what = "Would requeue" if dry_run else "Requeued"
    click.echo(f"{what} {plural(len(due), 'dead letter')}: {ready:,} due now{last}.")
    if due and not dry_run:
        click.echo(SENDER)
    if reused:
        click.echo(
            f"{plural(reused, 'letter')} had a key that belongs to other arguments and will come back while those are "
            "remembered; `taskguard dlq edit ID --key NEW` gives it another."
        )
    for problem, ids in problems.items():
        click.echo(f"taskguard: {plural(len(ids), 'letter')} not requeued: {ids[0]} {problem}", err=True)
    if not due:
        raise Complaint("nothing was requeued; `taskguard dlq list` shows what there is")


@click.command("edit")
@click.argument("name", metavar="ID")
@click.option("--args", callback=parameters.json_of(list), metavar="JSON", help="Positional arguments, a list.")
@click.option("--kwargs", callback=parameters.json_of(dict), metavar="JSON", help="Keyword arguments, an object.")
@click.option("--key", metavar="KEY", help="New idempotency key, for a letter of reason key_reused.")
@deadline_option
@with_store
@json_option
def edit(
    store: MessageStore,
    name: str,
    args: list[Any] | None,
    kwargs: dict[str, Any] | None,
    key: str | None,
    deadline: float | None,
    as_json: bool,
) -> None:
    """Requeue one dead letter as a new attempt with other arguments. What is not given stays as it was."""
    if args is None and kwargs is None and key is None:
        raise click.UsageError("Nothing to change: give --args, --kwargs or --key.", click.get_current_context())
    desk = DeadLetters(store)
    [id] = desk.resolve([name])
    letter = desk.find(id)
    if letter is None or not desk.edit(id, args=args, kwargs=kwargs, key=key, deadline=deadline):
        raise Complaint(f"{id} is no dead letter any more; `taskguard dlq list` shows those there are")
    if as_json:
        changes = {"args": args, "kwargs": kwargs, "key": key}
        changed = {field: value for field, value in changes.items() if value is not None}
        print_json([letter.as_dict() | changed | {"requeued": True, "due_at": iso(store.now())}])
        return
    click.echo(f"Requeued {one_line(letter.record.task)} {id} as a new attempt: 1 due now.")
    click.echo(SENDER)


@click.command("purge")
@with_selection
@with_store
@yes_option
@json_option
def purge(
    store: MessageStore, names: tuple[str, ...], wanted: Filter, everything: bool, yes: bool, as_json: bool
) -> None:
    """Forget dead letters for good. `dlq export` keeps a copy."""
    desk = DeadLetters(store)
    ids = selected(desk, names, wanted, everything)
    if ids:
        confirm(f"Purge {plural(len(ids), 'dead letter')} for good?", yes=yes)
    results = progress(desk.purge(ids), "purging", total=len(ids))
    if as_json:
        print_json({"id": id, "purged": gone} for id, gone in results)
        return
    count = sum(gone for _, gone in results)
    click.echo(f"Purged {plural(count, 'dead letter')}." if ids else no_letter())
