"""``taskguard queues``: queues that no worker consumes for now."""

from __future__ import annotations

import getpass

import click

from taskguard.cli.connection import with_permits
from taskguard.cli.output import json_option, print_json
from taskguard.cli.parameters import lasting
from taskguard.cli.parameters import names as names_given
from taskguard.cli.text import age, one_line
from taskguard.clock import iso
from taskguard.ports import PermitStore


@click.group()
def queues() -> None:
    """Queues that no worker consumes for now. Their messages wait at the broker; what runs already goes on."""


@queues.command("pause")
@click.argument("names", nargs=-1, required=True, metavar="QUEUE...", callback=names_given)
@click.option("--for", "period", callback=lasting, metavar="AGE", help="Resume by itself after so long.")
@click.option("--why", default="", help="Shown to whoever asks.")
@with_permits
@json_option
def pause(permits: PermitStore, names: tuple[str, ...], period: float | None, why: str, as_json: bool) -> None:
    """Stop every worker from consuming queues, within a second. A worker that is started later leaves them alone."""
    until = None if period is None else permits.now() + period
    for name in names:
        permits.pause(name, until=until, who=_user(), why=why)
    if as_json:
        print_json({"queue": name, "paused": True, "until": until and iso(until)} for name in names)
        return
    end = "until taskguard queues resume" if period is None else f"for {age(period)}"
    for name in names:
        click.echo(f"Paused {one_line(name)} {end}.")


@queues.command("resume")
@click.argument("names", nargs=-1, required=True, metavar="QUEUE...")
@with_permits
@json_option
def resume(permits: PermitStore, names: tuple[str, ...], as_json: bool) -> None:
    """Let workers consume queues again, whoever paused them."""
    resumed = {name: permits.resume(name) for name in names}
    if as_json:
        print_json({"queue": name, "resumed": was} for name, was in resumed.items())
        return
    for name, was in resumed.items():
        click.echo(f"Resumed {one_line(name)}." if was else f"{one_line(name)} was not paused.")


@queues.command("list")
@with_permits
@json_option
def list_paused(permits: PermitStore, as_json: bool) -> None:
    """The paused queues: until when, by whom and why."""
    paused, now = permits.paused(), permits.now()
    if as_json:
        print_json(
            {"queue": name, "until": None if until is None else iso(until), "who": who, "why": why}
            for name, (until, who, why) in sorted(paused.items())
        )
        return
    if not paused:
        click.echo("No queue is paused.")
        return
    from taskguard.cli.screen import console, table

    rows = table()
    rows.expand = False
    for column in ("queue", "for", "by", "why"):
        rows.add_column(column)
    for name, (until, who, why) in sorted(paused.items()):
        end = "until resumed" if until is None else age(max(0.0, until - now))
        rows.add_row(one_line(name), end, one_line(who), one_line(why))
    console().print(rows)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
