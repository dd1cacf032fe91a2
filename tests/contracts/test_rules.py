"""The contract of a `RuleStore`, over every backend."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from taskguard.errors import ConfigurationError
from taskguard.ports import RuleStore
from taskguard.rules import Rule, RuleSet
from taskguard.stores import open_demand, open_rules
from tests.clocks import ManualClock

EACH = Rule(id="each", client="*", limits="100/minute")
ACME = Rule(id="acme", client="acme", limits="500/minute; 9/second burst=20", over_limit="queue", note="contract 7")


@pytest.fixture
def rules(store_url: str, namespace: str, clock: ManualClock) -> Iterator[RuleStore]:
    """An empty store of rules that goes by the manual clock."""
    store = open_rules(store_url, namespace=namespace, clock=clock)
    yield store
    store.close()


@pytest.fixture
def open_more(store_url: str, namespace: str) -> Iterator[Callable[[], RuleStore]]:
    """Open the same rules as often as a test needs, by the server's clock."""
    opened: list[RuleStore] = []

    def open_another() -> RuleStore:
        opened.append(open_rules(store_url, namespace=namespace))
        return opened[-1]

    yield open_another
    for store in opened:
        store.close()


def put(store: RuleStore, *rules: Rule, replace: bool = False) -> int:
    """Put rules as somebody."""
    return store.put(rules, who="ann", why="a test", replace=replace)


def test_a_store_without_rules_has_version_zero(rules: RuleStore) -> None:
    """Which every process knows from the start."""
    assert rules.version() == 0
    assert rules.rules() is None
    assert rules.changes() == []


def test_what_is_put_is_there_whole(rules: RuleStore) -> None:
    """With every field."""
    version = put(rules, EACH, ACME)
    found = rules.rules()
    assert found is not None
    assert (found.version, found.rules) == (version, (ACME, EACH))
    assert rules.version() == version


def test_a_known_version_is_not_sent_again(rules: RuleStore) -> None:
    """A refresh that finds nothing new costs nothing."""
    version = put(rules, EACH)
    assert rules.rules(version) is None
    assert rules.rules(version - 1) is not None


def test_put_takes_the_place_of_the_same_id_and_leaves_the_others(rules: RuleStore) -> None:
    """One rule is changed at a time."""
    put(rules, EACH, ACME)
    put(rules, Rule(id="each", client="*", limits="7/minute"))
    found = rules.rules()
    assert found is not None
    assert {rule.id: rule.limits[0].limit for rule in found.rules} == {"each": 7, "acme": 500}


def test_an_import_replaces_all_in_one_version(rules: RuleStore) -> None:
    """Nobody sees half of it."""
    before = put(rules, EACH)
    after = put(rules, ACME, replace=True)
    found = rules.rules(before)
    assert found is not None
    assert (found.version, [rule.id for rule in found.rules]) == (after, ["acme"])
    assert put(rules, replace=True) > after
    assert (rules.rules() or found).rules == ()


def test_each_version_is_larger_also_when_the_clock_stands_still_or_goes_back(
    rules: RuleStore, clock: ManualClock
) -> None:
    """A process that knows one never takes an older for a newer."""
    versions = [put(rules, EACH), put(rules, ACME)]
    clock.advance(-3600)
    versions.append(put(rules, EACH, replace=True))
    assert versions == sorted(set(versions))


def test_a_version_after_a_loss_is_larger_than_every_one_before_it(rules: RuleStore, clock: ManualClock) -> None:
    """Versions follow the clock, so that rules put into an emptied store are news to who knew the old ones."""
    version = put(rules, EACH)
    assert version >= round(clock() * 1000)


def test_what_changes_nothing_makes_no_version(rules: RuleStore) -> None:
    """A repeated call, or an import of what is there."""
    version = put(rules, EACH)
    assert put(rules, EACH) == version
    assert put(rules, EACH, replace=True) == version
    assert rules.delete(["nobody"], who="ann", why="") == []
    assert (rules.version(), len(rules.changes())) == (version, 1)


def test_delete_names_what_was_there(rules: RuleStore) -> None:
    """And removes no other."""
    put(rules, EACH, ACME)
    assert rules.delete(["acme", "nobody"], who="ann", why="gone") == ["acme"]
    found = rules.rules()
    assert found is not None
    assert [rule.id for rule in found.rules] == ["each"]


def test_a_set_that_cannot_work_is_refused_whole(rules: RuleStore) -> None:
    """Two rules that match the same calls: nothing is changed."""
    version = put(rules, EACH)
    with pytest.raises(ConfigurationError, match="matches the same calls"):
        put(rules, ACME, Rule(id="twin", client="*", limits="5/minute"))
    assert rules.version() == version


