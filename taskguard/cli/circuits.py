"""``taskguard circuits``: what the fleet's circuits stand at, and an operator's word over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from taskguard.cli.complaints import Complaint
from taskguard.cli.connection import with_permits
from taskguard.cli.output import json_option, print_json
from taskguard.cli.parameters import lasting
from taskguard.cli.parameters import names as names_given
from taskguard.cli.text import age, one_line, plural
from taskguard.cli.who import operator, why_option
from taskguard.clock import iso
from taskguard.permits import CircuitView
from taskguard.policies.circuit import CircuitState
from taskguard.ports import PermitStore

SOME = 8
"""Circuits that a complaint names."""
_STYLES = {"closed": "green", "open": "red", "half_open": "yellow"}
_MEANS = {
    "closed": "calls go through, and failures are counted",
    "open": "calls are refused until the first probe",
    "half_open": "only probes go through",
    "forced_open": "an operator has calls refused",
    "forced_closed": "an operator has calls go through, whatever fails",
    "disabled": "an operator has it count nothing",
}


@click.group()
def circuits() -> None:
    """Circuits of downstreams: what they stand at, and an operator's word. Held by the whole fleet within a second."""


def _as_dict(view: CircuitView) -> dict[str, Any]:
    return {
        "name": view.name,
        "state": view.state,
        "until": None if view.until is None else iso(view.until),
        "calls": view.calls,
        "failures": view.failures,
        "slow": view.slow,
        "trips": view.trips,
        "closed_at": iso(view.closed_at) if view.closed_at else None,
        "generation": view.generation,
        "who": view.who,
        "why": view.why,
    }


@circuits.command("list")
@with_permits
@json_option
def list_circuits(permits: PermitStore, as_json: bool) -> None:
    """All circuits that were ever told of a call."""
    views, now = sorted(permits.circuits(), key=lambda view: view.name), permits.now()
    if as_json:
        print_json(map(_as_dict, views))
        return
    if not views:
        click.echo("No circuit was told of a call yet.")
        return
    from taskguard.cli.screen import cell, console, table

    rows = table()
    rows.add_column("circuit", overflow="fold", style="bold", ratio=3)
    rows.add_column("state", no_wrap=True, min_width=13)
    rows.add_column("for", no_wrap=True, justify="right", min_width=4)
    rows.add_column("calls", no_wrap=True, justify="right", min_width=5)
    rows.add_column("failed", no_wrap=True, justify="right", min_width=6)
    rows.add_column("slow", no_wrap=True, justify="right", min_width=4)
    rows.add_column("by", overflow="fold", ratio=1)
    rows.add_column("why", overflow="fold", ratio=2)
    for view in views:
        rows.add_row(
            cell(view.name),
            cell(view.state, _STYLES.get(view.state, "magenta")),
            "-" if view.until is None else age(max(0.0, view.until - now)),
            f"{view.calls:,}",
            f"{view.failures:,}",
            f"{view.slow:,}",
            cell(view.who),
            cell(view.why),
        )
    screen = console()
    screen.print(rows)
    screen.print(plural(len(views), "circuit"), style="dim")


@circuits.command("show")
@click.argument("name", metavar="NAME")
@with_permits
@json_option
def show(permits: PermitStore, name: str, as_json: bool) -> None:
    """One circuit: its state, until when, what its window holds, and whose word it is."""
    view, now = _known(permits, [name])[0], permits.now()
    if as_json:
        print_json([_as_dict(view)])
        return
    until = "" if view.until is None else f", for another {age(max(0.0, view.until - now))} (until {iso(view.until)})"
    lines = [
        f"{one_line(view.name)}: {view.state}{until}",
        f"  {_MEANS[view.state]}",
        f"  window: {plural(view.calls, 'call')}, {view.failures:,} failed, {view.slow:,} slow",
        f"  opened {plural(view.trips, 'time')} since it was last closed",
    ]
    if view.who or view.why:
        lines.append(f"  by {one_line(view.who) or 'nobody'}: {one_line(view.why) or 'no reason given'}")
    click.echo("\n".join(lines))


def _known(permits: PermitStore, names: Sequence[str]) -> list[CircuitView]:
    found = {view.name: view for view in permits.circuits()}
    for name in names:
        if name not in found:
            some = ", ".join(map(repr, sorted(found)[:SOME]))
            there = f"there are {some}{' and more' if len(found) > SOME else ''}" if found else "there is none yet"
            raise Complaint(
                f"no circuit {name!r} was told of a call; {there}; `taskguard circuits list` shows those there are"
            )
    return [found[name] for name in names]


def _force(name: str, state: CircuitState, help: str, done: str) -> None:
    """Add a command that puts an operator's word on circuits."""
    lasts = state != "closed"

    def command(
        permits: PermitStore, names: tuple[str, ...], why: str, as_json: bool, period: float | None = None
    ) -> None:
        if not lasts:  # a word that nobody gave cannot be taken back, and would make a circuit of a slip of the hand
            _known(permits, names)
        until = None if period is None else permits.now() + period
        views = [permits.force(each, state, until=until, who=operator(), why=why) for each in names]
        if as_json:
            print_json(map(_as_dict, views))
            return
        end = "" if not lasts else f" for {age(period)}" if period is not None else " until `taskguard circuits reset`"
        for each in names:
            click.echo(f"{done} {one_line(each)}{end}.")

    decorated: Callable[..., Any] = json_option(with_permits(why_option(command)))
    if lasts:
        option = click.option("--for", "period", callback=lasting, metavar="AGE", help="Ends by itself after so long.")
        decorated = option(decorated)
    argument = click.argument("names", nargs=-1, required=True, metavar="NAME...", callback=names_given)
    decorated = argument(decorated)
    circuits.command(name, help=help)(decorated)


_force("open", "forced_open", "Have calls refused, in the whole fleet.", "Opened")
_force("close", "forced_closed", "Have calls go through, whatever fails.", "Closed, by force,")
_force("disable", "disabled", "Have calls go through, and nothing counted.", "Disabled")
_force("reset", "closed", "Take an operator's word back: closed, and counting anew.", "Reset")
