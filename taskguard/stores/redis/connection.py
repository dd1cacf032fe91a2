"""Commands to one Redis server, over connections that are shared by threads and never by processes.

redis-py's client spends half of a call on retries, metrics and parsing options that scripts have no use for; this
module uses its connections alone: one packed command out, one reply in. What it promises: every wait for the network
is bounded by the timeout; a connection that turns out dead is opened again once, because every operation may be
repeated; a forked child drops what it inherited; one that was left in the middle of a reply is never used again.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from redis.connection import ConnectionPool
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    NoPermissionError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from taskguard.errors import ConfigurationError, StoreError, StoreUnavailable
from taskguard.stores.redis.scripts import Script

ANYBODY = "default"
"""The server's name for who gives no name."""
MAX_IDLE = 64
_PASSING = ("OOM", "command not allowed when used memory", "MISCONF", "BUSY", "CLUSTERDOWN", "MASTERDOWN", "NOREPLICAS")
"""How errors begin of a server that will answer later, when somebody or something has mended it."""


class Connections:
    """A server, by its URL. Nothing is connected until the first call."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self._whole_url = without_password(url), url
        self._timeout = timeout
        try:
            parts = urlsplit(url)
            if parts.scheme != "unix" and not (parts.path.strip("/") or "0").isdecimal():
                raise ValueError("redis-py would take the default database for a path that is no number")
            pool = ConnectionPool.from_url(url)
            self._make: Callable[..., Any] = pool.connection_class
            self._options: dict[str, Any] = {
                **pool.connection_kwargs,
                "protocol": 2,
                "decode_responses": False,
                "socket_timeout": timeout,
                "socket_connect_timeout": timeout,
            }
            self._make(**self._options)
        except (ValueError, TypeError, RedisError):  # the text may quote the password
            raise ConfigurationError(
                f"store: {self.url} is no Redis URL; write redis://user:password@host:6379/0 (rediss:// for TLS, "
                "unix:///path for a socket), with special characters in the password percent-encoded"
            ) from None
        self._idle: deque[Any] = deque()
        self._pid = os.getpid()

    @property
    def server(self) -> tuple[str, int]:
        """Its host and port, as the URL names them."""
        return self._options.get("host", "localhost"), int(self._options.get("port", 6379))

    @property
    def user(self) -> str:
        """Who it is asked as."""
        return self._options.get("username") or ANYBODY

    def reaches_as(self, other: Connections) -> bool:
        """Whether *other* leads to the same database as the same user: by the same URL."""
        return self._whole_url == other._whole_url

    def call(self, *command: bytes) -> Any:
        """Send one command and return its reply. Raises StoreUnavailable or StoreError."""
        try:
            return self._call(command)
        except RedisError as exc:
            raise self.translated(exc) from exc

    def run(self, script: Script, key: bytes, *arguments: bytes) -> Any:
        """Run *script* on the partition *key*, loading it where the server does not know it. Raises as `call`."""
        return self.run_packed(script, (b"EVALSHA", script.sha, b"1", key, *arguments))

    def run_packed(self, script: Script, command: tuple[bytes, ...] | bytes) -> Any:
        """The same for a whole EVALSHA *command*, which `packed` may have made beforehand."""
        try:
            try:
                return self._call(command)
            except NoScriptError:
                self._call((b"SCRIPT", b"LOAD", script.source))
                return self._call(command)
        except RedisError as exc:
            raise self.translated(exc) from exc

    def open(self) -> Any:
        """A connection that is the caller's alone, for what stays open: a subscription. Errors are redis-py's."""
        return self._make(**self._options)

    def close(self) -> None:
        """Close the connections that are not in use."""
        idle = self._own_idle()
        while idle:
            idle.pop().disconnect()

    def _own_idle(self) -> deque[Any]:
        # Not `forks.process`: what forks in C (uWSGI) runs no hooks of Python's, and both would read one socket.
        if self._pid != os.getpid():
            # The parent still uses these sockets: forgetting them closes only this process's descriptors.
            self._idle, self._pid = deque(), os.getpid()
        return self._idle

    def _call(self, command: tuple[bytes, ...] | bytes) -> Any:
        idle = self._own_idle()
        try:
            connection, used = idle.pop(), True
        except IndexError:
            connection, used = self._make(**self._options), False
        try:
            try:
                reply = _exchange(connection, command)
            except RedisConnectionError:
                if not used:
                    raise
                connection.disconnect()
                reply = _exchange(connection, command)
        except ResponseError:
            self._give_back(connection, idle)
            raise
        except BaseException:
            # Also a soft time limit, a greenlet's timeout or Ctrl-C: the reply may still be under way.
            connection.disconnect()
            raise
        self._give_back(connection, idle)
        return reply

    def _give_back(self, connection: Any, idle: deque[Any]) -> None:
        if len(idle) < MAX_IDLE:
            idle.append(connection)
        else:
            connection.disconnect()

    def translated(self, exc: RedisError) -> StoreError:
        """What this error is to us."""
        said = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        match exc:
            case AuthenticationError() | AuthorizationError() | NoPermissionError():
                return StoreError(f"store {self.url} refused: {said}; check user, password and rights in its URL")
            case RedisTimeoutError():
                return StoreUnavailable(
                    f"store {self.url} did not answer within {self._timeout:g} s: {said}; "
                    "check the network and the server's load, or raise store_timeout"
                )
            case BusyLoadingError():
                return StoreUnavailable(f"store {self.url} is loading its data: {said}; wait until it is done")
            case ReadOnlyError():
                return StoreUnavailable(f"store {self.url} is a replica: {said}; use the primary's URL")
            case RedisConnectionError():
                return StoreUnavailable(
                    f"store {self.url} does not answer: {said}; check that Redis is running there and the URL is right"
                )
            case ResponseError() if said.startswith(_PASSING):
                return StoreUnavailable(f"store {self.url} cannot serve now: {said}; see the server's log")
        return StoreError(f"store {self.url} failed: {type(exc).__name__}: {said}; see the server's log")


def _exchange(connection: Any, command: tuple[bytes, ...] | bytes) -> Any:
    whole = command if type(command) is bytes else packed(*command)
    connection.send_packed_command([whole], check_health=False)
    return connection.read_response()


def packed(*command: bytes) -> bytes:
    """*command* as it goes over the wire. redis-py's own takes twice as long, because it takes more than bytes."""
    whole = [b"*%d\r\n" % len(command)]
    for part in command:
        whole += (b"$%d\r\n" % len(part), part, b"\r\n")
    return b"".join(whole)


def without_password(url: str) -> str:
    """*url* as it may be shown: without user, password and query."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        if "@" in parts.path + parts.fragment + parts.query:  # a password with a bare "/", "#" or "?"
            raise ValueError
        return urlunsplit((parts.scheme, host, parts.path, "", ""))
    except ValueError:
        return f"{url.partition('://')[0]}://…"
