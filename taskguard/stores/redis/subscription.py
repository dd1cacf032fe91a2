"""One subscription, made again when it is lost. What was said in between is not heard: *opened* is to read it anew."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from redis.exceptions import NoPermissionError, RedisError

from taskguard.errors import StoreError, StoreUnavailable
from taskguard.forks import undisturbed
from taskguard.stores.redis.connection import Connections

SILENCE = 5.0
"""Seconds without a word after which the server is asked for one: a cut cable says nothing."""
SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
"""Seconds between two attempts to subscribe, in an outage."""
REFUSED_PAUSE = 60.0
"""Seconds until a server is asked again that does not let this user listen."""
GLANCE = 0.2
"""Seconds at most between two questions whether to stop, while there is an outage."""


class Subscription:
    """One listener on *channel*. All callbacks are called in the thread of `run`.

    opened: called when the subscription stands, before anything is heard. lost: when it does no more, and when the
    callbacks failed. glance: seconds at most between two questions whether to stop; each wakes the process.
    """

    def __init__(
        self,
        connections: Connections,
        channel: bytes,
        *,
        opened: Callable[[], None],
        heard: Callable[[bytes], None],
        lost: Callable[[], None] = lambda: None,
        stop: Callable[[], bool],
        glance: float | None = None,
    ) -> None:
        self._connections, self._channel = connections, channel
        self._opened, self._heard, self._lost = opened, heard, lost
        self._stop, self._glance = stop, SILENCE if glance is None else glance

    def run(self) -> None:
        """Blocks until it is told to stop. An outage is waited for, with growing pauses."""
        pause = SHORTEST_PAUSE
        while not self._stop():
            connection = self._connections.open()
            try:
                with undisturbed:
                    connection.send_command(b"SUBSCRIBE", self._channel)
                    connection.read_response()
                    self._opened()
                pause = SHORTEST_PAUSE
                self._listen(connection)
            except (RedisError, StoreError, OSError) as exc:
                self._lost()
                refused = isinstance(exc, NoPermissionError) or isinstance(exc.__cause__, NoPermissionError)
                self._rest(REFUSED_PAUSE if refused else pause)
                pause = min(pause * 2, LONGEST_PAUSE)
            finally:
                connection.disconnect()

    def _listen(self, connection: Any) -> None:
        heard = time.monotonic()
        asked = False
        while not self._stop():
            if connection.can_read(self._glance):
                reply = connection.read_response()
                heard, asked = time.monotonic(), False
                if reply[0] == b"message":
                    self._heard(reply[2])
            elif time.monotonic() - heard >= SILENCE * (1 + asked):
                if asked:
                    raise StoreUnavailable("the subscription is silent")
                connection.send_command(b"PING", check_health=False)
                asked = True

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stop() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, GLANCE))


def bell(
    connections: Connections, channel: bytes, told: Callable[[bool], None], *, stop: Callable[[], bool]
) -> Subscription:
    """A subscription that says no more than that something changed: True. False: it is lost, and nothing will be said.

    It is lost, too, where this user may listen and not publish: then its scripts cannot ring.
    """

    def opened() -> None:
        connections.call(b"PUBLISH", channel + b":hello", b"")  # nobody hears it
        told(True)

    return Subscription(
        connections,
        channel,
        opened=opened,
        heard=lambda _: told(True),
        lost=lambda: told(False),
        stop=stop,
    )
