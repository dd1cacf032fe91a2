"""Changing rules: ``set``, ``delete``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import click

from taskguard.cli.complaints import Complaint
from taskguard.cli.connection import with_new_rules, with_rules
from taskguard.cli.limits.words import match_options, matched_by, tiers_option
from taskguard.cli.output import confirm, json_option, print_json, yes_option
from taskguard.cli.text import one_line, plural
from taskguard.cli.who import operator, why_option
from taskguard.policies.notation import notation
from taskguard.ports import RuleStore
from taskguard.rules import FIELDS, OverLimit, Rule, RuleSet


@click.command("set")
@click.argument("id", metavar="ID")
@click.argument("limits", metavar="[LIMITS]", required=False)
@match_options
@click.option(
    "--over-limit",
    type=click.Choice(get_args(OverLimit)),
    help="What becomes of calls over the limit; refuse is usual.",
)
@click.option("--per", metavar="FIELDS", help="Fields of which each value counts by itself, such as 'client,task'.")
@click.option("--shadow/--no-shadow", default=None, help="Count and report, and refuse nothing.")
@click.option("--enable/--disable", "enabled", default=None, help="Whether it applies at all.")
@click.option("--note", metavar="TEXT", help="Kept with the rule.")
@tiers_option
@why_option
@with_new_rules
@json_option
def set_rule(
    rules: RuleStore,
    id: str,
    limits: str | None,
    per: str | None,
    tiers: tuple[str, ...] | None,
    why: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Make a rule, or change one: what is not given stays as it was. LIMITS: '100/second; 5000/hour burst=9000'.

    An empty text takes a field back: --client ''. --tiers is kept with the rules.
    """
    found = rules.rules() or RuleSet()
    before = next((rule for rule in found.rules if rule.id == id), None)
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if limits is not None:
        changes["limits"] = limits
    if per is not None:
        changes["per"] = tuple(name.strip() for name in per.split(",") if name.strip())
    elif "client" in changes:
        changes["per"] = None  # counted as the new client says
    if before is None and limits is None:
        raise click.UsageError(
            f"There is no rule {id} yet: give its LIMITS, such as '100/minute'.", click.get_current_context()
        )
    known = tiers or found.known_tiers
    if before is None:
        rule = Rule(id=id, tiers=known, **changes)
    else:
        rule = replace(before, tiers=(*known, *filter(None, (before.tier,))), **changes)
    version = rules.put([rule], who=operator(), why=why, tiers=tiers)
    if as_json:
        print_json([rule.as_dict() | {"version": version, "changed": version != found.version}])
        return
    what = "Made" if before is None else "Changed" if rule != before else "Nothing to change in"
    if tiers and tiers != found.tiers:
        click.echo(f"The tiers are {one_line(', '.join(tiers))}.")
    shown = "; ".join(map(notation, rule.limits))
    click.echo(f"{what} rule {id}: {shown} for {one_line(matched_by(rule))}. Version {version}.")


@click.command("delete")
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@why_option
@with_rules
@yes_option
@json_option
def delete(rules: RuleStore, ids: tuple[str, ...], why: str, yes: bool, as_json: bool) -> None:
    """Remove rules. `limits set ID --disable` keeps one without its effect."""
    known = {rule.id for rule in (rules.rules() or RuleSet()).rules}
    if strangers := [id for id in ids if id not in known]:
        raise Complaint(f"there is no rule {strangers[0]!r}; `taskguard limits list` shows those there are")
    confirm(f"Delete {plural(len(ids), 'rule')}?", yes=yes)
    gone = rules.delete(ids, who=operator(), why=why)
    if as_json:
        print_json({"id": id, "deleted": id in gone} for id in ids)
        return
    click.echo(f"Deleted {plural(len(gone), 'rule')}.")


assert set(FIELDS) == {"client", "endpoint", "task", "tier"}  # the options of `match_options`
