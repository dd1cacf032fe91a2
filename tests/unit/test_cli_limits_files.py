"""``taskguard limits export`` and ``import``, and the tiers that travel with the rules; in memory, SQLite and Redis."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskguard.ports import RuleStore
from taskguard.rules import Rule, RuleSet
from taskguard.stores import open_rules
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


def rules_here() -> RuleSet:
    """The rules of the namespace that the environment names now."""
    store = open_rules(os.environ["TASKGUARD_STORE"], namespace=os.environ["TASKGUARD_NAMESPACE"])
    try:
        return store.rules() or RuleSet()
    finally:
        store.close()


class TestFiles:
    def test_what_is_exported_is_imported(self, run: Run, rules: RuleStore, tmp_path: Path) -> None:
        """Through a file, and through a pipe."""
        run("set", "a", "1/s; 9/h algorithm=sliding_log", "--client", "a-*", "--per", "", "--shadow")
        run("set", "b", "2/s burst=5", "--task", "t")
        before = stored(rules)
        file = tmp_path / "rules.json"
        assert run("export", str(file)).output == f"Exported 2 rules to {file}.\n"
        text = run("export").output
        assert json.loads(text)["version"] == rules.version()
        assert file.read_text() == text
        run("delete", "a", "b", "-y")
        assert "Imported 2 rules" in run("import", str(file)).output
        assert stored(rules) == before
        assert "Nothing to change" in run("import", "-", input=text).output
        assert "exists already" in run("export", str(file), status=1).stderr
        assert "cannot be written" in run("export", str(tmp_path / "no" / "x"), status=1).stderr

    def test_an_empty_store_is_exported_as_no_rules(self, run: Run) -> None:
        """Which can be imported too."""
        assert json.loads(run("export").output) == {"version": 0, "rules": []}
        assert "Nothing to change" in run("import", input=run("export").output).output

    def test_toml_is_read_by_its_name(self, run: Run, rules: RuleStore, tmp_path: Path) -> None:
        """With tiers of its own."""
        file = tmp_path / "rules.toml"
        file.write_text('tiers = ["gold"]\n[[rules]]\nid = "g"\nlimits = ["1/s", "9/h"]\nclient = "*"\ntier = "gold"\n')
        run("import", str(file))
        assert stored(rules)["g"].tier == "gold"
        assert len(stored(rules)["g"].limits) == 2

    def test_an_import_is_all_or_nothing(self, run: Run, rules: RuleStore, tmp_path: Path) -> None:
        """One bad rule among good ones changes nothing."""
        file = tmp_path / "rules.json"
        file.write_text('[{"id": "a", "limits": "1/s"}, {"id": "b", "limits": "0/s"}]')
        assert "0 admits nothing" in run("import", str(file), status=1).stderr
        assert rules.version() == 0

    def test_a_file_that_holds_no_rules_is_named(self, run: Run, rules: RuleStore, tmp_path: Path) -> None:
        """Of several that are imported, the one to mend."""
        file = tmp_path / "rules.json"
        file.write_text("[1]")
        said = run("import", str(file), status=1).stderr
        assert said.startswith(f"taskguard: {file}: rule: 1 is no object")
        assert len(said.splitlines()) == 1

    def test_replace_removes_the_others_after_asking(self, run: Run, rules: RuleStore) -> None:
        """And a dry run only says so."""
        run("set", "old", "1/s")
        new = '[{"id": "new", "limits": "2/s", "client": "*"}]'
        said = run("import", "--replace", "--dry-run", input=new)
        assert said.output == "Would change: +new -old\n"
        assert "nobody can answer" in run("import", "--replace", input=new, status=1).stderr
        assert set(stored(rules)) == {"old"}
        [told] = parsed(run("import", "--replace", "-y", "--json", input=new))
        assert told == {"version": rules.version(), "rules": 1, "changed": ["+new", "-old"], "dry_run": False}
        assert set(stored(rules)) == {"new"}

    @pytest.mark.parametrize("text", ["", "{", "[" * 5000, "\xff", "7", '{"rules": 7}', '[{"id": 7, "limits": 7}]'])
    def test_no_file_breaks_the_import(self, run: Run, rules: RuleStore, text: str) -> None:
        """One line, and nothing is changed."""
        said = run("import", input=text.encode("latin-1"), status=1)
        assert len(said.stderr.strip().splitlines()) == 1
        assert rules.version() == 0


class TestTiers:
    def test_rules_of_declared_tiers_can_be_managed(
        self, run: Run, rules: RuleStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The tiers of a file are kept with its rules: changed, switched off, exported and restored without --tiers."""
        file = tmp_path / "rules.json"
        gold = {"id": "g", "client": "*", "tier": "gold", "limits": "2/s"}
        file.write_text(json.dumps({"tiers": ["gold", "silver"], "rules": [gold]}))
        assert "+g tiers" in run("import", str(file)).output
        assert "tiers gold, silver" in run("list").output
        assert "Changed rule g: 4/second" in run("set", "g", "4/s").output
        run("set", "g", "--disable")
        run("set", "s", "1/s", "--tier", "silver")
        before = rules.rules()
        assert before is not None
        assert before.tiers == ("gold", "silver")
        assert "choose one of gold, silver" in run("set", "f", "1/s", "--tier", "free", status=1).stderr
        text = run("export").output
        assert json.loads(text)["tiers"] == ["gold", "silver"]
        run("delete", "g", "s", "-y")
        assert json.loads(run("export").output)["tiers"] == ["gold", "silver"]
        monkeypatch.setenv("TASKGUARD_NAMESPACE", uuid.uuid4().hex)
        run("import", input=text)
        restored = rules_here()
        assert (restored.rules, restored.tiers) == (before.rules, before.tiers)
        assert "Nothing to change" in run("import", "--replace", input=text).output

    def test_tiers_of_a_file_join_those_of_the_rules_that_stay(self, run: Run, rules: RuleStore) -> None:
        """And with --replace they take their place."""
        run("import", input='{"tiers": ["gold"], "rules": [{"id": "g", "limits": "1/s", "tier": "gold"}]}')
        run("import", input='{"tiers": ["iron"], "rules": [{"id": "i", "limits": "1/s", "tier": "iron"}]}')
        assert (rules.rules() or RuleSet()).tiers == ("gold", "iron")
        run("import", "--replace", "-y", input='{"tiers": ["iron"], "rules": []}')
        assert (rules.rules() or RuleSet()) == RuleSet(rules.version(), (), ("iron",))

    def test_a_rule_of_a_tier_that_nobody_declared_any_more_can_be_changed(self, run: Run, rules: RuleStore) -> None:
        """Also one from before tiers were kept; an export declares what it needs."""
        rules.put([Rule(id="g", tier="gold", limits="1/s", tiers=("gold",))], who="", why="")
        run("set", "g", "4/s")
        run("set", "g", "5/s", "--tiers", "free")
        assert stored(rules)["g"].limits[0].limit == 5
        text = run("export").output
        assert json.loads(text)["tiers"] == ["free"]
        rules.put([], who="", why="", tiers=())
        text = run("export").output
        assert json.loads(text)["tiers"] == ["free", "basic", "premium", "gold"]
        run("import", "--replace", input=text)
        assert stored(rules)["g"].tier == "gold"

    def test_set_says_what_it_declares(self, run: Run) -> None:
        """Also where the rule stays as it was."""
        run("set", "g", "1/s")
        said = run("set", "g", "1/s", "--tiers", "gold,silver").output
        assert said.startswith("The tiers are gold, silver.\nNothing to change in rule g")
        assert parsed(run("set", "g", "1/s", "--tiers", "gold,silver", "--json"))[0]["changed"] is False
