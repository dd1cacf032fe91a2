"""The outbox's gauges: read when they are scraped, and not for each of them anew."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from taskguard.handover import OutboxStatus
from taskguard.observers.prometheus import OutboxGauges


def test_a_scrape_asks_once_and_shows_waiting_and_lag() -> None:
    """Four gauges, one question; the next scrape asks again when the answer is no longer fresh."""
    asked = []

    def status() -> OutboxStatus:
        asked.append(1)
        return OutboxStatus(waiting=7 * len(asked), lag=1.5, later=2, retrying=3, dead=4, keys=1)

    registry = CollectorRegistry()
    gauges = OutboxGauges(status, registry, fresh=3600)
    shown = generate_latest(registry).decode()
    assert len(asked) == 1
    for line in ("waiting 7.0", "lag_seconds 1.5", "retrying 3.0", "dead 4.0"):
        assert f"taskguard_outbox_{line}" in shown
    gauges._read = None
    assert "taskguard_outbox_waiting 14.0" in generate_latest(registry).decode()
