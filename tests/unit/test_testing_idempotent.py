"""`assert_idempotent`: whatever repeats an effect is named, with the crash point; what does not, passes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from celery import Celery

from taskguard import ConfigurationError, ReliableTask, Retry
from taskguard.ports import MessageStore
from taskguard.testing import Crash, Reliable, assert_idempotent
from taskguard.testing.process import READS, STEPS
from tests.unit.rehearsal import add, declare, make_app, noting


@pytest.fixture
def app() -> Celery:
    """An application as it is in production: its servers are elsewhere."""
    return make_app()


class Bank:
    """The other side. It knows a repeated call by its key, if it is given one."""

    def __init__(self) -> None:
        self.charges: list[tuple[str, int]] = []
        self.keys: set[str] = set()

    def charge(self, order: str, amount: int, key: str | None = None) -> None:
        """Charge, once for each key."""
        if key not in self.keys:
            self.charges.append((order, amount))
        if key is not None:
            self.keys.add(key)

    def rob(self) -> None:
        """Everything back to nothing."""
        self.__init__()  # type: ignore[misc]


@pytest.fixture
def bank() -> Bank:
    """A bank without charges."""
    return Bank()


def histories(error: BaseException) -> list[str]:
    """The histories an assertion complains of."""
    return [line.strip() for line in str(error).splitlines() if re.match(r"  \w", line)]


def test_a_task_that_hands_its_key_on_passes_every_history(app: Celery, bank: Bank) -> None:
    """Each crash point of the clean run, and each way in which the message can come twice, is put to the test."""

    @declare(app, bind=True, name="shop.charge", idempotency_key="charge:{order}")
    def charge(self: ReliableTask, order: str, amount: int) -> None:
        self.ensure_custody()
        bank.charge(order, amount, self.custody.key)
        app.send_task("shop.receipt", (order,))

    declare(app, noting([]), name="shop.receipt")
    lived = assert_idempotent(charge, "A1", amount=5, effects=lambda: bank.charges, reset=bank.rob)
    line = charge.run.__code__.co_firstlineno + 3
    assert lived == (
        "its process ends before the message is claimed; then it is rescued",
        "its process ends before the body; then it is rescued",
        "its process ends in the body, before `holds` in the store; then it is rescued",
        f"its process ends in the body, after line {line}, `bank.charge(order, amount, self.custody.key)`; "
        "then it is rescued",
        "its process ends in the body, before shop.receipt is sent; then it is rescued",
        "its process ends after the body, before its completion is stored; then it is rescued",
        "its process ends before the message is acknowledged; then it is rescued",
        "its message is delivered again after its end",
        "its message is delivered twice before it has run",
        "another message with the same idempotency key is sent",
    )


def test_a_repeated_effect_is_named_with_its_crash_point(app: Celery, bank: Bank) -> None:
    """Only a crash after the effect and before the completion repeats it; the message shows what and where."""

    @declare(app, name="shop.charge", idempotency_key="charge:{order}")
    def charge(order: str, amount: int) -> None:
        checked = amount > 0
        bank.charge(order, amount)
        del checked

    with pytest.raises(AssertionError, match=r"shop\.charge is not idempotent") as caught:
        assert_idempotent(charge, "A1", 5, effects=lambda: bank.charges, reset=bank.rob)
    line = charge.run.__code__.co_firstlineno + 3
    assert histories(caught.value) == [
        f"its process ends in the body, after line {line}, `bank.charge(order, amount)`; then it is rescued",
        "its process ends after the body, before its completion is stored; then it is rescued",
    ]
    assert "    expected effects: [('A1', 5)]\n    actual effects:   [('A1', 5), ('A1', 5)]" in str(caught.value)
    assert "self.custody.key" in str(caught.value)


def test_each_effect_of_a_body_is_a_crash_point(app: Celery) -> None:
    """The last effect of a body that overwrites may be safe where the first, which appends, is not."""
    done: list[str] = []

    @declare(app)
    def deliver(order: str) -> None:
        if "picked" not in done:
            done.append("picked")
        for part in ("left", "right"):
            done.append(part)

    with pytest.raises(AssertionError) as caught:
        assert_idempotent(deliver, "A1", effects=done)
    found = histories(caught.value)
    assert sum("`done.append(part)`" in each for each in found) == 2
    assert not any('`done.append("picked")`' in each for each in found)


@pytest.mark.parametrize(
    "options",
    [{"retry": Retry(max_retries=3, first_delay=60)}, {"autoretry_for": (ConnectionError,), "retry_backoff": 60}],
    ids=["policy", "autoretry"],
)
def test_an_effect_before_a_retry_is_found_out(app: Celery, bank: Bank, options: dict[str, Any]) -> None:
    """The crash points go on in the next attempts; Celery's own wrapper around the body is seen through."""

    @declare(app, **options)
    def charge(order: str) -> None:
        bank.charge(order, len(bank.charges))
        if len(bank.charges) < 2:
            raise ConnectionError("the answer was lost")

    with pytest.raises(AssertionError) as caught:
        assert_idempotent(charge, "A1", effects=lambda: bank.charges, reset=bank.rob)
    found = histories(caught.value)
    assert any("`bank.charge(order, len(bank.charges))`" in each for each in found)
    assert any("before its completion is stored" in each for each in found)


