"""The line: one connection on which requests are sent without waiting, and one that tells when a queue has grown.

Neither is the pool's. Both are read when the event loop finds them readable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from taskguard.celery.redis_broker.scripts import script
from taskguard.celery.redis_broker.stock import redis as stock

INVALIDATIONS = "__redis__:invalidate"
SILENCE = 5.0
"""Seconds a broker may take for an answer that is waited for, where the user set no ``socket_timeout``."""


class End:
    """What kombu's poller takes for a client."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection


class Line:
    """Opened at once. Raises what redis-py raises when the broker is away."""

    def __init__(self, channel: Any) -> None:
        pool = channel.async_pool
        options = {**pool.connection_kwargs, "protocol": 2, "socket_timeout": channel.silence}
        self.turns = End(pool.connection_class(**options))
        self.wakes = End(pool.connection_class(**options))
        self.tracked = False
        try:
            self.turns.connection.connect()
            self.tracked = self._track()
            self.load()
        except BaseException:
            self.close()
            raise

    def load(self) -> None:
        """Make the server know the script. Only while nothing is awaited."""
        self._ask("SCRIPT", "LOAD", script("turn").source)

    def _track(self) -> bool:
        """Have invalidations sent to the other connection. False: this server does not do that."""
        wakes = self.wakes.connection
        wakes.connect()
        wakes.send_command("CLIENT", "ID", check_health=False)
        try:
            number = wakes.read_response()
            wakes.send_command("SUBSCRIBE", INVALIDATIONS, check_health=False)
            wakes.read_response()
            # Of what is looked at, and of nothing else: what turns read, every worker of the fleet writes all the time.
            self._ask("CLIENT", "TRACKING", "ON", "REDIRECT", number, "OPTIN", "NOLOOP")
            self._ask("CLIENT", "CACHING", "YES")  # whether it may: the next command reads no key
        except stock.redis.exceptions.ResponseError as exc:
            stock.warning(
                "taskguard: this broker cannot tell of new messages (%s), so it is asked ten times a second", exc
            )
            return False
        return True

    def _ask(self, *command: Any) -> Any:
        self.turns.connection.send_command(*command, check_health=False)
        return self.turns.connection.read_response()

    @property
    def lost(self) -> bool:
        """Whether a connection has broken."""
        return self.turns.connection._sock is None or (self.tracked and self.wakes.connection._sock is None)

    def send(self, command: Sequence[Any]) -> None:
        """Send a request; its reply comes in turn."""
        connection = self._connected(self.turns)
        connection.send_packed_command(connection.pack_command(*command), check_health=False)

    def look(self, keys: Sequence[Any]) -> None:
        """Ask how many of *keys* are there. On a tracked line, to be told of a change: a reply before that one."""
        connection = self._connected(self.turns)
        commands = [("CLIENT", "CACHING", "YES")] * self.tracked + [("EXISTS", *keys)]
        connection.send_packed_command(connection.pack_commands(commands), check_health=False)

    def read(self) -> Any:
        """The next reply. Raises an error reply."""
        return self.turns.connection.read_response()

    def more(self, timeout: float = 0) -> bool:
        """Whether there is something more to read."""
        return bool(self._connected(self.turns).can_read(timeout=timeout))

    @staticmethod
    def _connected(end: End) -> Any:
        """redis-py connects a broken connection again by itself, and replies would go to the wrong requests."""
        if end.connection._sock is None:
            raise stock.redis.exceptions.ConnectionError("the connection to Redis is gone")
        return end.connection

    def hear(self) -> None:
        """Read what came on the other connection."""
        connection = self._connected(self.wakes)
        connection.read_response()
        while connection.can_read(timeout=0):
            connection.read_response()

    def close(self) -> None:
        """Hang up."""
        for end in (self.turns, self.wakes):
            end.connection.disconnect()

    def abandon(self) -> None:
        """In a forked child: close its copies of the sockets, which the parent goes on using."""
        for end in (self.turns, self.wakes):
            sock, end.connection._sock = end.connection._sock, None
            if sock is not None:
                sock.close()