def test_declared_tiers_are_kept_with_the_rules(rules: RuleStore) -> None:
    """Whoever reads the rules, changes one or deletes one finds them as they were declared; others take their place."""
    gold = Rule(id="g", client="*", tier="gold", limits="1/s", tiers=("gold",))
    first = rules.put([gold], who="ann", why="", tiers=("gold", "silver", "gold"))
    found = rules.rules()
    assert found is not None
    assert (found.rules, found.tiers, found.known_tiers) == ((gold,), ("gold", "silver"), ("gold", "silver"))
    assert put(rules, EACH) > first
    assert rules.delete(["each"], who="ann", why="") == ["each"]
    assert (rules.rules() or RuleSet()).tiers == ("gold", "silver")
    second = rules.put([], who="ann", why="", tiers=("\u00e9t\u00e9",))
    found = rules.rules(first)
    assert found is not None
    assert (found.version, found.rules, found.tiers) == (second, (gold,), ("\u00e9t\u00e9",))
    assert found.known_tiers == ("\u00e9t\u00e9", "gold")
    assert rules.put([], who="ann", why="", tiers=("\u00e9t\u00e9",)) == second
    assert rules.changes(limit=1)[0].what == "tiers"
    rules.put([], who="ann", why="", replace=True, tiers=())
    found = rules.rules()
    assert found is not None
    assert (found.rules, found.tiers) == ((), ())


def test_tiers_that_are_no_names_are_refused_whole(rules: RuleStore) -> None:
    """The rule beside them is not put either."""
    for tiers in (("",), (" ",), ("g*",)):
        with pytest.raises(ConfigurationError, match="is no name; declare tiers such as free"):
            rules.put([EACH], who="ann", why="", tiers=tiers)
    assert rules.version() == 0


def test_who_changed_what_and_why_is_kept(rules: RuleStore, clock: ManualClock) -> None:
    """The newest first."""
    first = put(rules, EACH, ACME)
    clock.advance(60)
    rules.delete(["acme"], who="bob", why="contract ended \u2014 'x'\n\x00")
    newest, oldest = rules.changes()
    assert (newest.who, newest.what, newest.at) == ("bob", "-acme", clock())
    assert newest.why == "contract ended \u2014 'x'\n\x00"
    assert (oldest.version, oldest.who, oldest.why, oldest.what) == (first, "ann", "a test", "+acme +each")
    assert rules.changes(limit=1) == [newest]
    assert rules.changes(limit=0) == []


def test_the_log_is_bounded(rules: RuleStore) -> None:
    """At least a hundred are kept, and not all."""
    for n in range(210):
        put(rules, Rule(id="each", client="*", limits=f"{n + 1}/minute"))
    assert 100 <= len(rules.changes(limit=1000)) <= 200


def test_changes_made_at_once_are_all_made(open_more: Callable[[], RuleStore]) -> None:
    """Nobody's rule is lost because another was put in the same instant."""
    failures: list[BaseException] = []

    def change(number: int) -> None:
        store = open_more()
        try:
            for n in range(5):
                put(store, Rule(id=f"r{number}-{n}", client=f"c{number}-{n}", limits="1/second"))
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=change, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    store = open_more()
    found = store.rules()
    assert found is not None
    assert len(found.rules) == 20
    versions = [change.version for change in store.changes(limit=100)]
    assert len(versions) == 20
    assert versions == sorted(set(versions), reverse=True)


@pytest.mark.parametrize("open_any", [open_rules, open_demand])
def test_a_namespace_that_a_database_would_cut_is_refused(open_any: Callable[..., object], sqlite_url: str) -> None:
    """Two would become one."""
    with pytest.raises(ConfigurationError, match="is too long for a SQL store"):
        open_any(sqlite_url, namespace="n" * 65)


def test_two_changes_at_once_make_no_set_that_neither_may_make(
    open_more: Callable[[], RuleStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's rule comes between reading and writing: what was checked is checked again with it."""
    mine, theirs = open_more(), open_more()
    put(theirs, ACME)
    read, raced = mine.rules, []

    def racing(known: int = 0) -> RuleSet | None:
        found = read(known)
        if not raced:
            raced.append(True)
            put(theirs, Rule(id="twin", client="*", limits="5/minute"))
        return found

    monkeypatch.setattr(mine, "rules", racing)
    with pytest.raises(ConfigurationError, match="matches the same calls"):
        put(mine, EACH)
    found = read()
    assert found is not None
    assert {rule.id for rule in found.rules} == {"acme", "twin"}


def test_a_watcher_is_told_within_a_second(open_more: Callable[[], RuleStore]) -> None:
    """At once what there is, and then each change."""
    told: list[int] = []
    heard = threading.Condition()
    done = threading.Event()

    def changed(version: int) -> None:
        with heard:
            told.append(version)
            heard.notify_all()

    watching = threading.Thread(target=open_more().watch, args=(changed,), kwargs={"stop": done.is_set})
    watching.start()
    try:
        with heard:
            assert heard.wait_for(lambda: told, 5)
        assert told[0] == 0
        for rule in (EACH, ACME):
            version = put(open_more(), rule)
            made = time.monotonic()
            with heard:
                assert heard.wait_for(lambda version=version: version in told, 5)  # type: ignore[misc]
            assert time.monotonic() - made < 1.0
    finally:
        done.set()
        watching.join(5)
    assert not watching.is_alive()
