"""Moving dead letters between a store and a file of JSON Lines: ``export``, ``import``."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import click

from taskguard.cli.complaints import Complaint
from taskguard.cli.connection import with_new_store, with_store
from taskguard.cli.dlq.selection import with_filter
from taskguard.cli.output import json_option, print_json, progress
from taskguard.cli.text import plural
from taskguard.deadletters import DeadLetters
from taskguard.letter import Filter
from taskguard.letterfile import load, to_line
from taskguard.ports import MessageStore


@click.command("export")
@click.argument("path", metavar="[FILE]", default="-", type=click.Path(dir_okay=False, allow_dash=True))
@with_store
@with_filter
@json_option
def export_letters(store: MessageStore, path: str, wanted: Filter, as_json: bool) -> None:
    """Write dead letters whole, as JSON Lines, to stdout or a new FILE, which appears when it is complete."""
    if as_json and path == "-":
        raise click.UsageError("--json tells of the letters written to a FILE; name one.", click.get_current_context())
    if path != "-" and Path(path).exists():
        raise Complaint(f"{path}: exists already, and may be the only copy of its letters; name another file")
    written = []
    count = 0
    try:
        target = click.open_file(path, "w", encoding="utf-8", atomic=path != "-")
    except OSError as exc:
        raise Complaint(f"{path}: cannot be written ({exc.strerror}); name a file in a directory that can") from exc
    with target as file:
        for letter in progress(DeadLetters(store).select(wanted), "exporting"):
            file.write(to_line(letter) + "\n")
            count += 1
            if as_json:
                written.append(letter.as_dict())
    if as_json:
        print_json(written)
    elif path != "-":
        click.echo(f"Exported {plural(count, 'dead letter')} to {path}.")


@click.command("import")
@click.argument("file", metavar="[FILE]", default="-", type=click.File("r", encoding="utf-8", errors="surrogateescape"))
@with_new_store
@json_option
def import_letters(store: MessageStore, file: IO[str], as_json: bool) -> None:
    """Read what `dlq export` wrote, from FILE or stdin. Letters the store knows are left as they are."""
    results = progress(load(store, file), "importing")
    if as_json:
        print_json({"id": id, "imported": new} for id, new in results)
        return
    new = [is_new for _, is_new in results]
    known = len(new) - sum(new)
    click.echo(f"Imported {plural(sum(new), 'dead letter')}" + (f"; {known:,} known already." if known else "."))
