"""Observers: where events go."""

import logging

import pytest
from freezegun import freeze_time
from prometheus_client import CollectorRegistry

from taskguard.events import Event, Observers
from taskguard.observers.logging import MOST, REPEAT, EventLog, log_event
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


def test_what_a_worker_says_each_second_of_an_outage_is_logged_twice_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    """With how often it was left out. What is about one message is never left out, nor is another line."""
    log, silence = EventLog(), Event(name="store_unavailable", detail="heartbeat: no answer")
    with freeze_time("2026-11-22 12:00:00") as time:
        for _ in range(int(REPEAT) + 1):
            log(silence)
            time.tick(1)
    log(Event(name="store_unavailable", detail="relay: no answer"))
    for _ in range(2):
        log(Event(name="store_unavailable", task="shop.charge", task_id="1", detail="no answer"))
    assert [record.getMessage().partition(" ")[2].strip() for record in caplog.records] == [
        "heartbeat: no answer",
        "heartbeat: no answer (and 29 times before)",
        "relay: no answer",
        *["shop.charge[1] no answer"] * 2,
    ]


def test_the_log_remembers_no_more_lines_than_it_can_bear(caplog: pytest.LogCaptureFixture) -> None:
    """Errors with a number in them are all different."""
    log = EventLog()
    for number in range(10 * MOST):
        log(Event(name="relay_failed", detail=f"record {number}"))
    assert len(caplog.records) == 10 * MOST
    assert len(log._said) <= MOST