def test_effects_of_the_tasks_it_starts_count_too(app: Celery, bank: Bank) -> None:
    """What is sent twice, and has no key, does its work twice."""

    @declare(app, name="shop.charge")
    def charge(order: str) -> None:
        bank.charge(order, 1)

    @declare(app)
    def checkout(order: str, keyed: bool = False) -> None:
        charge.apply_async((order,), idempotency_key=order if keyed else None)

    with pytest.raises(AssertionError) as caught:
        assert_idempotent(checkout, "A1", effects=lambda: bank.charges, reset=bank.rob)
    assert histories(caught.value) == [
        "its process ends after the body, before its completion is stored; then it is rescued"
    ]
    assert_idempotent(checkout, "A1", keyed=True, effects=lambda: bank.charges, reset=bank.rob)


def test_a_link_is_followed_once(app: Celery, bank: Bank) -> None:
    """What comes after the task is sent with an id of its own, fixed beforehand; a signature can be given."""

    @declare(app, bind=True, name="shop.charge")
    def charge(self: ReliableTask, order: str) -> str:
        bank.charge(order, 1, self.custody.key)
        return order

    @declare(app, bind=True, name="shop.receipt")
    def receipt(self: ReliableTask, order: str) -> None:
        bank.charge(f"receipt {order}", 0, self.custody.key)

    linked = charge.s("A1").set(link=receipt.s())
    lived = assert_idempotent(linked, effects=lambda: bank.charges, reset=bank.rob)
    assert "its process ends after the body, before shop.receipt is sent; then it is rescued" in lived


def test_a_body_that_catches_everything_is_dead_all_the_same(app: Celery, bank: Bank) -> None:
    """A bare ``except`` does not survive the end of its process."""

    @declare(app, bind=True)
    def charge(self: ReliableTask, order: str) -> None:
        try:
            bank.charge(order, 1, self.custody.key)
            self.ensure_custody()
        except BaseException as exc:
            caught.append(type(exc))

    caught: list[type[BaseException]] = []
    assert_idempotent(charge, "A1", effects=lambda: bank.charges, reset=bank.rob)
    assert set(caught) == {Crash}


def test_a_task_that_fails_when_it_is_run_again_is_found_out(app: Celery) -> None:
    """The effects are right and the caller is told of a failure: that is not the same end."""
    rows: set[str] = set()

    @declare(app)
    def insert(row: str) -> None:
        if row in rows:
            raise ValueError("duplicate row")
        rows.add(row)

    with pytest.raises(AssertionError, match=r"actual end:   a dead letter \(permanent_error: ValueError: dup"):
        assert_idempotent(insert, "A1", effects=rows)


