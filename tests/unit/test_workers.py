"""The example workers, run in this process: what a newcomer copies must do what it says."""

from __future__ import annotations

import pytest

import taskguard
from workers.app import app
from workers.bank import Bank
from workers.notifications import receipt
from workers.payments import charge, refund
from workers.reports import monthly


@pytest.fixture(autouse=True)
def _in_memory(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No broker, no store and no backend but this process."""
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "cache+memory://")
    taskguard.install(app, store="memory://", namespace=namespace)


def test_an_order_is_charged_once_however_often_it_is_sent(bank: Bank) -> None:
    """The second sending gets the first one's charge, and the bank is not called again."""
    first = charge.apply(("o1", 500)).get()
    assert charge.apply(("o1", 500)).get() == first
    assert bank.books.totals() == {"calls": 1, "charges": 1, "orders": 1, "refunds": 0}


def test_an_order_sent_again_with_another_amount_is_a_dead_letter(bank: Bank) -> None:
    """It is neither charged nor dropped."""
    charge.apply(("o1", 500)).get()
    with pytest.raises(taskguard.KeyReused):
        charge.apply(("o1", 700)).get()
    assert bank.books.totals()["charges"] == 1


def test_a_charge_is_refunded(bank: Bank) -> None:
    """Once, by its charge id."""
    charge_id = charge.apply(("o1", 500)).get()
    assert refund.apply((charge_id,)).get() == charge_id
    assert bank.books.totals()["refunds"] == 1


def test_a_receipt_follows_its_charge_in_a_chain(bank: Bank, caplog: pytest.LogCaptureFixture) -> None:
    """The charge id comes from the step before."""
    caplog.set_level("INFO")
    chain = charge.s("o1", 500) | receipt.s(order_id="o1", email="ann@example.com")
    chain.apply().get()
    assert "to ann@example.com: order o1 is paid" in caplog.text


def test_a_report_is_drawn_up_page_by_page() -> None:
    """And says when it is done."""
    assert monthly.apply(("2026-11",), {"pages": 3, "seconds_per_page": 0.0}).get() == "2026-11: 3 pages"
