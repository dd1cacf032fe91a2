"""Moving rules between a store and a file of JSON or TOML: ``export``, ``import``."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import click

from taskguard.cli.complaints import Complaint
from taskguard.cli.connection import with_new_rules, with_rules
from taskguard.cli.limits.words import tiers_option
from taskguard.cli.output import confirm, json_option, print_json, yes_option
from taskguard.cli.text import one_line, plural
from taskguard.cli.who import operator, why_option
from taskguard.errors import ConfigurationError
from taskguard.limiter.rulefile import declared_in, rules_from
from taskguard.ports import RuleStore
from taskguard.rules import TIERS, RuleSet


@click.command("export")
@click.argument("path", metavar="[FILE]", default="-", type=click.Path(dir_okay=False, allow_dash=True))
@with_rules
def export_rules(rules: RuleStore, path: str) -> None:
    """Write all rules as JSON, to stdout or a new FILE. `limits import` reads it."""
    found = rules.rules() or RuleSet()
    lines = ",\n  ".join(json.dumps(rule.as_dict()) for rule in found.rules)
    # Tiers of rules that nobody declared, in a store from before they were kept, are declared by the file.
    tiers = found.tiers or (found.known_tiers if found.known_tiers != TIERS else ())
    declared = f'"tiers": {json.dumps(tiers)}, ' if tiers else ""
    text = f'{{"version": {found.version}, {declared}"rules": [\n  {lines}\n]}}'
    if not lines:
        text = f'{{"version": {found.version if tiers else 0}, {declared}"rules": []}}'
    if path == "-":
        click.echo(text)
        return
    if Path(path).exists():
        raise Complaint(f"{path}: exists already; name another file")
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as exc:
        raise Complaint(f"{path}: cannot be written ({exc.strerror}); name a file in a directory that can") from exc
    click.echo(f"Exported {plural(len(found.rules), 'rule')} to {path}.")


@click.command("import")
@click.argument("path", metavar="[FILE]", default="-", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("--replace", is_flag=True, help="Remove the rules that FILE does not name.")
@click.option("--dry-run", is_flag=True, help="Check the file and say what would change.")
@tiers_option
@why_option
@with_new_rules
@yes_option
@json_option
def import_rules(
    rules: RuleStore,
    path: str,
    replace: bool,
    dry_run: bool,
    tiers: tuple[str, ...] | None,
    why: str,
    yes: bool,
    as_json: bool,
) -> None:
    """Read rules from FILE (JSON, or TOML where its name ends so) or stdin, and put them in one step: all or none."""
    data, before = _read(path), rules.rules() or RuleSet()
    try:
        found = rules_from(data, tiers=tiers or before.known_tiers)
        declared = declared_in(data) or tiers
    except ConfigurationError as exc:
        raise Complaint(f"{path}: {exc}") from exc
    if declared and not replace:  # the tiers of the rules that stay
        declared = tuple(dict.fromkeys((*before.tiers, *declared)))
    ids = {rule.id for rule in found}
    kept = [] if replace else [rule for rule in before.rules if rule.id not in ids]
    after = RuleSet(before.version, (*found, *kept), declared or before.tiers)
    what = after.changes_since(before)
    gone = [rule.id for rule in before.rules if rule.id not in {each.id for each in after.rules}]
    if gone and not dry_run:
        confirm(f"Remove {plural(len(gone), 'rule')} that the file does not name?", yes=yes)
    version = before.version if dry_run else rules.put(found, who=operator(), why=why, replace=replace, tiers=declared)
    if as_json:
        print_json([{"version": version, "rules": len(found), "changed": what.split(), "dry_run": dry_run}])
        return
    if not what:
        click.echo(f"Nothing to change: version {version} is the same.")
        return
    done = "Would change" if dry_run else f"Imported {plural(len(found), 'rule')}, version {version}"
    click.echo(f"{done}: {one_line(what)}")


def _read(path: str) -> object:
    try:
        with click.open_file(path, "rb") as file:
            data = file.read()
        text = data.decode("utf-8")
        if Path(path).suffix.lower() == ".toml":
            return tomllib.loads(text)
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        kind = "TOML" if Path(path).suffix.lower() == ".toml" else "JSON"
        raise Complaint(
            f"{path}: is not {kind} ({exc}); write a list of rules as `taskguard limits export` does"
        ) from exc
    except OSError as exc:
        raise Complaint(f"{path}: cannot be read ({exc.strerror})") from exc
