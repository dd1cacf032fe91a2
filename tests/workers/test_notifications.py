"""Notifications, rehearsed: a duplicate sends nothing, a late one sends nothing, and a crash may send two."""

from __future__ import annotations

import pytest
from celery import chain

from taskguard.record import Reason
from taskguard.testing import Reliable
from workers.bank import Bank
from workers.notifications import receipt
from workers.payments import charge


def test_a_receipt_follows_its_charge_in_a_chain(
    reliable: Reliable, bank: Bank, caplog: pytest.LogCaptureFixture
) -> None:
    """And is not sent before there is a charge."""
    caplog.set_level("INFO")
    bank.troubles.down_until = float("inf")
    chain(charge.s("o1", 500), receipt.s(order_id="o1", email="ann@example.com")).apply_async()
    reliable.drain()
    assert "ann@example.com: order o1 is paid" not in caplog.text
    bank.troubles.down_until = 0.0
    reliable.drain(until="2m")
    assert caplog.text.count("to ann@example.com: order o1 is paid") == 1


def test_a_second_receipt_for_an_order_in_progress_is_dropped(reliable: Reliable) -> None:
    """And one for an order that has its receipt is answered from the store: nothing is sent either way."""
    receipt.delay("c1", order_id="o1", email="ann@example.com")
    receipt.delay("c1", order_id="o1", email="ann@example.com")
    reliable.drain()
    assert [event.name for event in reliable.events] == ["completed", "replayed"]


def test_a_receipt_that_is_an_hour_late_is_not_sent(reliable: Reliable) -> None:
    """It would only puzzle the customer."""
    receipt.delay("c1", order_id="o1", email="ann@example.com")
    reliable.advance("61m")
    reliable.drain()
    assert [letter.failure.reason for letter in reliable.dead_letters] == [Reason.EXPIRED]


def test_a_crash_after_the_mail_and_before_its_record_sends_two(
    reliable: Reliable, caplog: pytest.LogCaptureFixture
) -> None:
    """A mail has no key that the other side knows: the kit names the one gap, and there is no other."""
    caplog.set_level("INFO", logger="workers.notifications")

    def mails() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "workers.notifications"]

    with pytest.raises(AssertionError) as caught:
        reliable.assert_idempotent(
            receipt, "c1", order_id="o1", email="ann@example.com", effects=mails, reset=caplog.clear
        )
    complaints = [line.strip() for line in str(caught.value).splitlines() if line.startswith("  its ")]
    assert len(complaints) == 2
    assert "`log.info(" in complaints[0]
    assert complaints[1] == "its process ends after the body, before its completion is stored; then it is rescued"
