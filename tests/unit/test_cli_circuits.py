"""``taskguard circuits`` as an operator types it, over permits in memory, in SQLite and in Redis."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

import pytest
from rich.cells import cell_len

from taskguard.permits import Ask, CircuitAsk, Outcomes, Refusal
from taskguard.policies import CircuitBreaker
from taskguard.ports import PermitStore
from taskguard.stores import open_permits
from tests.unit.letters import HOSTILE
from tests.unit.terminal import Run, parsed

COMMAND = ("circuits",)
POLICY = CircuitBreaker(minimum_calls=4, wait_in_open=30)


@pytest.fixture
def permits(store_url: str, namespace: str) -> Iterator[PermitStore]:
    """The permits that the commands are told to use."""
    store = open_permits(store_url, namespace=namespace, timeout=5)
    yield store
    store.close()


def trip(permits: PermitStore, name: str) -> None:
    """Enough failures to open it."""
    permits.report(name, POLICY, Outcomes(generation=permits.circuit(name).generation, calls=4, failures=4))


def admitted(permits: PermitStore, name: str) -> bool:
    """Whether a call goes through."""
    answer = permits.admit(Ask(circuit=CircuitAsk(name, POLICY, "me")))
    return not isinstance(answer, Refusal)


def test_list_shows_every_circuit(run: Run, permits: PermitStore) -> None:
    """Its state, how long for, and what its window holds."""
    trip(permits, "bank")
    permits.report("mail", POLICY, Outcomes(calls=9, failures=1, slow=2))
    found = {row["name"]: row for row in parsed(run("list", "--json"))}
    assert {name: row["state"] for name, row in found.items()} == {"bank": "open", "mail": "closed"}
    assert (found["mail"]["calls"], found["mail"]["failures"], found["mail"]["slow"]) == (9, 1, 2)
    assert found["bank"]["until"].endswith("+00:00")
    shown = run("list", columns=120).output
    for words in ("bank", "open", "mail", "closed", "2 circuits"):
        assert words in shown


def test_an_empty_store_says_so(run: Run) -> None:
    """Not an empty table."""
    assert run("list").output == "No circuit was told of a call yet.\n"
    assert parsed(run("list", "--json")) == []


def test_show_tells_one_circuit(run: Run, permits: PermitStore) -> None:
    """In words, and as JSON."""
    trip(permits, "bank")
    shown = run("show", "bank").output
    assert shown.startswith("bank: open, for another ")
    assert "calls are refused until the first probe" in shown
    assert "opened 1 time since it was last closed" in shown
    assert parsed(run("show", "bank", "--json"))[0]["trips"] == 1
    assert "no circuit 'nobody'" in run("show", "nobody", status=1).stderr


@pytest.mark.parametrize(
    ("command", "state", "goes_through", "says"),
    [
        ("open", "forced_open", False, "Opened bank for 5m."),
        ("close", "forced_closed", True, "Closed, by force, bank for 5m."),
        ("disable", "disabled", True, "Disabled bank for 5m."),
    ],
)
def test_an_operators_word_holds_and_is_kept(
    run: Run, permits: PermitStore, command: str, state: str, goes_through: bool, says: str
) -> None:
    """Who, why and until when; reset takes it back."""
    trip(permits, "bank")
    before = permits.now()
    said = run(command, "bank", "--for", "5m", "--why", "ticket 7")
    assert said.output.splitlines() == [says]
    view = permits.circuit("bank")
    assert (view.state, view.who, view.why) == (state, "ann", "ticket 7")
    assert view.until == pytest.approx(before + 300, abs=10)
    assert admitted(permits, "bank") is goes_through
    assert "by ann: ticket 7" in run("show", "bank").output
    assert run("reset", "bank").output == "Reset bank.\n"
    assert permits.circuit("bank").state == "closed"
    assert admitted(permits, "bank")


def test_a_word_without_an_end_lasts_until_reset(run: Run, permits: PermitStore) -> None:
    """For several at once, known or not."""
    said = run("open", "bank", "mail")
    assert said.output.splitlines()[0] == "Opened bank until `taskguard circuits reset`."
    assert [permits.circuit(name).until for name in ("bank", "mail")] == [None, None]
    assert not admitted(permits, "mail")
    found = parsed(run("reset", "bank", "mail", "--json"))
    assert [(row["name"], row["state"]) for row in found] == [("bank", "closed"), ("mail", "closed")]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("open",), "Missing argument"),
        (("open", "bank", "--for", "soon"), "'soon' is not a duration"),
        (("reset", "bank", "--for", "5m"), "No such option"),
        (("open", "bank", "--for", "0s"), "'0s' ends before it begins"),
        (("close", "bank", "--for", "0"), "'0' ends before it begins"),
        (("disable", "bank", "--for", "0m"), "'0m' ends before it begins"),
        (("open", ""), "'' is no name"),
        (("close", "bank", " \t"), "is no name"),
        (("reset", ""), "'' is no name"),
        (("explode", "bank"), "No such command"),
    ],
)
def test_bad_input_is_told_in_one_line(run: Run, permits: PermitStore, words: tuple[str, ...], complaint: str) -> None:
    """With the way out, and nothing is changed."""
    said = run(*words, status=2)
    assert complaint in said.stderr
    assert len(said.stderr.strip().splitlines()) == 1
    assert list(permits.circuits()) == []


def test_a_circuit_that_is_not_there_is_not_reset(run: Run, permits: PermitStore) -> None:
    """A slip of the hand makes no circuit, and none beside it is reset; those there are, are named."""
    assert "there is none yet" in run("reset", "bank", status=1).stderr
    run("open", "bank")
    said = run("reset", "bank", "bnak", status=1).stderr
    assert "no circuit 'bnak' was told of a call; there are 'bank'; `taskguard circuits list`" in said
    assert len(said.strip().splitlines()) == 1
    assert [(view.name, view.state) for view in permits.circuits()] == [("bank", "forced_open")]
    for n in range(9):
        permits.report(f"c{n}", POLICY, Outcomes(calls=1))
    assert "'c6' and more;" in run("show", "typo", status=1).stderr


@pytest.mark.parametrize("columns", [80, 200])
def test_hostile_names_move_nothing_and_tables_fit(run: Run, permits: PermitStore, columns: int) -> None:
    """Whatever a downstream is called, and whatever a reason says."""
    name = "b" + HOSTILE.replace("\0", "")
    permits.force(name, "forced_open", until=None, who=name, why=name)
    for words in (("list",), ("show", name), ("open", name, "--why", name)):
        shown = run(*words, columns=columns).output
        assert not {c for c in shown if unicodedata.category(c) in {"Cc", "Cf", "Cs"}} - {"\n"}, words
        if words == ("list",):
            assert all(cell_len(line) <= columns for line in shown.splitlines())
