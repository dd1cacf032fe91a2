"""Transactional tasks in real workers: whatever dies, an effect and its completion are there together, and once.

The steps of a run's transaction are read from the code (`tests.integration.crashpoints`). ``make test`` plays each, and
every other test, on a broker and a database drawn for it; with ``PROOF_ALL=1`` on both. ``PROOF_SEED`` repeats a draw.
"""

from __future__ import annotations

import os
import random
import signal
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery.result import AsyncResult
from sqlalchemy import Engine, create_engine, insert, select, text
from sqlalchemy.schema import CreateTable, DropTable

from tests import services
from tests.integration.conftest import open_site
from tests.integration.crashpoints import Point, overlooked, transaction_steps
from tests.integration.crew import Crew, gate
from tests.integration.proxy import Fault, Proxy
from tests.integration.site import Site
from tests.integration.transactionalapp import effects_of, make_app
from tests.proof.draw import plays_all, seed

Place = tuple[str, str]
PLACES: list[Place] = [("rabbitmq", "postgresql"), ("redis", "mariadb")]
ALL = plays_all()
SEED = seed()

STARTED_AGAIN = (
    "Transaction.check",
    "Transaction.write",
    "RunTransaction.session",
    "RunTransaction.commit",
    "RunTransaction.undo",
    "SQLStore.end_in",
    "Session.connection",
    "Session.flush",
    "Session.commit",
    "Session.rollback",
    "effects.tell",
)
"""Steps at which a run dies and has done nothing."""
COMMITTED = {
    Point("Session.commit", "after"),
    Point("RunTransaction.commit", "after"),
    Point("Session.close", "before"),
    Point("Session.close", "after"),
}
"""Where it has done everything."""
MANNERS = {"RunTransaction.undo": "stumbles", "Session.rollback": "stumbles", "effects.tell": "gathers"}
"""Of runs that come to these steps."""
SPARED = {
    "Transaction.write_async": "a producer's, where the session is awaited: a run's is not",
    "RunTransaction.begun": "talks to nobody",
    "SQLStore.transaction": "talks to nobody",
    "SQLStore.seen": "reads what came of a commit whose reply was lost, which has its own test",
    "Session.in_nested_transaction": "talks to nobody",
    **dict.fromkeys(("effects.carrying", "effects.concerns", "effects.recorded"), "talks to nobody"),
    "Session.invalidate": "gives a connection up, and the database undoes what it undoes where the process dies",
}
"""Operations of a transactional run that no process dies at, and why."""
ORDERS = 60
KILLS = 6
ORPHANS = """SELECT pg_terminate_backend(pid) FROM pg_locks
    WHERE relation = to_regclass(:name) AND pid <> pg_backend_pid()"""
LONG_LEASE = 60.0
"""So long that no heartbeat goes by while a test counts what is said to the store."""


def drawn(*values: Any, of: str, kept: bool = False) -> list[Any]:
    """The places of a test, or of a step *of* it, with these *values*. Those of a *kept* shop are in one process."""
    places = PLACES if ALL else [random.Random(f"{SEED} {of}").choice(PLACES)]
    return [
        pytest.param(
            place,
            *values,
            id="-".join((*place, *map(str, values))),
            marks=[pytest.mark.xdist_group("-".join(place))] if kept else [],
        )
        for place in places
    ]


def steps() -> list[Any]:
    """Each step on each side, with the place where it is played."""
    played = {*STARTED_AGAIN, *(point.operation for point in COMMITTED)}
    points = [Point(step, side) for step in sorted(played) for side in ("before", "after")]  # type: ignore[arg-type]
    return [param for point in points for param in drawn(point, of=str(point), kept=True)]


