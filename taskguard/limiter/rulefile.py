"""Rules as a file has them: what JSON or TOML was read to, checked whole before any of it counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from taskguard.errors import ConfigurationError
from taskguard.rules import Rule, RuleSet


def declared_in(found: object) -> tuple[str, ...] | None:
    """The tiers that a file declares; None where it declares none. Raises ConfigurationError."""
    return _tiers(found["tiers"]) if isinstance(found, Mapping) and "tiers" in found else None


def rules_from(found: object, *, tiers: Sequence[str] | None = None) -> tuple[Rule, ...]:
    """The rules of a file that was read: ``{"rules": [...]}``, with ``"tiers"`` where others are declared, or the list
    alone. Raises ConfigurationError."""
    if isinstance(found, Mapping):
        strangers = [name for name in found if name not in ("rules", "version", "tiers")]
        if strangers or "rules" not in found:
            raise ConfigurationError(
                f'rules: {strangers[0]!r} is not known here; write {{"rules": [{{"id": "api", "limits": "9/s"}}]}}'
                if strangers
                else 'rules: there are no "rules"; write {"rules": [{"id": "api", "limits": "9/s"}]}'
            )
        tiers = declared_in(found) or tiers
        found = found["rules"]
    if not isinstance(found, Iterable) or isinstance(found, (str, bytes)):
        raise ConfigurationError(f"rules: {found!r} is no list of rules")
    rules = tuple(Rule.from_dict(each, tiers=tiers) for each in found)
    RuleSet(0, rules)
    return rules


def _tiers(found: object) -> tuple[str, ...]:
    if isinstance(found, list) and found and all(isinstance(tier, str) and tier for tier in found):
        return tuple(found)
    raise ConfigurationError(f'rules: tiers {found!r} are no list of names; write "tiers": ["free", "premium"]')
