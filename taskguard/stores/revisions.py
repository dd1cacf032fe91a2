"""Rules as they are revised: read whole, checked whole, written if nobody else has written meanwhile.

A store of rules only reads and writes; that two operators cannot make a set together that neither would have been
allowed to make is decided here, by trying again on what the other has made.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from taskguard.errors import StoreUnavailable
from taskguard.rules import Rule, RuleSet

LOOK: Final = 0.5
"""Seconds between two looks for a new version, for whoever cannot be told, or whose telling was lost."""
LOG: Final = 200
"""Changes that are kept."""
_TRIES: Final = 50
_TIERS: Final = "/tiers"
"""Under what the declared tiers rest among the rules: no rule can have this id."""


def read_set(version: int, texts: Iterable[str]) -> RuleSet:
    """The set behind the JSON at rest: an object for each rule, and a list where tiers are declared."""
    rules, tiers = [], ()
    for text in texts:
        found = json.loads(text)
        if isinstance(found, list):
            tiers = tuple(found)
        else:
            rules.append(Rule.from_dict(found))
    return RuleSet(version, tuple(rules), tiers)


class RevisedRules(ABC):
    """The changing half of a `RuleStore`."""

    @abstractmethod
    def rules(self, known: int = 0) -> RuleSet | None:
        """As the port has it."""

    @abstractmethod
    def _write(
        self, after: RuleSet, put: Sequence[tuple[str, str]], gone: Sequence[str], *, who: str, why: str, what: str
    ) -> int | None:
        """Make *after* of the rules of its version, in one step. The new version; None if they moved on.

        put: id and JSON of what is new or changed. gone: ids of what is not there any more.
        """

    def put(
        self, rules: Sequence[Rule], *, who: str, why: str, replace: bool = False, tiers: Sequence[str] | None = None
    ) -> int:
        ids = {rule.id for rule in rules}

        def revised(before: RuleSet) -> tuple[Rule, ...]:
            return (*rules, *(() if replace else (rule for rule in before.rules if rule.id not in ids)))

        return self._revise(revised, who=who, why=why, tiers=tiers)

    def delete(self, ids: Sequence[str], *, who: str, why: str) -> list[str]:
        there: list[str] = []

        def revised(before: RuleSet) -> tuple[Rule, ...]:
            there[:] = [rule.id for rule in before.rules if rule.id in ids]
            return tuple(rule for rule in before.rules if rule.id not in ids)

        self._revise(revised, who=who, why=why)
        return there

    def _revise(
        self,
        revised: Callable[[RuleSet], tuple[Rule, ...]],
        *,
        who: str,
        why: str,
        tiers: Sequence[str] | None = None,
    ) -> int:
        for _ in range(_TRIES):
            before = self.rules() or RuleSet()
            declared = before.tiers if tiers is None else tuple(dict.fromkeys(tiers))
            after = RuleSet(before.version, revised(before), declared)
            what = after.changes_since(before)
            if not what:
                return before.version
            known = {rule.id: rule for rule in before.rules}
            changed = [rule for rule in after.rules if known.pop(rule.id, None) != rule]
            put, gone = [(rule.id, json.dumps(rule.as_dict())) for rule in changed], list(known)
            if after.tiers and after.tiers != before.tiers:
                put.append((_TIERS, json.dumps(after.tiers)))
            elif before.tiers and not after.tiers:
                gone.append(_TIERS)
            version = self._write(after, put, gone, who=who, why=why, what=what)
            if version is not None:
                return version
        raise StoreUnavailable(f"rules: others changed them {_TRIES} times while this change was made; try again")
