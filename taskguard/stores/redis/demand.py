"""Demand in Redis: a hash for each window, which ends by its TTL."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Self

from taskguard.clock import Clock
from taskguard.stores.redis.connection import Connections
from taskguard.stores.redis.layout import decoded, encoded, ms, partition
from taskguard.stores.redis.scripts import script
from taskguard.traffic import KEPT, MOST, OTHER, WINDOW, Asked, Counted

PAGE = 20
"""Windows read in one script, which nobody else's script runs beside."""


class RedisDemand:
    """A `DemandStore` in one Redis server."""

    def __init__(self, connections: Connections, *, namespace: str, clock: Clock | None = None) -> None:
        self._connections = connections
        self._partition = partition(namespace)
        self._clock = clock

    @classmethod
    def from_url(cls, url: str, *, namespace: str, timeout: float = 5.0, clock: Clock | None = None) -> Self:
        """The demand behind *url*. Raises ConfigurationError for a URL that redis-py cannot read."""
        return cls(Connections(url, timeout), namespace=namespace, clock=clock)

    def add(self, asked: Sequence[Asked]) -> list[Counted]:
        if not asked:
            return []
        now = b"" if self._clock is None else ms(self._clock())
        rows = [part for each in asked for part in (_name(each), b"%.9g" % each.accepted, b"%.9g" % each.refused)]
        other = _name(Asked(client=OTHER, endpoint=OTHER, rule=OTHER))
        given = (now, ms(WINDOW), ms(KEPT + WINDOW), b"%d" % MOST, other, *rows)
        reply = self._connections.run(script("count_demand", "_rules"), self._partition, *given)
        at = int(reply[0]) / 1000
        sums = zip(asked, reply[1::2], reply[2::2], strict=True)
        found = {_name(each): (accepted, refused) for each, accepted, refused in sums if accepted}
        return [_counted(at, name, *each) for name, each in found.items()]

    def read(self, *, since: float) -> list[Counted]:
        now = self.now()
        first, last = int(max(since, now - KEPT) // WINDOW), int(now // WINDOW)
        found: list[Counted] = []
        for number in range(first, last + 1, PAGE):
            given = (b"", ms(number * WINDOW), ms(WINDOW), b"%d" % min(PAGE, last + 1 - number))
            reply = self._connections.run(script("read_demand", "_rules"), self._partition, *given)
            for at, flat in zip(reply[::2], reply[1::2], strict=True):
                found += _window(int(at) / 1000, flat)
        return found

    def now(self) -> float:
        if self._clock is not None:
            return self._clock()
        seconds, microseconds = self._connections.call(b"TIME")
        return int(seconds) + int(microseconds) / 1e6

    def close(self) -> None:
        self._connections.close()


def _window(at: float, flat: Sequence[bytes]) -> Iterator[Counted]:
    sums = dict(zip(flat[::2], flat[1::2], strict=True))
    for field, accepted in sums.items():
        if field.startswith(b"+"):
            yield _counted(at, field[1:], accepted, sums.get(b"-" + field[1:], b"0"))


def _name(asked: Asked) -> bytes:
    return encoded(json.dumps([asked.client, asked.endpoint, asked.rule]))


def _counted(at: float, name: bytes, accepted: Any, refused: Any) -> Counted:
    client, endpoint, rule = json.loads(decoded(name))
    return Counted(
        window_at=at, client=client, endpoint=endpoint, rule=rule, accepted=float(accepted), refused=float(refused)
    )
