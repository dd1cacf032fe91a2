"""Reports, rehearsed: a page that was drawn when the worker died is drawn again, and the report is the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from taskguard.testing import Reliable
from workers import reports
from workers.reports import monthly


def test_a_report_is_whole_after_every_crash(reliable: Reliable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page's look at its custody is a crash point."""
    drawn: set[float] = set()
    monkeypatch.setattr(reports, "time", SimpleNamespace(sleep=drawn.add))
    lived = reliable.assert_idempotent(monthly, "2026-11", pages=3, seconds_per_page=0.5, effects=drawn)
    assert sum("before `holds` in the store" in history for history in lived) == 3


def test_a_report_that_was_asked_for_twice_is_drawn_up_once(
    reliable: Reliable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both askers get it."""
    pages: list[float] = []
    monkeypatch.setattr(reports, "time", SimpleNamespace(sleep=pages.append))
    first, second = monthly.delay("2026-11", pages=2), monthly.delay("2026-11", pages=2)
    reliable.drain()
    assert first.get() == second.get() == "2026-11: 2 pages"
    assert pages == [1.0, 1.0]