class Business:
    """Where the effects are."""

    def __init__(self, stack: ExitStack, site: Site) -> None:
        self.site = site
        self._engine: Engine = create_engine(site.store_url)
        self._effects = effects_of(site.namespace)
        with self._engine.begin() as connection:
            connection.execute(CreateTable(self._effects))
        stack.callback(self._end)

    def _end(self) -> None:
        with self._engine.begin() as connection:
            if connection.dialect.name == "postgresql":  # in mid-statement it does not see that its client is gone
                connection.execute(text(ORPHANS), {"name": self._effects.name})
            connection.execute(DropTable(self._effects))
        self._engine.dispose()

    def effects(self) -> Counter[str]:
        """What has been done, and how often."""
        with self._engine.connect() as connection:
            return Counter(connection.execute(select(self._effects.c.what)).scalars())

    def tokens(self, what: str) -> list[str]:
        """Who did it."""
        with self._engine.connect() as connection:
            return list(connection.execute(select(self._effects.c.token).where(self._effects.c.what == what)).scalars())

    def add(self, *what: str) -> None:
        """Rows to fight over."""
        with self._engine.begin() as connection:
            connection.execute(insert(self._effects), [{"what": each, "token": ""} for each in what])


class Shop(Site):
    """A site whose workers run the transactional tasks."""

    program = "tests.integration.transactionalapp"
    _make_app = staticmethod(make_app)


class KeptShop(Crew):
    """The same, kept at work by a supervisor."""

    program = "tests.integration.transactionalapp"
    _make_app = staticmethod(make_app)


def open_shop(stack: ExitStack, place: Place, directory: Path, kind: Any) -> Business:
    """A shop on this broker and store."""
    after = stack.enter_context(ExitStack())  # closed after the site: a transaction that is open would keep the table
    return Business(after, open_site(stack, *place, directory, kind))


class Shops:
    """Shops that are kept at work for all the crashes of this module, each opened when it is first needed."""

    def __init__(self, stack: ExitStack, directories: pytest.TempPathFactory) -> None:
        self._stack = stack
        self._directories = directories
        self._kept: dict[Place, Business] = {}

    def at(self, place: Place) -> Business:
        """The one on this broker and store."""
        if place not in self._kept:
            business = open_shop(self._stack, place, self._directories.mktemp("kept"), partial(KeptShop, size=2))
            crew_of(business).keep()
            self._kept[place] = business
        crew_of(self._kept[place]).begin_scene()
        return self._kept[place]


@pytest.fixture(scope="module")
def shops(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shops]:
    """The shops of this module."""
    with ExitStack() as stack:
        yield Shops(stack, tmp_path_factory)


@pytest.fixture
def kept(shops: Shops, place: Place) -> Business:
    """A shop at work."""
    return shops.at(place)


@pytest.fixture
def shop(place: Place, tmp_path: Path) -> Iterator[Business]:
    """A shop with no workers yet."""
    with ExitStack() as stack:
        yield open_shop(stack, place, tmp_path, Shop)


def crew_of(business: Business) -> Crew:
    """Its crew."""
    assert isinstance(business.site, Crew)
    return business.site


@pytest.mark.parametrize(("place", "point"), steps())
def test_a_process_that_dies_at_a_step_leaves_all_of_a_run_or_nothing(kept: Business, point: Point) -> None:
    """Before the commit it is all done again; after it nothing is, and everybody learns the result."""
    print(f"PROOF_SEED={SEED}")
    crew, number = crew_of(kept), uuid.uuid4().int % 10**9
    crew.armoury.arm(point)
    result = crew.send("order", number, MANNERS.get(point.operation, ""))
    crew.wait_fired(point)
    crew.wait_state(result, "SUCCESS")
    assert result.result == f"ordered {number}"
    crew.wait(lambda: kept.effects()[f"ship {number}"], "the task that was sent in the run")
    crew.wait_settled()
    assert len(crew.started(result)) == (1 if point in COMMITTED else 2)
    assert kept.effects()[f"order {number}"] == kept.effects()[f"ship {number}"] == 1
    assert not crew.armoury.armed()


def test_every_step_of_a_transaction_is_played() -> None:
    """A new one fails here until a process dies at it, or it is spared with a reason."""
    played = {*STARTED_AGAIN, *(point.operation for point in COMMITTED)}
    assert overlooked(transaction_steps(), played, SPARED) == set()


