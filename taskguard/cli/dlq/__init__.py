"""``taskguard dlq``: the dead letters. Reading, changing, and moving them between files are a module each."""

from __future__ import annotations

import click

from taskguard.cli.dlq.change import edit, purge, requeue
from taskguard.cli.dlq.look import groups, list_letters, search, show, stats
from taskguard.cli.dlq.transfer import export_letters, import_letters


@click.group()
def dlq() -> None:
    """Dead letters: messages that will not run again until somebody says so."""


for _command in (list_letters, show, search, groups, stats, requeue, edit, purge, export_letters, import_letters):
    dlq.add_command(_command)
