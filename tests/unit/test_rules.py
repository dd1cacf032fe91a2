"""Rules: which apply to a call, which wins, and what is refused where it is declared."""

from __future__ import annotations

import fnmatch
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskguard.errors import ConfigurationError
from taskguard.limiter.rulefile import rules_from
from taskguard.limits.rates import decide, room, terms_of
from taskguard.policies import FixedWindow, SlidingLog, TokenBucket
from taskguard.rules import FIELDS, REMEMBERED, Identity, Rule, RuleSet

ACME = Identity(client="acme", endpoint="POST /orders", task="shop.charge", tier="premium")


def rule(id: str, limits: Any = "10/second", **fields: Any) -> Rule:
    """A rule with some limit."""
    return Rule(id=id, limits=limits, **fields)


def ids(rules: RuleSet, identity: Identity = ACME) -> list[str]:
    """The rules that apply, in order."""
    return [each.id for each in rules.match(identity)]


class TestMatching:
    @pytest.mark.parametrize(
        ("pattern", "value", "matches"),
        [
            ("acme", "acme", True),
            ("acme", "acme2", False),
            ("acme", "Acme", False),
            ("*", "anything", True),
            ("*", "", False),
            ("acme-*", "acme-7", True),
            ("acme-*", "acme-", True),
            ("*-eu", "acme-eu", True),
            ("a*c*e", "abcde", True),
            ("a*c*e", "abde", False),
            ("aba*aba", "aba", False),
            ("a*b*b", "ab", False),
            ("a.c", "abc", False),
            ("[ab]", "a", False),
        ],
    )
    def test_a_star_stands_for_any_text_and_nothing_else_is_special(
        self, pattern: str, value: str, matches: bool
    ) -> None:
        """Other signs of globs and regular expressions are letters."""
        found = RuleSet.of(rule("r", client=pattern)).match(Identity(client=value))
        assert bool(found) is matches

    @given(st.text("ab*", min_size=1, max_size=8), st.text("ab", min_size=1, max_size=8))
    def test_globs_agree_with_those_of_the_shell(self, pattern: str, value: str) -> None:
        """Checked against fnmatch, whose star means the same."""
        assert (not rule("r", task=pattern).misses(Identity(task=value))) == fnmatch.fnmatchcase(value, pattern)

    def test_a_field_left_out_matches_everything_also_nobody(self) -> None:
        """A rule for an endpoint holds for callers nobody knows."""
        rules = RuleSet.of(rule("orders", endpoint="POST /orders"), rule("all"))
        assert ids(rules, Identity(endpoint="POST /orders")) == ["orders", "all"]

    def test_a_disabled_rule_does_not_apply(self) -> None:
        """And leaves its place to the next."""
        assert ids(RuleSet.of(rule("acme", client="acme", enabled=False), rule("each", client="*"))) == ["each"]

    def test_the_memory_of_matches_is_bounded(self) -> None:
        """A million clients cost no more than the bound."""
        rules = RuleSet.of(rule("each", client="*"))
        for n in range(REMEMBERED + 10):
            assert rules.match(Identity(client=str(n)))
        assert len(rules._found) <= REMEMBERED


