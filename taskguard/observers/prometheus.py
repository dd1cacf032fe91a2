"""Events as Prometheus counters, and an outbox's lag as gauges, on the registry of ``prometheus_client``."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from taskguard.events import Event
from taskguard.handover import OutboxStatus


class PrometheusObserver:
    """Counts every event: ``taskguard_events_total{event, task}``. Add it with ``app.taskguard.observers.add``."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._events = Counter("taskguard_events", "What happened to messages.", ["event", "task"], registry=registry)

    def __call__(self, event: Event) -> None:
        self._events.labels(event.name, event.task).inc(event.count)


class OutboxGauges:
    """How an outbox stands, read when it is scraped: ``taskguard_outbox_{waiting,retrying,dead}`` messages, and
    ``taskguard_outbox_lag_seconds``, for which the oldest that is due has waited.

    *status*: the outbox's, such as ``store.outbox.status``; asked once in *fresh* seconds at most. One process of a
    fleet is enough. A database that does not answer makes the scrape fail, which is what an alert is for.
    """

    def __init__(
        self, status: Callable[[], OutboxStatus], registry: CollectorRegistry = REGISTRY, *, fresh: float = 1.0
    ) -> None:
        self._status = status
        self._fresh = fresh
        self._read: tuple[float, OutboxStatus] | None = None
        for name, what, read in (
            ("waiting", "Messages that are due and not published.", lambda now: now.waiting),
            ("lag_seconds", "Age of the oldest message that is due.", lambda now: now.lag),
            ("retrying", "Messages that the broker refused and that will be tried again.", lambda now: now.retrying),
            ("dead", "Dead letters in the outbox's database.", lambda now: now.dead),
        ):
            gauge = Gauge(f"taskguard_outbox_{name}", what, registry=registry)
            gauge.set_function(lambda read=read: float(read(self._now())))  # type: ignore[misc]

    def _now(self) -> OutboxStatus:
        if self._read is None or time.monotonic() - self._read[0] >= self._fresh:
            self._read = time.monotonic(), self._status()
        return self._read[1]
