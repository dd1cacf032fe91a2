"""``taskguard limits``: the rules of the fleet. Looking, changing, and moving them between files are a module each."""

from __future__ import annotations

import click

from taskguard.cli.limits.change import delete, set_rule
from taskguard.cli.limits.look import explain, history, list_rules, report
from taskguard.cli.limits.transfer import export_rules, import_rules


@click.group()
def limits() -> None:
    """Limits by rules: what is set here holds in every process within a second."""


for _command in (list_rules, set_rule, delete, import_rules, export_rules, explain, report, history):
    limits.add_command(_command)