@pytest.mark.parametrize("options", [{"deadline": 5}, {"max_crashes": 1}], ids=["deadline", "max_crashes"])
def test_a_task_that_declares_not_to_begin_again_repeats_nothing(app: Celery, options: dict[str, Any]) -> None:
    """Its lease ends after its deadline, or one crash is enough: a dead letter is what it asked for."""
    done: list[str] = []

    def append(order: str) -> None:
        done.append(order)

    assert_idempotent(declare(app, append, **options), "A1", effects=done)


def test_what_was_queued_before_stays_as_it_was(app: Celery, bank: Bank) -> None:
    """The histories are lived on a stage of their own; also the time they took has not passed."""

    @declare(app, bind=True)
    def charge(self: ReliableTask, order: str) -> None:
        bank.charge(order, 1, self.custody.key)

    with Reliable(app) as reliable:
        before = reliable.clock()
        charge.delay("B2")
        reliable.assert_idempotent(charge, "A1", effects=lambda: bank.charges, reset=bank.rob)
        assert [list(message.args) for message in reliable.queue] == [["B2"]]
        assert reliable.clock() == before
        assert reliable.dead_letters == []
    assert "run" not in vars(app.tasks[charge.name])


def test_the_crash_points_come_from_the_port() -> None:
    """An operation that a store is given later is a crash point, unless it is named as a read."""
    operations = {name for name in vars(MessageStore) if not name.startswith("_")}
    assert operations >= READS
    assert operations >= STEPS.keys() - {"acknowledge"}
    assert not READS & STEPS.keys()


# -- bad use -----------------------------------------------------------------------------------------------------------


def test_an_assertion_that_could_not_fail_is_refused(app: Celery) -> None:
    """Effects that never change, a clean run that fails, runs that differ without a fault."""
    done: list[Any] = []

    def append(order: str) -> None:
        done.append((order, len(made)))
        made.append(order)

    def failing() -> None:
        raise ValueError("no such card")

    made: list[str] = []
    task, plus = declare(app, append, name="shop.append"), declare(app, add, name="shop.add")
    with pytest.raises(AssertionError, match=r"shop\.add ran and effects= shows \[\] as before"):
        assert_idempotent(plus, 1, effects=done)
    with pytest.raises(AssertionError, match=r"ended as a dead letter .*no such card.* when nothing"):
        assert_idempotent(declare(app, failing, name="shop.failing"), effects=done)
    with pytest.raises(
        AssertionError, match=r"two clean runs of shop\.append differ, \[\('A', 0\)\] and \[\('A', 1\)\]"
    ):
        assert_idempotent(task, "A", effects=done)


def test_a_crash_point_that_is_not_reached_again_is_told(app: Celery, bank: Bank) -> None:
    """A task that takes another way each time has not been through what the assertion says it has."""
    runs: list[str] = []

    @declare(app, bind=True)
    def charge(self: ReliableTask, order: str) -> None:
        runs.append(order)
        bank.charge(order, 1, self.custody.key)
        if len(runs) == 2:
            self.ensure_custody()

    with pytest.raises(AssertionError) as caught:
        assert_idempotent(charge, "A1", effects=lambda: bank.charges, reset=bank.rob)
    assert histories(caught.value) == ["its process ends before the message is acknowledged; then it is rescued"]
    assert "was not reached: the task takes another way each time" in str(caught.value)


def test_bad_arguments_get_one_clear_line(app: Celery) -> None:
    """What is wrong, and the way out."""
    task = declare(app, add, name="shop.add")
    plain = app.task(name="plain", shared=False)(add)
    with pytest.raises(ConfigurationError, match="is no ReliableTask; give the task"):
        assert_idempotent(plain, 1, effects=[])
    with pytest.raises(ConfigurationError, match="3 is no ReliableTask"):
        assert_idempotent(3, effects=[])
    with pytest.raises(ConfigurationError, match=r"effects=\(\) cannot change; give a callable"):
        assert_idempotent(task, 1, effects=())
    with pytest.raises(ConfigurationError, match=r"effects= is a callable, so give reset=,"):
        assert_idempotent(task, 1, effects=list)
    with pytest.raises(ConfigurationError, match="reset=7 cannot be called; leave off"):
        assert_idempotent(task, 1, effects=[], reset=7)  # type: ignore[arg-type]