@pytest.mark.parametrize("place", drawn(of="orders", kept=True))
def test_orders_are_done_once_while_workers_are_killed(kept: Business) -> None:
    """Each order writes a row and sends a task that writes another: as many of each as there are orders."""
    crew = crew_of(kept)
    before = sum(kept.effects().values())
    numbers = [10**9 + number for number in range(ORDERS)]
    results = [crew.send("order", number) for number in numbers]
    for kill in range(1, KILLS + 1):
        reached = before + kill * 2 * ORDERS // (KILLS + 2)
        crew.wait(lambda reached=reached: sum(kept.effects().values()) >= reached, f"{reached} effects")  # type: ignore[misc]
        victim = next(worker for worker in crew.workers if worker.alive)
        if kill % 2:
            os.killpg(victim.process.pid, signal.SIGKILL)
        else:
            child = next(iter(victim.tree()[1:]), None)
            if child is not None:
                child.kill()
    expected = {f"{what} {number}" for number in numbers for what in ("order", "ship")}
    crew.wait(lambda: expected <= kept.effects().keys(), "every order, and its shipment")
    crew.wait(lambda: all(result.state == "SUCCESS" for result in results), "every result")
    crew.wait_settled()
    done = kept.effects()
    assert {what: done[what] for what in expected} == dict.fromkeys(expected, 1)


@pytest.mark.parametrize("place", drawn(of="duplicate", kept=True))
def test_a_duplicate_is_told_the_stored_result(kept: Business) -> None:
    """In a second task's name, without a second effect."""
    crew, number = crew_of(kept), uuid.uuid4().int % 10**9
    first, second = crew.send("order", number), crew.send("order", number)
    for result in (first, second):
        crew.wait_state(result, "SUCCESS")
        assert result.result == f"ordered {number}"
    assert kept.effects()[f"order {number}"] == 1


def through(proxy: Proxy, business: Business) -> tuple[AsyncResult, str]:
    """A task in a worker that reaches the store by way of *proxy*, at the end of its body."""
    site, waits = business.site, gate()
    site.start_worker(
        concurrency=1, TASKGUARD_STORE=proxy.url, TASKGUARD_LEASE=str(LONG_LEASE), TASKGUARD_RELAY="0",
        TASKGUARD_OUTBOX=proxy.url,
    )  # fmt: skip
    result = site.send("gated", waits)
    site.wait_started(result)
    return result, waits


@pytest.mark.parametrize(("place", "turn"), [*drawn("request", of="request"), *drawn("reply", of="reply")])
def test_a_connection_that_is_cut_over_the_commit_leaves_no_doubt(place: Place, tmp_path: Path, turn: Any) -> None:
    """Its reply lost, the run has completed, and is not run again; the commit itself lost, it runs again."""
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy(services.require(place[1])))
        business = open_shop(stack, place, tmp_path, Shop)
        result, waits = through(proxy, business)
        # What the run says from here on: its completion, and its commit.
        proxy.arm(Fault(turn, number=2))
        business.site.journal.open(waits)
        business.site.wait(lambda: proxy.fired, "the cut")
        if turn == "request":
            business.site.start_worker()  # whose relay sends the retry
        business.site.wait_state(result, "SUCCESS")
        business.site.wait_settled()
        assert len(business.site.started(result)) == (1 if turn == "reply" else 2)
        assert business.effects()[f"gated {waits}"] == 1
        assert len(business.site.told("completed", result)) == 1


@pytest.mark.parametrize("place", drawn(of="taken over"))
def test_a_run_that_was_taken_over_cannot_commit(shop: Business) -> None:
    """Stopped for longer than its lease, it wakes up when another has done the work."""
    site, waits = shop.site, gate()
    stopped = site.start_worker(concurrency=1)
    result = site.send("gated", waits, acks_late=True)
    first = site.wait_started(result)
    for process in stopped.tree():
        process.suspend()
    site.start_worker(concurrency=1)
    rescuer = site.wait_started(result, 2)
    assert shop.effects()[f"gated {waits}"] == 0
    site.journal.open(waits)
    site.wait_state(result, "SUCCESS")
    for process in stopped.tree():
        process.resume()
    site.wait(lambda: site.told("custody_lost", result), "the refusal of the first")
    assert first.token < rescuer.token
    assert shop.tokens(f"gated {waits}") == [str(rescuer.token)]


