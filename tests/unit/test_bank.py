"""The bank of the demo and its client: what is charged, what is refused, and what the books say of both."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from taskguard.demo.ledger import BankBooks
from taskguard.transient import is_transient, retry_after
from workers import bank_client
from workers.bank import Bank
from workers.bank_client import BankRefused, BankUnavailable

Tell = Callable[..., dict[str, Any]]


@pytest.fixture
def tell(bank: Bank) -> Tell:
    """Bring trouble to the bank."""

    def tell(**orders: Any) -> dict[str, Any]:
        return bank_client.post("/admin", orders, key=None)

    return tell


def charge(order_id: str = "o1", amount: int = 500, *, key: str | None = "k1") -> str:
    answer = bank_client.post("/charges", {"order_id": order_id, "amount": amount}, key=key, caller="worker-1@test")
    return str(answer["charge_id"])


def test_a_charge_is_in_the_books_with_its_call(bank: Bank) -> None:
    """Every call is counted, and the charge it made."""
    charge()
    assert bank.books.totals() == {"calls": 1, "charges": 1, "orders": 1, "refunds": 0}
    books = BankBooks(Path(bank.path)).by_order()["o1"]
    assert (books.charges, books.answers) == (1, {201: 1})


def test_a_repeated_key_is_answered_with_its_first_charge(bank: Bank) -> None:
    """Two calls, one charge, and the books tell the replay apart."""
    assert charge() == charge()
    books = BankBooks(Path(bank.path)).by_order()["o1"]
    assert (books.charges, books.answers) == (1, {201: 1, 200: 1})


def test_many_calls_at_once_with_one_key_make_one_charge(bank: Bank) -> None:
    """The key is looked up and taken in one step."""
    with ThreadPoolExecutor(10) as pool:
        charges = set(pool.map(lambda _: charge(), range(30)))
    assert len(charges) == 1
    assert bank.books.totals() == {"calls": 30, "charges": 1, "orders": 1, "refunds": 0}


def test_a_key_used_for_another_amount_is_refused(bank: Bank) -> None:
    """A key names one charge, not two."""
    charge(amount=500)
    with pytest.raises(BankRefused, match="422: key 'k1' was used to charge 500 for order 'o1'"):
        charge(amount=700)
    assert bank.books.totals()["charges"] == 1


def test_without_a_key_every_call_is_a_charge(bank: Bank) -> None:
    """Whose merit one charge is can be seen by leaving the key out."""
    assert charge(key=None) != charge(key=None)
    assert bank.books.totals() == {"calls": 2, "charges": 2, "orders": 1, "refunds": 0}


def test_a_bank_that_is_told_to_ignore_keys_charges_again(bank: Bank, tell: Tell) -> None:
    """``honour_keys`` can be turned off."""
    tell(honour_keys=False)
    assert charge() != charge()


def test_a_bank_that_is_down_asks_to_be_called_later(bank: Bank, tell: Tell) -> None:
    """503 with Retry-After is trouble that may pass, for the client and for taskguard; the call is counted."""
    tell(down_for=60, retry_after=7)
    with pytest.raises(BankUnavailable, match="503: the bank is down") as caught:
        charge()
    assert is_transient(caught.value)
    assert retry_after(caught.value, now=0.0) == 7.0
    assert bank.books.totals()["calls"] == 1
    tell(down_for=0)
    assert charge()


def test_a_frozen_account_is_refused_until_it_is_thawed(bank: Bank, tell: Tell) -> None:
    """403 is no trouble that passes by itself."""
    tell(frozen=["o1"])
    with pytest.raises(BankRefused, match="403: account frozen") as caught:
        charge()
    assert not is_transient(caught.value)
    assert caught.value.status_code == 403
    assert charge("o2", key="k2")
    tell(frozen=[])
    assert charge()


def test_a_slow_bank_takes_the_money_before_it_answers(bank: Bank, tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two, the books show the charge, and a call that is still open."""
    monkeypatch.setattr("taskguard.demo.ledger.SLOW_CALL", 0.0)
    tell(slow={"o1": 0.5})
    books = BankBooks(Path(bank.path))
    caller = threading.Thread(target=charge)
    caller.start()
    while not books.in_hand():
        assert caller.is_alive()
    assert books.in_hand("worker-1@") == [("o1", "worker-1@test")]
    assert books.in_hand("worker-2@") == []
    assert books.charged() == 1
    caller.join()
    assert books.in_hand() == []


def test_a_caller_that_waits_no_longer_finds_the_bank_unavailable(
    bank: Bank, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's timeout bounds the call, though the money may be taken."""
    monkeypatch.setattr("taskguard.demo.ledger.SLOW_CALL", 0.0)
    tell(slow={"o1": 0.6})
    with pytest.raises(BankUnavailable, match="timed out"):
        bank_client.post("/charges", {"order_id": "o1", "amount": 5}, key="k1", timeout=0.1)
    assert bank.books.totals()["charges"] == 1
    while BankBooks(Path(bank.path)).in_hand():
        pass  # its answer, which nobody hears, still goes into the books


def test_a_bank_that_cannot_be_reached_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection is trouble that may pass."""
    monkeypatch.setenv("BANK_URL", "http://127.0.0.1:1")
    with pytest.raises(BankUnavailable):
        charge()


def test_a_refund_is_given_once(bank: Bank) -> None:
    """Asking again changes nothing, and what was never charged is not given back."""
    charge_id = charge()
    for _ in range(2):
        assert bank_client.post("/refunds", {"charge_id": charge_id}, key="r1") == {"charge_id": charge_id}
    assert bank.books.totals()["refunds"] == 1
    with pytest.raises(BankRefused, match="404: there is no charge 'nothing'"):
        bank_client.post("/refunds", {"charge_id": "nothing"}, key="r2")


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/charges", b"{", 400),
        ("/charges", b"[]", 400),
        ("/charges", b'{"order_id": "o1"}', 422),
        ("/charges", b'{"order_id": "o1", "amount": -5}', 422),
        ("/admin", b'{"on_fire": true}', 422),
        ("/loans", b"{}", 404),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(bank: Bank, path: str, body: bytes, status: int) -> None:
    """With a status of its own, and nothing in the books."""
    with pytest.raises(HTTPError) as caught:
        urlopen(Request(f"http://127.0.0.1:{bank.server_port}{path}", data=body), timeout=5)
    assert caught.value.code == status
    assert "error" in json.load(caught.value)
    assert bank.books.totals()["calls"] == 0


def test_the_bank_says_where_its_books_are_and_what_troubles_it(bank: Bank, tell: Tell) -> None:
    """So that a script can check that it talks to the bank it started."""
    tell(delay=0.01)
    with urlopen(f"http://127.0.0.1:{bank.server_port}/", timeout=5) as answer:
        status = json.load(answer)
    assert status["books"] == bank.path
    assert status["troubles"]["delay"] == 0.01


def test_the_books_can_be_read_by_others_meanwhile(bank: Bank) -> None:
    """They are one SQLite file that anybody may open."""
    charge()
    with sqlite3.connect(bank.path) as db:
        assert db.execute("SELECT order_id, amount, key FROM charges").fetchall() == [("o1", 500, "k1")]
