"""Rules in Redis: a change is one script, and a message on a channel tells every process at once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from redis.exceptions import RedisError

from taskguard.clock import Clock
from taskguard.errors import StoreError
from taskguard.forks import undisturbed
from taskguard.rules import RuleChange, RuleSet
from taskguard.stores.redis.connection import Connections
from taskguard.stores.redis.layout import decoded, encoded, ms, partition
from taskguard.stores.redis.scripts import script
from taskguard.stores.revisions import LOG, LOOK, RevisedRules, read_set


class RedisRules(RevisedRules):
    """A `RuleStore` in one Redis server. ``:rules:version`` of the partition is what a permit script may read."""

    def __init__(self, connections: Connections, *, namespace: str, clock: Clock | None = None) -> None:
        self._connections = connections
        self._partition = partition(namespace)
        self._clock = clock

    @classmethod
    def from_url(cls, url: str, *, namespace: str, timeout: float = 5.0, clock: Clock | None = None) -> Self:
        """The rules behind *url*. Raises ConfigurationError for a URL that redis-py cannot read."""
        return cls(Connections(url, timeout), namespace=namespace, clock=clock)

    def _run(self, verb: str, *arguments: bytes) -> Any:
        now = b"" if self._clock is None else ms(self._clock())
        return self._connections.run(script(verb, "_rules"), self._partition, now, *arguments)

    def rules(self, known: int = 0) -> RuleSet | None:
        reply = self._run("rules", b"%d" % known)
        if reply is None:
            return None
        return read_set(int(reply[0]), map(decoded, reply[1:]))

    def version(self) -> int:
        return int(self._connections.call(b"GET", self._partition + b":rules:version") or 0)

    def changes(self, *, limit: int = 20) -> list[RuleChange]:
        found = self._connections.call(b"LRANGE", self._partition + b":rules:log", b"0", b"%d" % (limit - 1))
        changes = []
        for line in found if limit > 0 else ():
            version, at, text = decoded(line).split(" ", 2)
            changes.append(RuleChange(version=int(version), at=int(at) / 1000, **json.loads(text)))
        return changes

    def _write(
        self, after: RuleSet, put: Sequence[tuple[str, str]], gone: Sequence[str], *, who: str, why: str, what: str
    ) -> int | None:
        rules = [encoded(part) for each in put for part in each]
        line = encoded(json.dumps({"who": who, "why": why, "what": what}))
        version = self._run(
            "change_rules", b"%d" % after.version, b"%d" % LOG, line, b"%d" % len(put), *rules, *map(encoded, gone)
        )
        return None if version is None else int(version)

    def watch(self, changed: Callable[[int], None], *, stop: Callable[[], bool]) -> None:
        connection: Any = None
        try:
            while not stop():
                try:
                    looked = time.monotonic()
                    with undisturbed:
                        if connection is None:
                            connection = self._connections.open()
                            connection.send_command(b"SUBSCRIBE", self._partition + b":rules:changed")
                        # Also on a live subscription: a connection may be dead without a word, and what was published
                        # between two connections is heard on neither.
                        changed(self.version())
                    while connection.can_read(max(0.0, looked + LOOK - time.monotonic())):
                        with undisturbed:
                            kind, _, payload = connection.read_response()
                            if kind == b"message":
                                changed(int(payload))
                except (RedisError, StoreError, OSError):
                    if connection is not None:
                        connection.disconnect()
                        connection = None
                    rest(LOOK, stop)
        finally:
            if connection is not None:
                connection.disconnect()

    def close(self) -> None:
        self._connections.close()


def rest(seconds: float, stop: Callable[[], bool]) -> None:
    """Wait, but not after *stop* says so."""
    until = time.monotonic() + seconds
    while not stop() and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.05))
