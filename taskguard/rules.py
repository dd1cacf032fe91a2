"""Rules: which limits a call falls under, told from outside the code. Values and pure decisions only.

A call is known by its `Identity`: client, endpoint, task, tier. A rule names any of them, exactly or with ``*``; what
it leaves out may be anything.

**Precedence.** The most specific rule comes first: exact before ``*`` before left out, compared in the order client,
endpoint, task, tier; of two globs the one with more letters; of two equals the smaller id.

**Which apply.** Rules that count the same thing compete, and the most specific wins; rules that count different things
stack, and a call needs room in all of them. What a rule counts is its `scope`: the fields it names. So a rule for
client ``acme`` takes the place of the one for all premium clients (both count a client), and both stand beside a rule
for the endpoint ``POST /orders`` as a whole. Where a client is named, the tier only tells clients apart.

**Counters.** A glob over clients counts each client by itself; every other glob counts what it matches together,
because paths and task names have no end. ``per`` says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self, get_args

from taskguard import globs
from taskguard.errors import ConfigurationError
from taskguard.permits import RateAsk
from taskguard.policies.checks import one_of
from taskguard.policies.notation import algorithm_of, notation, parse_rates
from taskguard.policies.rates import Rate

OverLimit = Literal["refuse", "queue", "fallback"]
FIELDS = ("client", "endpoint", "task", "tier")
"""The fields of an identity, in the order of precedence."""
TIERS = ("free", "basic", "premium")
"""The tiers there are unless others are declared."""
REMEMBERED = 4096
"""Identities whose rules a set remembers."""
_ID = re.compile(r"[\w.:@+-]{1,100}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who calls what, in the words of the rules. Empty: not known."""

    client: str = ""
    endpoint: str = ""
    task: str = ""
    tier: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Limits for the calls that match. Fields left empty match everything.

    limits: text such as ``"100/second; 5000/hour"``, or rate policies; all of them hold.
    over_limit: what becomes of a call over the limit: "refuse" it, "queue" it for its slot, or serve the "fallback".
    shadow: the rule is counted and reported, and refuses nothing. enabled: off, the rule is only kept.
    per: the fields of which each value has a counter of its own; left out, the client where it is given with ``*``.
    tiers: the tiers that are declared, against which ``tier`` is checked. note: for people.
    Raises ConfigurationError for what cannot work or can never match.
    """

    id: str
    limits: tuple[Rate, ...]
    client: str = ""
    endpoint: str = ""
    task: str = ""
    tier: str = ""
    over_limit: OverLimit = "refuse"
    enabled: bool = True
    shadow: bool = False
    per: tuple[str, ...] | None = None
    note: str = ""
    tiers: tuple[str, ...] = field(default=TIERS, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.id, str) and _ID.fullmatch(self.id)):
            raise ConfigurationError(f"Rule: id {self.id!r} is no name; use up to 100 letters, digits and . : @ + - _")
        for name in FIELDS:
            globs.check(self.id, name, getattr(self, name))
        if self.tier and "*" not in self.tier and self.tier not in self.tiers:
            raise ConfigurationError(
                f"rule {self.id}: tier {self.tier!r} is not declared and would match nothing; "
                f"choose one of {', '.join(self.tiers)}, or declare it"
            )
        if "*" in self.tier and not any(globs.matches(self.tier, tier) for tier in self.tiers):
            raise ConfigurationError(
                f"rule {self.id}: tier {self.tier!r} matches none of the declared {', '.join(self.tiers)}"
            )
        object.__setattr__(self, "limits", _limits(self.id, self.limits))
        one_of(f"rule {self.id}: over_limit", self.over_limit, get_args(OverLimit))
        for name in ("enabled", "shadow"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"rule {self.id}: {name} {getattr(self, name)!r} is neither true nor false")
        if not isinstance(self.note, str):
            raise ConfigurationError(f"rule {self.id}: note {self.note!r} is no text")
        object.__setattr__(self, "per", self._counted_by())

    def _counted_by(self) -> tuple[str, ...]:
        if self.per is None:
            return ("client",) if "*" in self.client else ()
        per = (self.per,) if isinstance(self.per, str) else tuple(self.per)
        for name in per:
            if name not in FIELDS:
                raise ConfigurationError(f"rule {self.id}: per {name!r} is no field; choose from {', '.join(FIELDS)}")
        return tuple(name for name in FIELDS if name in per)

    @property
    def scope(self) -> tuple[str, ...]:
        """What it counts. Of the rules of one scope that match a call, the most specific applies."""
        assert self.per is not None
        named = [name for name in FIELDS if getattr(self, name) or name in self.per]
        if "client" in named and "tier" in named and "tier" not in self.per:
            named.remove("tier")
        together = "*" in self.client and "client" not in self.per
        return ("clients together", *named[1:]) if together else tuple(named)

    @property
    def precedence(self) -> tuple[object, ...]:
        """Sorts the most specific rule first."""
        patterns = [getattr(self, name) for name in FIELDS]
        kinds = tuple(2 if not pattern else 1 if "*" in pattern else 0 for pattern in patterns)
        letters = tuple(1 - len(pattern) + pattern.count("*") if "*" in pattern else 0 for pattern in patterns)
        return kinds, letters, self.id

    def misses(self, identity: Identity) -> str:
        """The first field that does not match; empty where all do."""
        for name in FIELDS:
            pattern: str = getattr(self, name)
            if pattern and not globs.matches(pattern, getattr(identity, name)):
                return name
        return ""

    def counters(self, identity: Identity) -> tuple[str, ...]:
        """The names of the limits in the permit store, one for each of ``limits``.

        A changed number goes on counting where the old one was; a changed algorithm or window begins anew.
        """
        assert self.per is not None
        who = "".join(f"/{_quoted(getattr(identity, name))}" for name in self.per)
        return tuple(f"rule/{self.id}/{_form(rate)}{who}" for rate in self.limits)

    def asks(self, identity: Identity, cost: float = 1.0) -> tuple[RateAsk, ...]:
        """What an admission of this call asks of the permit store for this rule."""
        return tuple(RateAsk(name, rate, cost) for name, rate in zip(self.counters(identity), self.limits, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """The rule as JSON has it, without what is left at its default."""
        shown: dict[str, Any] = {"id": self.id}
        shown |= {name: getattr(self, name) for name in FIELDS if getattr(self, name)}
        shown["limits"] = "; ".join(map(notation, self.limits))
        for name, usual in (("over_limit", "refuse"), ("enabled", True), ("shadow", False), ("note", "")):
            if getattr(self, name) != usual:
                shown[name] = getattr(self, name)
        if self.per != replace(self, per=None).per:
            shown["per"] = list(self.per or ())
        return shown

    @classmethod
    def from_dict(cls, found: object, *, tiers: Sequence[str] | None = None) -> Self:
        """The inverse of `as_dict`. Raises ConfigurationError. *tiers*: those declared; None: any is."""
        if not isinstance(found, Mapping):
            raise ConfigurationError(f'rule: {found!r} is no object; write {{"id": "api", "limits": "100/minute"}}')
        known = {f.name for f in fields(cls)} - {"tiers"}
        for name in found:
            if name not in known:
                raise ConfigurationError(
                    f"rule {found.get('id', '?')}: {name!r} is no field of a rule; known are {', '.join(sorted(known))}"
                )
        for name in ("id", "limits"):
            if name not in found:
                raise ConfigurationError(f"rule {found.get('id', '?')}: {name} is missing; every rule needs one")
        given: dict[str, Any] = dict(found)
        if "per" in given and not (
            isinstance(given["per"], (list, tuple)) and all(isinstance(name, str) for name in given["per"])
        ):
            raise ConfigurationError(f"rule {given['id']}: per {given['per']!r} is no list of fields")
        tier = given.get("tier", "")
        allowed = tuple(tiers) if tiers is not None else (*TIERS, *((tier,) if isinstance(tier, str) else ()))
        return cls(**given, tiers=allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of one rule when a call was matched. *why* is for people."""

    rule: Rule
    applies: bool
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleChange:
    """One change of the rules: the version it made, when, by whom, why, and what: ``+new -gone ~changed``."""

    version: int
    at: float
    who: str
    why: str
    what: str


