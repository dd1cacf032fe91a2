"""``taskguard revoke``: tasks that must never run."""

from __future__ import annotations

import click

from taskguard.cli.connection import with_new_store
from taskguard.cli.output import json_option, print_json
from taskguard.cli.parameters import duration
from taskguard.cli.text import age, plural
from taskguard.ports import MessageStore


@click.command("revoke")
@click.argument("task_ids", nargs=-1, required=True, metavar="TASK_ID...")
@click.option(
    "--for",
    "retention",
    callback=duration,
    default="7d",
    metavar="AGE",
    help="How long it holds.",
)
@with_new_store
@json_option
def revoke(store: MessageStore, task_ids: tuple[str, ...], retention: float, as_json: bool) -> None:
    """Make tasks never run, whichever worker meets them and however often workers die. What runs already goes on."""
    store.revoke(task_ids, retention=retention)
    if as_json:
        print_json({"task_id": task_id, "revoked": True} for task_id in task_ids)
        return
    click.echo(f"Revoked {plural(len(task_ids), 'task')} for {age(retention)}: discarded when a worker meets them.")