class TestPrecedence:
    def test_exact_comes_before_glob_before_left_out_client_before_endpoint(self) -> None:
        """The order that the documentation gives."""
        given = [
            rule("9", client="acme", endpoint="POST /orders"),
            rule("8", client="acme", endpoint="POST *"),
            rule("7", client="acme"),
            rule("6", client="ac*", endpoint="POST /orders"),
            rule("5", client="*", endpoint="POST /orders"),
            rule("4", client="*", task="shop.charge"),
            rule("3", endpoint="POST /orders"),
            rule("2", endpoint="POST *"),
            rule("1", task="shop.*"),
            rule("0", tier="premium"),
            rule("00"),
        ]
        assert [each.id for each in RuleSet.of(*reversed(given)).rules] == [each.id for each in given]

    def test_of_the_rules_that_count_the_same_the_most_specific_wins(self) -> None:
        """One for acme takes the place of the one for its tier, which takes the place of that for everybody."""
        each, premium, acme = (
            rule("each", client="*"),
            rule("premium", client="*", tier="premium"),
            rule("acme", client="acme"),
        )
        assert ids(RuleSet.of(each, premium, acme)) == ["acme"]
        assert ids(RuleSet.of(each, premium)) == ["premium"]
        assert ids(RuleSet.of(each, premium), Identity(client="acme", tier="free")) == ["each"]

    def test_rules_that_count_different_things_stack(self) -> None:
        """Per client, per endpoint, per client and endpoint, and all together."""
        rules = RuleSet.of(
            rule("everything"),
            rule("orders", endpoint="POST /orders"),
            rule("client", client="*"),
            rule("client-orders", client="*", endpoint="POST /orders"),
            rule("bots", client="ac*", per=()),
            rule("tier", tier="premium"),
        )
        assert ids(rules) == ["client-orders", "bots", "client", "orders", "tier", "everything"]

    def test_ties_are_decided_by_id(self) -> None:
        """So that every process decides the same."""
        assert ids(RuleSet.of(rule("b", client="*cme"), rule("a", client="acm*"))) == ["a"]

    def test_of_two_globs_the_one_with_more_letters_wins(self) -> None:
        """``acme-*`` knows more than ``a*``."""
        assert ids(RuleSet.of(rule("a", client="a*"), rule("b", client="acm*"))) == ["b"]

    def test_a_shadow_takes_no_other_rules_place(self) -> None:
        """It is tried beside the one that holds."""
        assert ids(RuleSet.of(rule("new", client="acme", shadow=True), rule("each", client="*"))) == ["new", "each"]

    @given(st.permutations(["*", "acme", "a*", "*e", "ac*"]), st.permutations(["", "premium", "*"]))
    def test_the_order_in_which_rules_are_written_decides_nothing(self, clients: list[str], tiers: list[str]) -> None:
        """A set is a set."""
        made = [rule(f"{c}{t}".replace("*", "S"), client=c, tier=t) for c in clients for t in tiers]
        assert ids(RuleSet.of(*made)) == ["acmepremium"]

    def test_explain_says_of_every_rule_why(self) -> None:
        """Which field missed, which rule won and by what."""
        rules = RuleSet.of(
            rule("acme", client="acme"),
            rule("each", client="*"),
            rule("other", client="other"),
            rule("off", enabled=False),
            rule("try", shadow=True),
        )
        why = {verdict.rule.id: (verdict.applies, verdict.why) for verdict in rules.explain(ACME)}
        assert why == {
            "acme": (True, "the most specific that counts client"),
            "each": (False, "acme also counts client and is more specific: it names the client exactly"),
            "other": (False, "client 'acme' is not 'other'"),
            "off": (False, "disabled"),
            "try": (True, "the most specific that counts everything together; shadow: refuses nothing"),
        }


class TestCounters:
    def test_a_glob_over_clients_counts_each_by_itself_and_other_globs_together(self) -> None:
        """Ten thousand order ids are no ten thousand limits."""
        each = rule("r", client="*", endpoint="GET /orders/*")
        one, two = (each.counters(Identity(client=c, endpoint=e)) for c, e in (("a", "GET /orders/1"), ("b", "x")))
        assert one == ("rule/r/token_bucket:1/a",)
        assert two != one
        assert each.counters(Identity(client="a", endpoint="GET /orders/2")) == one

    def test_per_says_what_is_counted_by_itself(self) -> None:
        """All bots together, or each task for itself."""
        assert rule("r", client="bot-*", per=()).counters(ACME) == ("rule/r/token_bucket:1",)
        assert rule("r", per=["task", "client"]).counters(ACME) == ("rule/r/token_bucket:1/acme/shop.charge",)

    @given(st.tuples(*[st.text("a/%", max_size=4)] * 2), st.tuples(*[st.text("a/%", max_size=4)] * 2))
    def test_no_two_callers_share_a_counter_by_their_names(self, one: tuple[str, str], two: tuple[str, str]) -> None:
        """A separator in a name separates nothing."""
        each = rule("r", per=("client", "task"))
        names = [each.counters(Identity(client=client, task=task)) for client, task in (one, two)]
        assert (names[0] == names[1]) == (one == two)

    def test_a_changed_number_goes_on_counting_and_a_changed_window_begins_anew(self) -> None:
        """A limit that is raised at noon does not forget the morning."""
        before = rule("r", "100/day").counters(ACME)
        assert rule("r", "200/day burst=50").counters(ACME) == before
        assert rule("r", "200/hour").counters(ACME) != before
        assert rule("r", "100/day algorithm=fixed_window").counters(ACME) != before

    def test_what_a_bucket_remembers_of_another_limit_is_time(self) -> None:
        """The sentences of docs/limits.md: an emptied bucket that is raised gives a permit after one new interval; one
        that is cut holds the share it had, and with the burst left as it was nearly all of it."""

        def then(old: TokenBucket, spent: int, new: TokenBucket) -> tuple[float | None, float]:
            state = decide(terms_of(old), None, 0.0, float(spent)).state
            wait = decide(terms_of(new), state, 0.0, 1.0).wait
            return wait and wait / 1e6, room(terms_of(new), state, 0.0).remaining

        assert then(TokenBucket(60, 60), 60, TokenBucket(600, 60)) == (0.1, 0)
        assert then(TokenBucket(1, 1, burst=10), 10, TokenBucket(10, 1, burst=10)) == (0.1, 0)
        assert then(TokenBucket(60, 60), 30, TokenBucket(600, 60)) == (0, 300)
        assert then(TokenBucket(60, 60), 30, TokenBucket(6, 60)) == (0, 3)
        assert then(TokenBucket(10, 1, burst=10), 10, TokenBucket(1, 1, burst=10)) == (0, 9)

    def test_all_limits_of_a_rule_are_asked_with_the_calls_cost(self) -> None:
        """Per second and per day."""
        asks = rule("r", "10/second; 1000/day").asks(ACME, 3)
        assert [(ask.policy, ask.cost) for ask in asks] == [(TokenBucket(10), 3), (TokenBucket(1000, 86400), 3)]
        assert len({ask.name for ask in asks}) == 2


