"""Events as log lines of the logger ``taskguard``, with the fields in ``extra`` for structured logs.

What a server that is away has the same worker say each second is said once in `REPEAT` seconds, with its count.
"""

from __future__ import annotations

import logging
import time
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
    "store_back": logging.INFO,
    "rules_changed": logging.INFO,
    "queue_resumed": logging.INFO,
    "started": logging.INFO,
    "replayed": logging.INFO,
    "retried": logging.INFO,
    "deferred": logging.INFO,
    "discarded": logging.INFO,
}
_REPEATING = frozenset({"store_unavailable", "relay_failed", "announce_failed"})
REPEAT = 30.0
"""Seconds in which the same line is said once."""
MOST = 100
"""Different lines whose repetition is remembered."""


class EventLog:
    """An observer."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, str], tuple[float, int]] = {}

    def __call__(self, event: Event) -> None:
        """Log one event at the level its name deserves; DEBUG for the everyday ones."""
        level = _LEVELS.get(event.name, logging.DEBUG)
        if not logger.isEnabledFor(level):
            return
        again = self._repeated(event)
        if again is not None:
            detail = f"{event.detail} (and {again} times before)" if again else event.detail
            subject = f"{event.task}[{event.task_id}]" if event.task_id else event.task
            logger.log(level, "%s %s %s", event.name, subject, detail, extra={"taskguard": asdict(event)})

    def _repeated(self, event: Event) -> int | None:
        """How often it was left out since it was said last. None: it is to be left out too."""
        if event.name == "store_back":  # the next outage is news
            self._said = {line: said for line, said in self._said.items() if line[0] != "store_unavailable"}
        if event.name not in _REPEATING or event.task_id:
            return 0
        line, now = (event.name, event.detail), time.monotonic()
        said_at, left_out = self._said.get(line, (now - REPEAT, 0))
        if now - said_at < REPEAT:
            self._said[line] = said_at, left_out + 1
            return None
        if len(self._said) >= MOST:
            self._said.clear()
        self._said[line] = now, 0
        return left_out


log_event = EventLog()
