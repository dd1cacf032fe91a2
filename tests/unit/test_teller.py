"""The teller: in order, on a thread of its own, and whatever a result backend raises."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from taskguard.celery import teller as teller_module
from taskguard.celery.teller import Teller
from taskguard.events import Event

SOON = 10.0
"""Seconds within which a thread does what it must; only a broken one needs them."""


@pytest.fixture
def events() -> list[Event]:
    """What the teller told."""
    return []


@pytest.fixture
def teller(events: list[Event]) -> Iterator[Teller]:
    """A teller that tells."""
    teller = Teller(events.append)
    teller.start()
    yield teller
    teller.stop()


def raises(error: Exception) -> Callable[[], None]:
    def what() -> None:
        raise error

    return what


def test_what_is_to_be_told_is_told_in_order_by_another_thread(teller: Teller) -> None:
    """Whoever asks does not wait for it."""
    begin, told = threading.Event(), []
    teller.tell(lambda: told.append(begin.wait(SOON)))
    for number in range(100):
        teller.tell(lambda number=number: told.append((number, threading.current_thread() is threading.main_thread())))
    assert told == []
    begin.set()
    teller.stop()
    assert told == [True, *((number, False) for number in range(100))]


def test_an_exception_is_told_and_costs_nobody_else_anything(teller: Teller, events: list[Event]) -> None:
    """A backend's driver raises what it likes."""
    told: list[str] = []
    teller.tell(raises(OSError("the backend is away")))
    teller.tell(lambda: told.append("next"))
    teller.stop()
    assert told == ["next"]
    assert events == [Event(name="announce_failed", detail="OSError: the backend is away")]


def test_stopping_does_not_wait_for_a_backend_that_is_away(teller: Teller, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left then is not acknowledged, and delivered again."""
    back, begun, told = threading.Event(), threading.Event(), []
    monkeypatch.setattr(teller_module, "STOP_PATIENCE", 0.05)
    teller.tell(lambda: begun.set() or told.append(back.wait(SOON)))
    assert begun.wait(SOON)
    teller.stop()
    assert told == []
    back.set()
