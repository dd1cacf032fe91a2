"""Looking at rules: ``list``, ``explain``, ``report``, ``history``."""

from __future__ import annotations

import click

from taskguard import globs
from taskguard.cli.connection import with_demand, with_rules
from taskguard.cli.limits.words import counted_by, match_options, matched_by, tiers_option
from taskguard.cli.output import json_option, print_json
from taskguard.cli.parameters import duration
from taskguard.cli.text import age, one_line, plural
from taskguard.clock import iso
from taskguard.limiter.headroom import headroom
from taskguard.limiter.identity import of_call
from taskguard.policies.notation import notation
from taskguard.ports import DemandStore, RuleStore
from taskguard.rules import FIELDS, Rule, RuleSet

EMPTY = "There are no rules; `taskguard limits set ID LIMITS` makes one."
_STYLES = {"over": "red", "near": "yellow", "ok": "green"}


def _state(rule: Rule) -> str:
    return "disabled" if not rule.enabled else "shadow" if rule.shadow else rule.over_limit


@click.command("list")
@with_rules
@json_option
def list_rules(rules: RuleStore, as_json: bool) -> None:
    """All rules, the most specific first."""
    found = rules.rules() or RuleSet()
    if as_json:
        print_json(rule.as_dict() for rule in found.rules)
        return
    if not found.rules:
        click.echo(EMPTY)
        return
    from taskguard.cli.screen import cell, console, table

    rows = table()
    rows.add_column("rule", overflow="fold", style="cyan", ratio=2)
    rows.add_column("matches", overflow="fold", ratio=3)
    rows.add_column("limits", overflow="fold", ratio=3)
    rows.add_column("counts", overflow="fold", ratio=2)
    rows.add_column("over it", no_wrap=True, min_width=8)
    for rule in found.rules:
        limits = "; ".join(map(notation, rule.limits))
        counts = cell(counted_by(rule), "dim")
        rows.add_row(cell(rule.id), cell(matched_by(rule)), cell(limits), counts, cell(_state(rule)))
    screen = console()
    screen.print(rows)
    declared = f"; tiers {', '.join(found.tiers)}" if found.tiers else ""
    screen.print(cell(f"{plural(len(found.rules), 'rule')}, version {found.version}{declared}", "dim"))


@click.command("explain")
@match_options
@tiers_option
@with_rules
@json_option
def explain(
    rules: RuleStore,
    client: str | None,
    endpoint: str | None,
    task: str | None,
    tier: str | None,
    tiers: tuple[str, ...] | None,
    as_json: bool,
) -> None:
    """Which rules a call falls under, which win, and why."""
    identity = of_call(client=client, endpoint=endpoint, task=task, tier=tier)
    found = rules.rules() or RuleSet()
    verdicts = found.explain(identity)
    known = tiers or found.known_tiers
    if identity.tier and not any(globs.matches(each, identity.tier) for each in known):
        click.echo(
            f"tier {one_line(repr(identity.tier))} is not declared; known are {one_line(', '.join(known))}", err=True
        )
    if as_json:
        print_json(
            each.rule.as_dict()
            | {"applies": each.applies, "why": each.why, "counters": list(each.rule.counters(identity))}
            for each in verdicts
        )
        return
    if not verdicts:
        click.echo(EMPTY)
        return
    from taskguard.cli.screen import cell, console, table

    rows = table()
    rows.add_column("rule", overflow="fold", style="cyan", ratio=2)
    rows.add_column("", no_wrap=True, min_width=7)
    rows.add_column("limits", overflow="fold", ratio=2)
    rows.add_column("why", overflow="fold", ratio=4)
    for each in verdicts:
        mark = cell("applies", "bold green") if each.applies else cell("-", "dim")
        rows.add_row(cell(each.rule.id), mark, cell("; ".join(map(notation, each.rule.limits))), cell(each.why))
    screen = console()
    screen.print(rows)
    who = ", ".join(f"{name} {getattr(identity, name)}" for name in FIELDS if getattr(identity, name))
    applying = sum(each.applies for each in verdicts)
    screen.print(cell(f"{plural(applying, 'rule')} of {len(verdicts)} for {who or 'a call that names nothing'}", "dim"))


@click.command("report")
@click.option(
    "--since", callback=duration, default="1h", show_default=True, metavar="AGE", help="How far to look back."
)
@click.option(
    "--near", type=click.FloatRange(0, 1, min_open=True), default=0.8, show_default=True, help="Share that is near."
)
@click.option("--all", "everybody", is_flag=True, help="Also who is far from every limit.")
@with_rules
@with_demand
@json_option
def report(rules: RuleStore, demand: DemandStore, since: float, near: float, everybody: bool, as_json: bool) -> None:
    """Who is near a limit or over it, since when, and what limit would have served them."""
    now = demand.now()
    found = headroom(demand.read(since=now - since), rules.rules() or RuleSet(), near=near, now=now)
    shown = [row for row in found if everybody or row.state != "ok"]
    if as_json:
        print_json(row.as_dict() | {"since": None if row.since is None else iso(row.since)} for row in shown)
        return
    if not shown:
        click.echo(f"Nobody is near a rule's limit; {plural(len(found), 'limit')} in use within {age(since)}.")
        return
    from taskguard.cli.screen import cell, console, table

    rows = table()
    rows.add_column("", no_wrap=True, min_width=4)
    rows.add_column("client", overflow="fold", ratio=3)
    rows.add_column("endpoint", overflow="fold", ratio=3)
    rows.add_column("rule", overflow="fold", style="cyan", ratio=2)
    rows.add_column("limit", overflow="fold", ratio=3)
    rows.add_column("used", no_wrap=True, justify="right", min_width=5)
    rows.add_column("refused", no_wrap=True, justify="right", min_width=7)
    rows.add_column("for", no_wrap=True, justify="right", min_width=3)
    rows.add_column("needed", overflow="fold", ratio=3)
    for row in shown:
        rows.add_row(
            cell(row.state, _STYLES[row.state]),
            cell(row.client or "(all)"),
            cell(row.endpoint or "(all)"),
            cell(row.rule),
            cell(row.limit),
            f"{row.share:.0%}",
            f"{row.refused:,.0f}",
            "-" if row.since is None else age(max(0.0, now - row.since)),
            cell(row.needed or "-"),
        )
    screen = console()
    screen.print(rows)
    screen.print("`taskguard limits set RULE LIMITS` changes a limit live", style="dim")


@click.command("history")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Changes shown.")
@with_rules
@json_option
def history(rules: RuleStore, limit: int, as_json: bool) -> None:
    """Who changed which rules, when and why; the newest first."""
    found = rules.changes(limit=limit)
    if as_json:
        print_json(
            {"version": each.version, "at": iso(each.at), "who": each.who, "why": each.why, "what": each.what}
            for each in found
        )
        return
    if not found:
        click.echo("The rules were never changed.")
        return
    from taskguard.cli.screen import cell, console, table

    rows = table()
    rows.add_column("at", no_wrap=True, min_width=25)
    rows.add_column("who", overflow="fold", ratio=1)
    rows.add_column("what", overflow="fold", ratio=2)
    rows.add_column("why", overflow="fold", ratio=2)
    for each in found:
        rows.add_row(iso(each.at), cell(each.who), cell(each.what), cell(each.why))
    console().print(rows)
