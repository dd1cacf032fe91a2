"""Changes of circuits, pushed: a subscription, and all circuits read anew whenever it is made.

The subscription stands before the circuits are read, so no change falls between the two. A message may be older than
what was read, and a store that was emptied begins its generations anew: where a generation goes back, the store is
asked. What the caller does with a change happens in its own thread, between two messages.
"""

from __future__ import annotations

from collections.abc import Callable

from taskguard.permits import CircuitView
from taskguard.ports import PermitStore
from taskguard.stores.redis.answers import told_view
from taskguard.stores.redis.connection import Connections
from taskguard.stores.redis.subscription import Subscription

POLL = 0.2
"""Seconds between two questions whether to stop."""


class Watch:
    """One watcher of the circuits of *store*, told on *channel*."""

    def __init__(
        self,
        connections: Connections,
        channel: bytes,
        store: PermitStore,
        changed: Callable[[CircuitView], None],
        *,
        stop: Callable[[], bool],
    ) -> None:
        self._store, self._changed = store, changed
        self._seen: dict[str, int] = {}
        self._told = Subscription(connections, channel, opened=self._read_all, heard=self._hear, stop=stop, glance=POLL)

    def run(self) -> None:
        """Blocks until it is told to stop."""
        self._told.run()

    def _read_all(self) -> None:
        views = self._store.circuits()
        for name in self._seen.keys() - {view.name for view in views}:  # forgotten: as new
            del self._seen[name]
            self._changed(CircuitView(name=name))
        for view in views:
            self._tell(view)

    def _hear(self, told: bytes) -> None:
        view = told_view(told)
        self._tell(view if view.generation > self._seen.get(view.name, 0) else self._store.circuit(view.name))

    def _tell(self, view: CircuitView) -> None:
        if view.generation != self._seen.get(view.name, 0):
            self._seen[view.name] = view.generation
            self._changed(view)
