"""Events as log lines of the logger ``taskguard``, with the fields in ``extra`` for structured logs."""

from __future__ import annotations

import logging
from dataclasses import asdict

from taskguard.events import Event

logger = logging.getLogger("taskguard")
_LEVELS = {
    "dead_lettered": logging.ERROR,
    "crash": logging.WARNING,
    "rescued": logging.WARNING,
    "announce_failed": logging.WARNING,
    "acknowledge_failed": logging.WARNING,
    "custody_lost": logging.WARNING,
    "reclaimed": logging.WARNING,
    "store_unavailable": logging.WARNING,
    "relay_failed": logging.WARNING,
    "permits_down": logging.WARNING,
    "queue_paused": logging.WARNING,
    "limit_near": logging.WARNING,
    "circuit_changed": logging.WARNING,
    "slot_lost": logging.WARNING,
    "downstream_paused": logging.WARNING,
    "limit_adapted": logging.INFO,
    "permits_back": logging.INFO,
    "rules_changed": logging.INFO,
    "queue_resumed": logging.INFO,
    "started": logging.INFO,
    "replayed": logging.INFO,
    "retried": logging.INFO,
    "deferred": logging.INFO,
    "discarded": logging.INFO,
}


def log_event(event: Event) -> None:
    """Log one event at the level its name deserves; DEBUG for the everyday ones."""
    level = _LEVELS.get(event.name, logging.DEBUG)
    if logger.isEnabledFor(level):
        subject = f"{event.task}[{event.task_id}]" if event.task_id else event.task
        logger.log(level, "%s %s %s", event.name, subject, event.detail, extra={"taskguard": asdict(event)})
