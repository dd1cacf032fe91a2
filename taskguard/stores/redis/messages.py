"""Messages in Redis. `lifecycle` says what each operation does; ``lua/<verb>.lua`` is its translation.

A crash of a client between two calls leaves nothing half done, because each call is one script. What a crash of the
server loses is what its persistence loses: ``appendfsync everysec`` up to a second, ``always`` nothing.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

from taskguard.clock import Clock
from taskguard.custody import Claim, Depth, Hold, Leased, ResultEntry, Unique
from taskguard.envelope import Envelope
from taskguard.errors import StoreError
from taskguard.lifecycle import PUBLISHED_RETENTION
from taskguard.ports import JointStore, PermitStore
from taskguard.record import Attempt, Failure, Record, State
from taskguard.stores.redis.claims import claim_arguments, claim_of
from taskguard.stores.redis.connection import ANYBODY, Connections
from taskguard.stores.redis.joint import RedisJoint
from taskguard.stores.redis.layout import decoded, encoded, envelope_arguments, ms, partition, to_record
from taskguard.stores.redis.permits import RedisPermits
from taskguard.stores.redis.scripts import script
from taskguard.stores.redis.subscription import bell

OLDEST_SERVER = (6, 2)
"""Version 7 is what runs are measured on; 6.2 is what the demo's bundled server is."""
PAGE = 100
"""Records in one page of `scan`."""