@dataclass(frozen=True, slots=True)
class RuleSet:
    """All rules of a namespace, as of *version*. A larger version is newer; 0 is that of a store without rules.

    tiers: those that were declared; empty: none were, and there are `TIERS`. Raises ConfigurationError for two rules
    with one id, for a rule that can never apply because another with the same match always wins, and for a tier that
    is no name.
    """

    version: int = 0
    rules: tuple[Rule, ...] = ()
    tiers: tuple[str, ...] = ()
    _by_client: dict[str, tuple[Rule, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _others: tuple[Rule, ...] = field(default=(), init=False, repr=False, compare=False)
    _found: dict[Identity, tuple[Rule, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.rules, key=lambda rule: rule.precedence))
        object.__setattr__(self, "rules", ordered)
        for tier in self.tiers:
            if not isinstance(tier, str) or not tier.strip() or "*" in tier:
                raise ConfigurationError(f"rules: tier {tier!r} is no name; declare tiers such as {', '.join(TIERS)}")
        seen: dict[object, Rule] = {}
        ids: set[str] = set()
        for rule in ordered:
            if rule.id in ids:
                raise ConfigurationError(f"rules: the id {rule.id!r} stands there twice; rename one")
            ids.add(rule.id)
            if not rule.enabled:
                continue
            match = (rule.client, rule.endpoint, rule.task, rule.tier, rule.scope, rule.shadow)
            if (winner := seen.setdefault(match, rule)) is not rule:
                raise ConfigurationError(
                    f"rule {rule.id}: matches the same calls as {winner.id}, which always wins; "
                    "merge their limits, disable one, or tell them apart"
                )
        enabled = [rule for rule in ordered if rule.enabled]
        object.__setattr__(self, "_others", tuple(rule for rule in enabled if not rule.client or "*" in rule.client))
        by_client: dict[str, list[Rule]] = {}
        for rule in enabled:
            if rule.client and "*" not in rule.client:
                by_client.setdefault(rule.client, []).append(rule)
        self._by_client.update((client, tuple(rules)) for client, rules in by_client.items())

    @property
    def known_tiers(self) -> tuple[str, ...]:
        """The declared tiers, and those of its own rules, which stay known whatever was declared since."""
        known = list(dict.fromkeys(self.tiers or TIERS))
        for tier in dict.fromkeys(rule.tier for rule in self.rules if rule.tier):
            if not any(globs.matches(tier, each) for each in known):
                known.append(tier)
        return tuple(known)

    def match(self, identity: Identity) -> tuple[Rule, ...]:
        """The rules that apply to this call, the most specific first: of each scope one, and of its shadows one."""
        found = self._found.get(identity)
        if found is None:
            chosen: dict[object, Rule] = {}
            for rule in (*self._by_client.get(identity.client, ()), *self._others):
                if not rule.misses(identity):
                    chosen.setdefault((rule.scope, rule.shadow), rule)
            found = tuple(chosen.values())
            if len(self._found) >= REMEMBERED:
                self._found.clear()
            self._found[identity] = found
        return found

    def explain(self, identity: Identity) -> tuple[Verdict, ...]:
        """Every rule, in the order of precedence, and why it applies or does not."""
        applying = self.match(identity)
        verdicts = []
        for rule in self.rules:
            counts = f"counts {' and '.join(rule.scope) or 'everything together'}"
            if not rule.enabled:
                why = "disabled"
            elif missed := rule.misses(identity):
                has: str = getattr(identity, missed)
                why = f"{missed} {has!r} is not {getattr(rule, missed)!r}" if has else f"this call names no {missed}"
            elif rule in applying:
                why = f"the most specific that {counts}" + ("; shadow: refuses nothing" if rule.shadow else "")
            else:
                winner = next(r for r in applying if (r.scope, r.shadow) == (rule.scope, rule.shadow))
                why = f"{winner.id} also {counts} and is {_compared(winner, rule)}"
            verdicts.append(Verdict(rule=rule, applies=rule in applying, why=why))
        return tuple(verdicts)

    def changes_since(self, older: RuleSet) -> str:
        """What is different, for people: ``+new -gone ~changed``, and ``tiers`` where others are declared."""
        before, after = ({rule.id: rule for rule in rules} for rules in (older.rules, self.rules))
        marks = [f"+{id}" for id in after if id not in before] + [f"-{id}" for id in before if id not in after]
        marks += [f"~{id}" for id, rule in after.items() if id in before and before[id] != rule]
        marks += ["tiers"] if self.tiers != older.tiers else []
        return " ".join(marks)

    @classmethod
    def of(cls, *rules: Rule) -> Self:
        """A set that is written down in code."""
        return cls(0, rules)


def _limits(id: str, given: object) -> tuple[Rate, ...]:
    if isinstance(given, str):
        rates = parse_rates(given, what=f"rule {id}")
    elif isinstance(given, get_args(Rate)):
        rates = (given,)
    elif isinstance(given, (list, tuple)):
        rates = tuple(
            rate
            for each in given
            for rate in (parse_rates(each, what=f"rule {id}") if isinstance(each, str) else (each,))
        )
    else:
        rates = ()
    for rate in rates:
        if not isinstance(rate, get_args(Rate)):
            raise ConfigurationError(f"rule {id}: {rate!r} is no rate; give TokenBucket(100) or '100/second'")
    if not rates:
        raise ConfigurationError(f"rule {id}: limits {given!r} limit nothing; give one, such as '100/minute'")
    forms: dict[str, Rate] = {}
    for rate in rates:
        if (other := forms.setdefault(_form(rate), rate)) is not rate:
            raise ConfigurationError(
                f"rule {id}: '{notation(other)}' and '{notation(rate)}' count the same; leave the wider one out"
            )
    return rates


def _form(rate: Rate) -> str:
    """What tells the limits of one rule apart: how they count, and over how long."""
    return f"{algorithm_of(rate)}:{rate.period:g}"


def _quoted(value: str) -> str:
    """A part of a name that cannot be mistaken for two."""
    return value.replace("%", "%25").replace("/", "%2F")


def _compared(winner: Rule, rule: Rule) -> str:
    for index, word in ((0, "names"), (1, "says more of")):
        ours, theirs = winner.precedence[index], rule.precedence[index]
        assert isinstance(ours, tuple)
        assert isinstance(theirs, tuple)
        for name, mine, other in zip(FIELDS, ours, theirs, strict=True):
            if mine != other:
                return f"more specific: it {word} the {name}" + (" exactly" if index == 0 and mine == 0 else "")
    return f"first by id ({winner.id} before {rule.id})"
