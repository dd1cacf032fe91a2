"""``taskguard limits`` as an operator types it, over stores in memory, in SQLite and in Redis."""

from __future__ import annotations

import json
import unicodedata
import uuid
from collections.abc import Iterator

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from taskguard.cli import cli
from taskguard.ports import RuleStore
from taskguard.rules import Identity, Rule, RuleSet
from taskguard.stores import open_demand, open_rules
from taskguard.stores.memory.demand import MemoryDemand
from taskguard.stores.memory.rules import MemoryRules
from taskguard.traffic import Asked
from tests.unit.letters import HOSTILE
from tests.unit.terminal import Run, parsed

COMMAND = ("limits",)


@pytest.fixture
def rules(store_url: str, namespace: str) -> Iterator[RuleStore]:
    """The rules that the commands are told to use."""
    store = open_rules(store_url, namespace=namespace)
    yield store
    store.close()


def stored(rules: RuleStore) -> dict[str, Rule]:
    """The rules by id."""
    return {rule.id: rule for rule in (rules.rules() or RuleSet()).rules}


class TestChanging:
    def test_set_makes_a_rule(self, run: Run, rules: RuleStore) -> None:
        """Whole, in one command."""
        said = run("set", "orders", "100/second burst=200; 5000/hour", "--client", "*", "--endpoint", "POST /orders",
                   "--tier", "premium", "--over-limit", "queue", "--note", "n", "--why", "w")  # fmt: skip
        assert stored(rules) == {
            "orders": Rule(
                id="orders", limits="100/second burst=200; 5000/hour", client="*", endpoint="POST /orders",
                tier="premium", over_limit="queue", note="n",
            )
        }  # fmt: skip
        assert said.output.startswith(
            "Made rule orders: 100/second burst=200; 5000/hour for client *, endpoint POST /orders, tier premium."
        )

    def test_set_changes_what_is_given_and_leaves_the_rest(self, run: Run, rules: RuleStore) -> None:
        """A limit is raised in the night without retyping the rule."""
        run("set", "each", "10/second", "--client", "*", "--over-limit", "queue")
        said = run("set", "each", "20/second")
        assert said.output.startswith("Changed rule each: 20/second for client *.")
        run("set", "each", "--shadow", "--disable")
        assert stored(rules)["each"] == Rule(
            id="each", limits="20/second", client="*", over_limit="queue", shadow=True, enabled=False
        )
        run("set", "each", "--client", "", "--enable", "--no-shadow", "--per", "task")
        assert stored(rules)["each"] == Rule(id="each", limits="20/second", over_limit="queue", per=("task",))
        run("set", "each", "--per", "")
        assert stored(rules)["each"].per == ()

    def test_set_says_what_it_did_as_json(self, run: Run, rules: RuleStore) -> None:
        """A repeated command changes nothing, and says so."""
        [made] = parsed(run("set", "each", "10/second", "--json"))
        assert made == {"id": "each", "limits": "10/second", "version": rules.version(), "changed": True}
        assert parsed(run("set", "each", "10/second", "--json"))[0]["changed"] is False
        assert "Nothing to change in rule each" in run("set", "each", "10/second").output

    @pytest.mark.parametrize(
        ("words", "status", "complaint"),
        [
            (("set", "r"), 2, "There is no rule r yet: give its LIMITS"),
            (("set", "r", "0/second"), 1, "0 admits nothing"),
            (("set", "r", "ten"), 1, "'ten' is not a rate; write '100/second'"),
            (("set", "r", "1/s", "--tier", "gold"), 1, "tier 'gold' is not declared and would match nothing"),
            (("set", "r", "1/s", "--per", "colour"), 1, "'colour' is no field"),
            (("set", "r", "1/s", "--over-limit", "drop"), 2, "drop"),
            (("set", "a b", "1/s"), 1, "id 'a b' is no name"),
            (("set", "twin", "1/s", "--client", "*"), 1, "which always wins"),
            (("set", "r", "1/s", "--tiers", ","), 2, "names no tier"),
            (("delete", "nobody"), 1, "there is no rule 'nobody'; `taskguard limits list` shows"),
            (("delete",), 2, "Missing argument"),
            (("import", "nowhere.json"), 2, "nowhere.json"),
        ],
    )
    def test_bad_input_is_told_in_one_line(
        self, run: Run, rules: RuleStore, words: tuple[str, ...], status: int, complaint: str
    ) -> None:
        """What, the value, the way out; and nothing is changed."""
        run("set", "other", "9/s", "--client", "*")
        version = rules.version()
        said = run(*words, status=status)
        assert complaint in said.stderr
        assert len(said.stderr.strip().splitlines()) == 1
        assert said.stderr.startswith("taskguard: ")
        assert rules.version() == version

    def test_tiers_may_be_declared(self, run: Run, rules: RuleStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """By option or by environment; rules of such tiers are read by every later command."""
        run("set", "gold", "1/s", "--tier", "gold", "--tiers", "gold,silver")
        monkeypatch.setenv("TASKGUARD_TIERS", "gold,silver")
        run("set", "silver", "1/s", "--tier", "silver")
        monkeypatch.delenv("TASKGUARD_TIERS")
        assert [row["id"] for row in parsed(run("list", "--json"))] == ["gold", "silver"]

    def test_delete_asks_and_removes(self, run: Run, rules: RuleStore) -> None:
        """One or many."""
        for name in ("a", "b", "c"):
            run("set", name, "1/s", "--client", name)
        assert "nobody can answer" in run("delete", "a", status=1).stderr
        assert run("delete", "a", "b", "--yes").output == "Deleted 2 rules.\n"
        assert parsed(run("delete", "c", "-y", "--json")) == [{"id": "c", "deleted": True}]
        assert stored(rules) == {}

    def test_who_changed_what_is_kept(self, run: Run) -> None:
        """By the operating system's user."""
        run("set", "a", "1/s", "--why", "ticket 7")
        run("delete", "a", "-y", "--why", "over")
        newest, oldest = parsed(run("history", "--json"))
        assert (newest["what"], newest["why"], newest["who"]) == ("-a", "over", "ann")
        assert (oldest["what"], oldest["why"]) == ("+a", "ticket 7")
        shown = run("history").output
        assert "ticket 7" in shown
        assert "ann" in shown


class TestLooking:
    def test_list_shows_the_most_specific_first(self, run: Run) -> None:
        """With what each counts."""
        run("set", "each", "10/second", "--client", "*")
        run("set", "all", "99/second", "--over-limit", "queue")
        run("set", "acme", "50/second", "--client", "acme", "--disable")
        run("set", "try", "1/second", "--client", "a*", "--shadow")
        assert [row["id"] for row in parsed(run("list", "--json"))] == ["acme", "try", "each", "all"]
        shown = run("list", columns=120).output
        for words in ("client acme", "each client", "all together", "disabled", "shadow", "queue", "4 rules, version"):
            assert words in shown

    def test_an_empty_store_says_how_to_begin(self, run: Run) -> None:
        """Not an empty table."""
        assert run("list").output == "There are no rules; `taskguard limits set ID LIMITS` makes one.\n"
        assert "There are no rules" in run("explain", "--client", "x").output
        assert run("history").output == "The rules were never changed.\n"
        assert parsed(run("list", "--json")) == []

    def test_explain_shows_which_rules_match_which_wins_and_why(self, run: Run) -> None:
        """For one call."""
        run("set", "each", "10/second", "--client", "*")
        run("set", "acme", "50/second", "--client", "acme")
        run("set", "other", "50/second", "--client", "other")
        words = ("explain", "--client", "acme", "--endpoint", "POST /orders")
        found = {row["id"]: row for row in parsed(run(*words, "--json"))}
        assert {name: row["applies"] for name, row in found.items()} == {"acme": True, "each": False, "other": False}
        assert found["each"]["why"] == "acme also counts client and is more specific: it names the client exactly"
        assert found["other"]["why"] == "client 'acme' is not 'other'"
        assert found["acme"]["counters"] == ["rule/acme/token_bucket:1"]
        shown = run(*words, columns=120).output
        assert "applies" in shown
        assert "1 rule of 3 for client acme, endpoint POST /orders" in shown
        assert "a call that names nothing" in run("explain").output

    def test_explain_tells_what_a_call_does_not_name_and_what_nobody_declared(self, run: Run) -> None:
        """A hint beside the answer, on stderr."""
        run("set", "each", "10/second", "--client", "*")
        [told] = parsed(run("explain", "--json"))
        assert told["why"] == "this call names no client"
        said = run("explain", "--client", "x", "--tier", "gold", "--json")
        assert said.stderr == "tier 'gold' is not declared; known are free, basic, premium\n"
        assert json.loads(said.stdout)[0]["applies"] is True
        assert run("explain", "--tier", "gold", "--tiers", "gold").stderr == ""
        assert run("explain", "--tier", "free").stderr == ""

    def test_report_shows_who_is_near_or_over_and_what_is_needed(
        self, run: Run, store_url: str, namespace: str
    ) -> None:
        """The worst first; those who are far from it only with --all."""
        run("set", "each", "100/minute", "--client", "*")
        demand = open_demand(store_url, namespace=namespace)
        for client, accepted, refused in (("over", 100, 150), ("near", 90, 0), ("far", 5, 0)):
            demand.add([Asked(client=client, endpoint="GET /x", rule="each", accepted=accepted, refused=refused)])
        found = parsed(run("report", "--json"))
        assert [(row["client"], row["state"], row["needed"]) for row in found] == [
            ("over", "over", "250/minute"),
            ("near", "near", None),
        ]
        assert found[0]["since"].endswith("+00:00")
        assert [row["client"] for row in parsed(run("report", "--all", "--json"))] == ["over", "near", "far"]
        assert [row["client"] for row in parsed(run("report", "--near", "0.95", "--json"))] == ["over"]
        shown = run("report", columns=140).output
        for words in ("over", "250%", "250/minute", "near", "90%", "each"):
            assert words in shown

    def test_report_of_a_quiet_fleet_says_so(self, run: Run) -> None:
        """Nobody is near."""
        assert run("report").output == "Nobody is near a rule's limit; 0 limits in use within 1h.\n"
        assert parsed(run("report", "--json")) == []

    @pytest.mark.parametrize("columns", [80, 200])
    def test_hostile_names_move_nothing_and_tables_fit(
        self, run: Run, rules: RuleStore, store_url: str, namespace: str, columns: int
    ) -> None:
        """Clients choose their names."""
        rules.put([Rule(id="each", client="*", limits="1/minute", note="x")], who=HOSTILE, why=HOSTILE)
        open_demand(store_url, namespace=namespace).add(
            [Asked(client=HOSTILE, endpoint=HOSTILE, rule="each", accepted=1, refused=5)]
        )
        for words in (("report",), ("history",), ("list",), ("explain", "--client", HOSTILE.replace("\0", ""))):
            shown = run(*words, columns=columns).output
            assert all(cell_len(line) <= columns for line in shown.splitlines()), words
            assert not {c for c in shown if unicodedata.category(c) in {"Cc", "Cf", "Cs"}} - {"\n"}, words


def test_a_changed_rule_reaches_a_running_process(run: Run, rules: RuleStore) -> None:
    """What the command line sets is what a limiter decides by."""
    from taskguard.limiter.rulebook import RuleBook

    book = RuleBook(rules)
    assert book.rules(patience=10) is not None
    [made] = parsed(run("set", "each", "7/second", "--client", "*", "--json"))
    assert book.wait_for(made["version"], 10)
    found = book.rules()
    assert found is not None
    assert found.match(Identity(client="x"))[0].limits[0].limit == 7
    book.close()


def test_stores_in_memory_are_the_processs() -> None:
    """So that these tests see what the commands do."""
    assert open_rules("memory://", namespace="x") is MemoryRules.shared("x")
    assert open_demand("memory://", namespace="x") is MemoryDemand.shared("x")


LIMITS = ("list", "set", "delete", "import", "explain", "report", "history")
CIRCUITS = ("list", "show", "open", "close", "disable", "reset")
COMMANDS = [["limits", name] for name in LIMITS] + [["circuits", name] for name in CIRCUITS]
WORDS = [
    "--client", "--endpoint", "--tier", "--per", "--over-limit", "--shadow", "--tiers", "--since", "--near", "--for",
    "--why", "--json", "-y", "--limit", "--replace", "100/s", "9" * 400, "nan", "-1", "1e999", HOSTILE, "each", "",
]  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(COMMANDS), st.lists(st.sampled_from(WORDS) | st.text(max_size=20), max_size=5))
def test_no_words_break_the_command_line(command: list[str], words: list[str]) -> None:
    """An answer or one line of complaint, whatever is typed."""
    namespace = uuid.uuid4().hex
    open_rules("memory://", namespace=namespace).put([Rule(id="each", client="*", limits="9/s")], who="", why="")
    typed = [word.replace("\x00", "") for word in words]
    line = ["--store", "memory://", "--namespace", namespace, *command, *typed]
    result = CliRunner().invoke(cli, line, env={"COLUMNS": "100"}, prog_name="taskguard", input="")
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (0, 1, 2)
    assert not {c for c in result.output if c != "\n" and unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}}