class RedisStore:
    """A `MessageStore` in one Redis server."""

    def __init__(self, connections: Connections, *, namespace: str, clock: Clock | None = None) -> None:
        self._connections = connections
        self._partition = partition(namespace)
        self._clock = clock

    @classmethod
    def from_url(cls, url: str, *, namespace: str, timeout: float = 5.0, clock: Clock | None = None) -> Self:
        """The store behind *url*. Raises ConfigurationError for a URL that redis-py cannot read."""
        return cls(Connections(url, timeout), namespace=namespace, clock=clock)

    def _run(self, verb: str, *arguments: bytes) -> Any:
        now = b"" if self._clock is None else ms(self._clock())
        return self._connections.run(script(verb, "_record"), self._partition, now, *arguments)

    # -- custody ----------------------------------------------------------------------------------------------------

    def claim(self, envelope: Envelope, *, holder: str, lease: float, max_crashes: int) -> Claim:
        return claim_of(self._run("claim", *claim_arguments(envelope, holder, lease, max_crashes)))

    def joined_with(self, permits: PermitStore) -> JointStore | None:
        if (
            isinstance(permits, RedisPermits)
            and (permits.partition, permits.clock) == (self._partition, self._clock)
            and permits.connections.reaches_as(self._connections)
        ):
            return RedisJoint(self._connections, permits)
        return None

    def renew(self, holds: Sequence[Hold], *, lease: float, keep: bool) -> list[bool]:
        if not holds:
            return []
        return [bool(held) for held in self._run("renew", ms(lease), b"%d" % keep, *_tickets(holds))]

    def holds(self, id: str, token: int) -> bool:
        key = b"%b:record:%b" % (self._partition, encoded(id))
        reply: list[bytes | None] = self._connections.call(b"HMGET", key, b"st", b"tok")
        return reply == [b"running", b"%d" % token]

    def complete(
        self, id: str, token: int, *, result: bytes, retention: float, entry: ResultEntry | None = None
    ) -> bool:
        told = () if entry is None else (b"%d" % entry.database, entry.key, entry.payload, b"%d" % entry.expires)
        return bool(self._run("complete", encoded(id), b"%d" % token, result, ms(retention), *told))

    def writes_results_to(self, host: str, port: int, user: str = "") -> bool:
        return self._connections.server == (host, port) and self._connections.user == (user or ANYBODY)

    def rest(self, id: str, token: int, envelope: Envelope, *, due_at: float, attempt: Attempt | None) -> bool:
        message = envelope_arguments(envelope)
        return bool(self._run("rest", encoded(id), b"%d" % token, ms(due_at), _line(attempt), *message))

    def bury(self, id: str, token: int, *, failure: Failure, attempt: Attempt | None) -> bool:
        return bool(self._run("bury", encoded(id), b"%d" % token, encoded(failure.to_json()), _line(attempt)))

    def discard(self, id: str, token: int, *, reason: str, retention: float) -> bool:
        return bool(self._run("discard", encoded(id), b"%d" % token, encoded(reason), ms(retention)))

    def crash(self, hold: Hold, envelope: Envelope, *, attempt: Attempt) -> bool:
        message = envelope_arguments(envelope)
        return bool(self._run("crash", encoded(hold.id), encoded(hold.holder), _line(attempt), *message))

    def finish(self, holds: Sequence[Hold]) -> None:
        if holds:
            self._run("finish", *_tickets(holds))

    # -- messages at rest -------------------------------------------------------------------------------------------

    def schedule(
        self, envelope: Envelope, *, due_at: float, waits_on: str = "", lease: str = "", unique: Unique | None = None
    ) -> str:
        holder: bytes = self._run(
            "schedule",
            encoded(envelope.copy_id),
            ms(due_at),
            encoded(waits_on),
            encoded(lease),
            encoded(unique.name if unique else ""),
            ms(unique.seconds if unique else 0),
            *envelope_arguments(envelope),
        )
        return decoded(holder)

    def bury_message(self, envelope: Envelope, *, failure: Failure, history: str = "") -> str:
        why = encoded(failure.to_json())
        self._run("bury_message", encoded(envelope.copy_id), why, encoded(history), *envelope_arguments(envelope))
        return envelope.copy_id

    def take_due(self, *, limit: int, lease: float) -> list[Leased]:
        name = uuid.uuid4().hex
        reply: list[bytes] = self._run("take_due", b"%d" % limit, ms(lease), encoded(name))
        leased = zip(reply[::3], reply[1::3], reply[2::3], strict=True)
        return [Leased(decoded(id), name, wire, rescued=int(crashes) > 0) for id, wire, crashes in leased]

    def due_in(self) -> float | None:
        left = self._run("due_in")
        return None if left is None else int(left) / 1000

    def watch_due(self, told: Callable[[bool], None], *, stop: Callable[[], bool]) -> None:
        bell(self._connections, self._partition + b":due", told, stop=stop).run()

    def remove(self, leased: Sequence[Leased]) -> int:
        if not leased:
            return 0
        tickets = [part for item in leased for part in (encoded(item.id), encoded(item.lease))]
        return int(self._run("remove", ms(PUBLISHED_RETENTION), *tickets))

    # -- names ------------------------------------------------------------------------------------------------------

    def release_unique(self, name: str, task_id: str) -> bool:
        return bool(self._run("release_unique", encoded(name), encoded(task_id)))

    def revoke(self, task_ids: Sequence[str], *, retention: float) -> None:
        if task_ids:
            self._run("revoke", ms(retention), *map(encoded, task_ids))

    # -- operators --------------------------------------------------------------------------------------------------

    def find(self, id: str) -> Record | None:
        reply = self._run("find", encoded(id))
        return None if reply is None else to_record(id, *reply)

    def scan(self, state: State) -> Iterator[Record]:
        seen = [b"0", b""]
        while page := self._run("scan", encoded(state), b"%d" % PAGE, *seen):
            seen = page[-1][:2]
            for _, id, *texts in page:
                yield to_record(decoded(id), *texts)

    def depths(self) -> Mapping[State, Depth]:
        reply = self._run("depths", *map(encoded, State))
        return {
            state: Depth(int(count), float(oldest) / 1000 if oldest else None)
            for state, count, oldest in zip(State, reply[::2], reply[1::2], strict=True)
        }

    def requeue(self, id: str, envelope: Envelope, *, due_at: float) -> bool:
        return bool(self._run("requeue", encoded(id), ms(due_at), *envelope_arguments(envelope)))

    def purge(self, id: str, *, retention: float) -> bool:
        return bool(self._run("purge", encoded(id), ms(retention)))

    def expire(self, *, limit: int) -> int:
        return int(self._run("expire", b"%d" % limit))

    def now(self) -> float:
        if self._clock is not None:
            return self._clock()
        seconds, microseconds = self._connections.call(b"TIME")
        return int(seconds) + int(microseconds) / 1e6

    def ping(self) -> None:
        said: bytes = self._connections.call(b"INFO", b"server")
        found = re.search(rb"redis_version:((\d+)\.(\d+)\S*)", said)
        if found is None or (int(found[2]), int(found[3])) < OLDEST_SERVER:
            version = decoded(found[1]) if found else "of unknown version"
            oldest = ".".join(map(str, OLDEST_SERVER))
            raise StoreError(
                f"store {self._connections.url} is Redis {version}; taskguard needs {oldest} or newer: "
                "upgrade the server, or use another store"
            )

    def close(self) -> None:
        self._connections.close()


def _tickets(holds: Sequence[Hold]) -> list[bytes]:
    return [part for hold in holds for part in (encoded(hold.id), encoded(hold.holder))]


def _line(attempt: Attempt | None) -> bytes:
    return b"" if attempt is None else encoded(attempt.to_json())