@pytest.mark.parametrize("place", drawn(of="forgotten"))
def test_a_run_that_the_database_forgot_is_done_again(shop: Business) -> None:
    """As after a crash of the server that took the claim along, and with it what the run had written."""
    site, waits = shop.site, gate()
    site.start_worker(concurrency=1)
    result = site.send("gated", waits)
    site.wait_started(result)
    services.delete_rows(site.store_url, site.namespace)
    site.journal.open(waits)
    site.wait_started(result, 2)
    site.wait_state(result, "SUCCESS")
    assert shop.effects()[f"gated {waits}"] == 1


@pytest.mark.parametrize("place", drawn(of="deadlock"))
def test_a_deadlock_costs_an_attempt_and_nothing_else(shop: Business) -> None:
    """One of two runs is chosen by the database, undone, and run again."""
    site, waits = shop.site, gate()
    shop.add("left", "right")
    site.start_worker(concurrency=2)
    results = [site.send("crossing", "left", "right", waits), site.send("crossing", "right", "left", waits)]
    for result in results:
        site.wait_started(result)
    site.journal.open(waits)
    for result in results:
        site.wait_state(result, "SUCCESS")
    assert shop.effects()[f"crossed {waits}"] == 2
    assert sum(len(site.told("retried", result)) for result in results) == 1


@pytest.mark.parametrize("place", drawn(of="soft limit"))
def test_a_soft_limit_in_the_middle_of_a_statement_leaves_nothing(shop: Business) -> None:
    """Its connection is given up: what the next run is told there would be the answer to the former's question."""
    site, name = shop.site, gate()
    site.start_worker(concurrency=1)
    swallowed = site.send("slow", f"swallowed {name}", True)
    site.wait_state(swallowed, "FAILURE")
    raised = site.send("slow", f"raised {name}", False)
    order = site.send("order", 1)
    for result in (raised, order):
        site.wait_state(result, "SUCCESS")
    site.wait(lambda: shop.effects()["ship 1"], "the task that was sent")
    assert shop.effects() == {f"slow raised {name}": 1, "order 1": 1, "ship 1": 1}
    assert len(site.told("retried", raised)) == 1


@pytest.fixture
def file_shop(tmp_path: Path) -> Iterator[Business]:
    """A shop in a SQLite file."""
    with ExitStack() as stack:
        yield open_shop(stack, ("redis", "sqlite"), tmp_path, Shop)


def test_a_long_transaction_in_sqlite_holds_others_up_and_loses_nothing(file_shop: Business) -> None:
    """It is the one writer: claims, heartbeats and completions of others wait for its end, and for nothing else."""
    site, waits = file_shop.site, gate()
    site.start_worker(concurrency=3)
    held = site.send("held", other := gate())  # a run of the same worker, whose heartbeat must wait as well
    site.wait_started(held)
    writing = site.send("gated", waits)
    site.wait_started(writing)
    orders = [site.send("order", number) for number in range(3)]
    site.wait(lambda: site.journal.entries("store_unavailable"), "someone who has waited in vain")
    site.journal.open(other)
    site.journal.open(waits)
    for result in (writing, held, *orders):
        site.wait_state(result, "SUCCESS")
    site.wait(lambda: file_shop.effects().total() >= 7, "what the orders have sent")
    site.wait_settled()
    done = file_shop.effects()
    assert done == {f"gated {waits}": 1} | {f"{what} {number}": 1 for what in ("order", "ship") for number in range(3)}
    assert len(site.started(writing)) == 1, "nobody could take it over"


def test_a_process_that_dies_at_the_commit_in_sqlite_leaves_all_or_nothing(tmp_path: Path) -> None:
    """The file has it, or has nothing of it."""
    with ExitStack() as stack:
        business = open_shop(stack, ("redis", "sqlite"), tmp_path, partial(KeptShop, size=1))
        crew = crew_of(business)
        crew.keep()
        for number, (side, starts) in enumerate([("before", 2), ("after", 1)]):
            crew.begin_scene()
            crew.armoury.arm(point := Point("Session.commit", side))  # type: ignore[arg-type]
            result = crew.send("order", number)
            crew.wait_fired(point)
            crew.wait_state(result, "SUCCESS")
            crew.wait(lambda ship=f"ship {number}": business.effects()[ship], "the task that was sent in the run")  # type: ignore[misc]
            crew.wait_settled()
            assert len(crew.started(result)) == starts
        assert business.effects() == {f"{what} {number}": 1 for what in ("order", "ship") for number in range(2)}