class TestDeclaring:
    @pytest.mark.parametrize(
        ("fields", "complaint"),
        [
            ({"id": ""}, "id '' is no name"),
            ({"id": "a b"}, "id 'a b' is no name"),
            ({"limits": ()}, "limit nothing; give one"),
            ({"limits": 7}, "limits 7 limit nothing"),
            ({"limits": ("10/second", 5)}, "5 is no rate"),
            ({"limits": "0/second"}, "0 admits nothing"),
            ({"limits": "-5/second"}, "'-5/second' is not a rate"),
            ({"limits": "10/second; 20/second"}, "'10/second' and '20/second' count the same"),
            ({"tier": "gold"}, "tier 'gold' is not declared and would match nothing; choose one of free, basic"),
            ({"tier": "g*"}, "tier 'g*' matches none of the declared"),
            ({"client": " acme"}, "begins or ends with a space and would match nothing"),
            ({"client": "a\nb"}, "has a control character"),
            ({"task": "x" * 257}, "has more than 256 characters"),
            ({"endpoint": "GET /orders?id=1"}, "has a query"),
            ({"client": 7}, "client 7 is no text"),
            ({"over_limit": "drop"}, "over_limit: 'drop' is not known"),
            ({"enabled": "yes"}, "enabled 'yes' is neither true nor false"),
            ({"per": ("colour",)}, "per 'colour' is no field"),
            ({"note": 5}, "note 5 is no text"),
        ],
    )
    def test_a_rule_that_cannot_work_fails_where_it_is_made(self, fields: dict[str, Any], complaint: str) -> None:
        """What, the value, and the way out."""
        with pytest.raises(ConfigurationError) as failure:
            Rule(**{"id": "r", "limits": "10/second", **fields})
        assert complaint in str(failure.value)

    def test_tiers_may_be_declared(self) -> None:
        """Others than the three."""
        assert rule("r", tier="gold", tiers=("gold", "silver")).tier == "gold"

    def test_a_rule_that_can_never_apply_is_refused(self) -> None:
        """Another with the same match wins every time."""
        with pytest.raises(ConfigurationError, match="rule b: matches the same calls as a, which always wins"):
            RuleSet.of(rule("b", client="*"), rule("a", "20/second", client="*"))
        assert RuleSet.of(rule("b", client="*", enabled=False), rule("a", client="*"))
        assert RuleSet.of(rule("b", client="*", shadow=True), rule("a", client="*"))

    def test_an_id_stands_once(self) -> None:
        """Two would be one after the next change."""
        with pytest.raises(ConfigurationError, match="the id 'a' stands there twice"):
            RuleSet.of(rule("a"), rule("a", client="*"))

    def test_limits_may_be_policies_and_text_mixed(self) -> None:
        """From code and from files."""
        assert rule("r", (SlidingLog(5, 60), "9/hour")).limits == (SlidingLog(5, 60), TokenBucket(9, 3600))
        assert rule("r", FixedWindow(5)).limits == (FixedWindow(5),)


