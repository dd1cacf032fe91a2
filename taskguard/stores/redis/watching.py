"""Changes of circuits, pushed: one subscription, made again when it is lost, and then everything is read anew.

The subscription stands before the circuits are read, so no change falls between the two. A message may be older than
what was read, and a store that was emptied begins its generations anew: where a generation goes back, the store is
asked. What the caller does with a change happens in its own thread, between two messages.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from redis.exceptions import RedisError

from taskguard.errors import StoreError, StoreUnavailable
from taskguard.permits import CircuitView
from taskguard.ports import PermitStore
from taskguard.stores.redis.answers import told_view
from taskguard.stores.redis.connection import Connections

POLL = 0.2
"""Seconds between two questions whether to stop."""
SILENCE = 5.0
"""Seconds without a word after which the server is asked for one: a cut cable says nothing."""
LONGEST_PAUSE = 2.0


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
        self._connections, self._channel, self._store = connections, channel, store
        self._changed, self._stop = changed, stop
        self._seen: dict[str, int] = {}

    def run(self) -> None:
        """Blocks until it is told to stop. An outage is waited for, with growing pauses."""
        pause = POLL / 4
        while not self._stop():
            connection = self._connections.open()
            try:
                self._subscribe(connection)
                self._read_all()
                pause = POLL / 4
                self._listen(connection)
            except (RedisError, StoreError, OSError):
                self._rest(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
            finally:
                connection.disconnect()

    def _subscribe(self, connection: Any) -> None:
        connection.send_command(b"SUBSCRIBE", self._channel)
        connection.read_response()

    def _read_all(self) -> None:
        views = self._store.circuits()
        for name in self._seen.keys() - {view.name for view in views}:  # forgotten: as new
            del self._seen[name]
            self._changed(CircuitView(name=name))
        for view in views:
            self._tell(view)

    def _listen(self, connection: Any) -> None:
        heard = time.monotonic()
        asked = False
        while not self._stop():
            if connection.can_read(POLL):
                reply = connection.read_response()
                heard, asked = time.monotonic(), False
                if reply[0] == b"message":
                    self._hear(told_view(reply[2]))
            elif time.monotonic() - heard > SILENCE * (1 + asked):
                if asked:
                    raise StoreUnavailable("the subscription is silent")
                connection.send_command(b"PING", check_health=False)
                asked = True

    def _hear(self, view: CircuitView) -> None:
        self._tell(view if view.generation > self._seen.get(view.name, 0) else self._store.circuit(view.name))

    def _tell(self, view: CircuitView) -> None:
        if view.generation != self._seen.get(view.name, 0):
            self._seen[view.name] = view.generation
            self._changed(view)

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stop() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, POLL))
