"""Payments, rehearsed: money moves once, whatever happens to the worker."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from functools import partial
from types import SimpleNamespace

import pytest

from taskguard.record import Reason
from taskguard.testing import Reliable
from workers import bank_client, payments
from workers.bank import Bank
from workers.books import Books
from workers.payments import charge, refund


def money_moved(bank: Bank) -> dict[str, int]:
    """What has been done to somebody's money. Calls that the bank knew again have done nothing."""
    totals = bank.books.totals()
    return {name: totals[name] for name in ("charges", "orders", "refunds")}


def new_books(bank: Bank) -> None:
    """Nothing has happened yet."""
    bank.books.close()
    bank.books = Books(":memory:")


def test_a_charge_is_made_once_at_every_crash_point(reliable: Reliable, bank: Bank) -> None:
    """The bank is handed the execution key, and knows a call that a rescued run makes again."""
    reset = partial(new_books, bank)
    lived = reliable.assert_idempotent(charge, "o1", 500, effects=partial(money_moved, bank), reset=reset)
    assert sum(history.startswith("its process ends in the body, after line") for history in lived) == 1


def test_a_bank_that_forgets_keys_charges_twice_and_the_kit_says_where(reliable: Reliable, bank: Bank) -> None:
    """Nothing here can mend that; what can be done is to know it."""
    bank.troubles.honour_keys = False
    with pytest.raises(AssertionError) as caught:
        reliable.assert_idempotent(
            charge, "o1", 500, effects=partial(money_moved, bank), reset=partial(new_books, bank)
        )
    assert "before its completion is stored" in str(caught.value)
    assert "actual effects:   {'charges': 2, 'orders': 1, 'refunds': 0}" in str(caught.value)
    assert "delivered again" not in str(caught.value)


def test_a_refund_is_given_once_at_every_crash_point(reliable: Reliable, bank: Bank) -> None:
    """Giving a charge back twice changes nothing."""
    charge_id = bank.books.charge("o1", 500, key=None).id

    def take_back() -> None:
        with closing(sqlite3.connect(bank.path)) as books, books:
            books.execute("UPDATE charges SET refunded_at = NULL")

    reliable.assert_idempotent(refund, charge_id, effects=partial(money_moved, bank), reset=take_back)


def test_a_charge_is_retried_until_the_bank_is_back(reliable: Reliable, bank: Bank) -> None:
    """Not before it said: ``Retry-After`` is the least wait. No test waits for it."""
    bank.troubles.down_until = float("inf")
    bank.troubles.retry_after = 40
    result = charge.delay("o1", 500)
    reliable.drain()
    (retry,) = reliable.waiting
    assert (retry.task_id, retry.due_at) == (result.id, pytest.approx(reliable.clock() + 40, abs=1))
    bank.troubles.down_until = 0.0
    reliable.drain(until=39)
    assert result.state == "RETRY"
    reliable.drain(until=2)
    assert bank.books.totals() == {"calls": 2, "charges": 1, "orders": 1, "refunds": 0}
    assert result.state == "SUCCESS"


def test_a_charge_that_could_not_be_made_in_time_is_a_dead_letter(reliable: Reliable, bank: Bank) -> None:
    """The customer has gone by then: five minutes are the deadline."""
    bank.troubles.down_until = float("inf")
    bank.troubles.retry_after = 120
    start = reliable.clock()
    charge.delay("o1", 500)
    reliable.drain(until="idle")
    (letter,) = reliable.dead_letters
    assert letter.failure.reason is Reason.EXPIRED
    assert reliable.clock() - start < 300
    assert bank.books.totals()["charges"] == 0


def test_an_outage_is_waited_out_by_a_few_probes(reliable: Reliable, bank: Bank) -> None:
    """Most orders only rest. Those that opened the circuit, and its probes, are all that a bank that is down sees."""
    bank.troubles.down_until = float("inf")
    results = [charge.delay(f"o{number}", 500) for number in range(40)]
    reliable.drain(until=10)
    assert payments.bank.circuit is not None
    assert payments.bank.circuit.state == "open"
    opened_after, probes = 5, 10
    assert bank.books.totals()["calls"] <= opened_after + probes
    bank.troubles.down_until = 0.0
    reliable.drain(until="1m")
    assert bank.books.totals()["charges"] == 40
    assert {result.state for result in results} == {"SUCCESS"}
    assert len([event for event in reliable.events if event.name == "retried"]) < opened_after


def test_charges_are_made_at_the_banks_pace(reliable: Reliable, bank: Bank) -> None:
    """What is more rests until its turn, and comes in order."""
    began = reliable.clock()
    for number in range(108):
        charge.delay(f"o{number}", 500)
    reliable.drain(until="idle")
    assert reliable.clock() - began == pytest.approx(104 / 52, abs=0.1)
    with closing(sqlite3.connect(bank.path)) as books:
        asked = [order_id for (order_id,) in books.execute("SELECT order_id FROM calls ORDER BY id")]
    assert asked == [f"o{number}" for number in range(108)]


def test_a_bank_that_is_asked_too_often_says_so(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any second it answers as many as its limit, and the others 429: trouble that passes within a second."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("workers.bank.time", SimpleNamespace(monotonic=lambda: clock.now, sleep=lambda _: None))
    bank.troubles.limit = 2

    def ask(number: int) -> None:
        bank_client.post("/charges", {"order_id": f"o{number}", "amount": 500}, key=f"k{number}")

    ask(1)
    clock.now += 0.6
    ask(2)
    with pytest.raises(bank_client.BankUnavailable, match="429: more than 2 charges a second") as caught:
        ask(3)
    assert caught.value.retry_after == 1.0
    clock.now += 0.5
    ask(3)
    assert bank.books.totals()["charges"] == 3


def test_an_order_sent_again_is_charged_once(reliable: Reliable, bank: Bank) -> None:
    """The second sending gets the first one's charge; the same order for another amount is a dead letter."""
    first, second, other = charge.delay("o1", 500), charge.delay("o1", 500), charge.delay("o1", 700)
    reliable.drain()
    assert first.get() == second.get()
    assert [letter.record.task_id for letter in reliable.dead_letters] == [other.id]
    assert bank.books.totals() == {"calls": 1, "charges": 1, "orders": 1, "refunds": 0}


def test_a_frozen_account_is_not_asked_again(reliable: Reliable, bank: Bank) -> None:
    """A refusal is final."""
    bank.troubles.frozen = ["o1"]
    charge.delay("o1", 500)
    reliable.drain(until="idle")
    assert [letter.failure.reason for letter in reliable.dead_letters] == [Reason.PERMANENT_ERROR]
    assert bank.books.totals()["calls"] == 1