class TestFiles:
    def test_a_rule_survives_json(self) -> None:
        """Export and import change nothing."""
        full = rule(
            "r", "5/second burst=9; 100/day algorithm=sliding_log",
            client="a*", endpoint="POST *", task="t", tier="free",
            over_limit="queue", enabled=False, shadow=True, per=("task",), note="why",
        )  # fmt: skip
        for each in (full, rule("plain"), rule("c", client="*"), rule("together", client="*", per=())):
            assert Rule.from_dict(json.loads(json.dumps(each.as_dict()))) == each
        assert rule("plain").as_dict() == {"id": "plain", "limits": "10/second"}

    def test_a_file_may_declare_its_tiers(self) -> None:
        """And is held to them."""
        found = rules_from({"tiers": ["gold"], "rules": [{"id": "a", "limits": "1/s", "tier": "gold"}]})
        assert found[0].tier == "gold"
        with pytest.raises(ConfigurationError, match="tier 'free' is not declared"):
            rules_from({"tiers": ["gold"], "rules": [{"id": "a", "limits": "1/s", "tier": "free"}]})

    @pytest.mark.parametrize(
        ("found", "complaint"),
        [
            (7, "7 is no list of rules"),
            ("x", "'x' is no list of rules"),
            ({}, 'there are no "rules"'),
            ({"rules": [], "x": 1}, "'x' is not known here"),
            ([7], "7 is no object"),
            ([{"id": "a"}], "rule a: limits is missing"),
            ([{"limits": "1/s"}], "rule ?: id is missing"),
            ([{"id": "a", "limits": "1/s", "colour": 1}], "rule a: 'colour' is no field of a rule; known are client"),
            ([{"id": "a", "limits": "1/s", "per": 7}], "rule a: per 7 is no list"),
            ([{"id": "a", "limits": "1/s", "tiers": []}], "'tiers' is no field"),
            ([{"id": "a", "limits": "1/s"}, {"id": "b", "limits": "2/s"}], "b: matches the same calls as a"),
            ({"rules": [], "tiers": "free"}, "tiers 'free' are no list"),
        ],
    )
    def test_a_file_that_holds_no_rules_is_told_what_is_wrong(self, found: Any, complaint: str) -> None:
        """One line, with the value."""
        with pytest.raises(ConfigurationError) as failure:
            rules_from(found, tiers=("free",))
        assert complaint in str(failure.value)

    @given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(
        st.sampled_from(["id", "limits", "rules", "per", *FIELDS]) | st.text(), x)))  # fmt: skip
    def test_no_file_breaks_the_reader(self, found: Any) -> None:
        """Rules, or a ConfigurationError."""
        with suppress(ConfigurationError):
            assert isinstance(rules_from(found), tuple)


def test_the_tiers_of_its_own_rules_stay_known() -> None:
    """Whatever is declared since: such a rule can be changed and exported."""
    gold = rule("g", tier="gold", tiers=("gold",))
    some = rule("s", client="*", tier="sil*", tiers=("silver",))
    assert RuleSet(1, (gold, some)).known_tiers == ("free", "basic", "premium", "sil*", "gold")
    assert RuleSet(1, (gold, some), ("silver",)).known_tiers == ("silver", "gold")
    assert RuleSet(1, (), ("a", "b")).changes_since(RuleSet()) == "tiers"


def test_a_field_that_a_call_does_not_name_is_told_so() -> None:
    """Not as a text that is empty."""
    [verdict] = RuleSet.of(rule("each", client="*")).explain(Identity(task="t"))
    assert (verdict.applies, verdict.why) == (False, "this call names no client")


def test_a_difference_names_what_came_went_and_changed() -> None:
    """For the log line of a refresh."""
    old, new = RuleSet.of(rule("a"), rule("b", client="b")), RuleSet.of(rule("a", "9/s"), rule("c", client="c"))
    assert new.changes_since(old) == "+c -b ~a"


def test_of_two_exact_values_the_longer_is_not_the_more_specific() -> None:
    """Only globs are compared by their letters."""
    long, short = rule("a", client="*", tier="premium"), rule("b", client="*", tier="free")
    assert [each.id for each in RuleSet.of(short, long).rules] == ["a", "b"]
