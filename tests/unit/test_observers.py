"""Observers: where events go."""

import logging

import pytest
from prometheus_client import CollectorRegistry

from taskguard.events import Event, Observers
from taskguard.observers.logging import log_event
from taskguard.observers.prometheus import PrometheusObserver


def test_prometheus_counts_every_event_by_name_and_task() -> None:
    """``taskguard_events_total`` is there to be scraped."""
    registry = CollectorRegistry()
    observe = Observers(PrometheusObserver(registry))
    for _ in range(3):
        observe(Event(name="completed", task="shop.charge"))
    assert registry.get_sample_value("taskguard_events_total", {"event": "completed", "task": "shop.charge"}) == 3


def test_an_observer_that_raises_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and the next one is still told."""
    seen: list[str] = []

    def broken(event: Event) -> None:
        raise RuntimeError(event.name)

    observe = Observers(broken)
    observe.add(lambda event: seen.append(event.name))
    observe(Event(name="retried"))
    assert seen == ["retried"]
    assert "observer" in caplog.text


@pytest.mark.parametrize(("name", "level"), [("dead_lettered", logging.ERROR), ("rescued", logging.WARNING)])
def test_log_lines_have_the_level_their_event_deserves(name: str, level: int, caplog: pytest.LogCaptureFixture) -> None:
    """An operator who looks at warnings sees what went wrong, with its fields for structured logs."""
    with caplog.at_level(logging.DEBUG, logger="taskguard"):
        log_event(Event(name=name, task="shop.charge", task_id="1", detail="poison"))
    (record,) = caplog.records
    assert record.levelno == level
    assert record.getMessage() == f"{name} shop.charge[1] poison"
    assert record.taskguard["task_id"] == "1"  # type: ignore[attr-defined]
