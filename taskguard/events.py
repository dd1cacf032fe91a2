"""What taskguard tells whoever listens: logs, metrics, traces. A side channel; nothing depends on it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger("taskguard")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something happened to a message, or to a part of the worker. ``name`` is a settlement or a short verb.

    ``count``: to how many messages, where they are told together.
    """

    name: str
    task: str = ""
    task_id: str = ""
    key: str = ""
    detail: str = ""
    count: int = 1


Observer = Callable[[Event], None]


class Observers:
    """The observers of one application. An observer that raises is logged, and the others are still told."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = list(observers)

    def add(self, observer: Observer) -> None:
        """Tell *observer* from now on."""
        self._observers.append(observer)

    def __call__(self, event: Event) -> None:
        for observer in self._observers:
            try:
                observer(event)
            except Exception:
                logger.exception("observer %r failed on %s", observer, event.name)
