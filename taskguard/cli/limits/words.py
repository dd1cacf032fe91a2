"""What the commands about rules share: the options that name a call, the tiers, and a rule's match in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from taskguard.rules import FIELDS, TIERS, Rule

Command = Callable[..., Any]

_HELP = {
    "client": "Client, such as 'acme', 'acme-*', 'ip:203.0.113.7'.",
    "endpoint": "Endpoint, such as 'POST /orders' or the name of a downstream.",
    "task": "Task, such as 'shop.charge' or 'shop.*'.",
    "tier": "Tier or role, such as 'premium'.",
}


def match_options(command: Command) -> Command:
    """Add ``--client``, ``--endpoint``, ``--task`` and ``--tier``."""
    for name in reversed(FIELDS):
        command = click.option(f"--{name}", metavar="TEXT", help=_HELP[name])(command)
    return command


def _tiers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if not names:
        raise click.BadParameter(f"{value!r} names no tier; write {','.join(TIERS)}", ctx, param)
    return names


tiers_option = click.option(
    "--tiers",
    envvar="TASKGUARD_TIERS",
    callback=_tiers,
    metavar="NAMES",
    help=f"The tiers there are, else those kept with the rules, else {','.join(TIERS)}; or set TASKGUARD_TIERS.",
)


def matched_by(rule: Rule) -> str:
    """``client acme-*, tier premium``; "everything" for a rule that names nothing."""
    return ", ".join(f"{name} {getattr(rule, name)}" for name in FIELDS if getattr(rule, name)) or "everything"


def counted_by(rule: Rule) -> str:
    """What has a counter of its own."""
    return f"each {' and '.join(rule.per)}" if rule.per else "all together"
