"""Rules in process memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar

from taskguard.clock import Clock, to_ms, wall_clock
from taskguard.rules import RuleChange, RuleSet
from taskguard.stores.revisions import LOG, LOOK, RevisedRules


class MemoryRules(RevisedRules):
    """A `RuleStore` in process memory. Its clock is the process's unless one is given."""

    _shared: ClassVar[dict[str, MemoryRules]] = {}

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or wall_clock
        self._changed = threading.Condition()
        self._rules = RuleSet()
        self._log: deque[RuleChange] = deque(maxlen=LOG)

    @classmethod
    def shared(cls, namespace: str, *, clock: Clock | None = None) -> MemoryRules:
        """The process's rules of this namespace; with a clock of its own, a new store."""
        if clock is not None:
            return cls(clock)
        return cls._shared.setdefault(namespace, cls())

    def rules(self, known: int = 0) -> RuleSet | None:
        found = self._rules
        return None if found.version == known else found

    def version(self) -> int:
        return self._rules.version

    def changes(self, *, limit: int = 20) -> list[RuleChange]:
        with self._changed:
            return list(self._log)[:limit]

    def _write(
        self, after: RuleSet, put: Sequence[tuple[str, str]], gone: Sequence[str], *, who: str, why: str, what: str
    ) -> int | None:
        with self._changed:
            if self._rules.version != after.version:
                return None
            now = self._clock()
            version = max(after.version + 1, to_ms(now))
            self._rules = RuleSet(version, after.rules, after.tiers)
            self._log.appendleft(RuleChange(version=version, at=now, who=who, why=why, what=what))
            self._changed.notify_all()
            return version

    def watch(self, changed: Callable[[int], None], *, stop: Callable[[], bool]) -> None:
        while not stop():
            version = self._rules.version
            changed(version)
            with self._changed:
                self._changed.wait_for(lambda seen=version: self._rules.version != seen, LOOK)  # type: ignore[misc]

    def close(self) -> None:
        """Nothing to give back."""
