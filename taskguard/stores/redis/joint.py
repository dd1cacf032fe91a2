"""Custody and permits in one step, where both rest on one server: ``claim_and_admit.lua`` is their scripts in a row."""

from __future__ import annotations

from taskguard.clock import to_ms
from taskguard.custody import Entered, Resting
from taskguard.envelope import Envelope
from taskguard.permits import Ask
from taskguard.stores.redis.asks import bulk
from taskguard.stores.redis.claims import claim_arguments, claim_of
from taskguard.stores.redis.connection import Connections
from taskguard.stores.redis.layout import encoded, envelope_arguments, ms
from taskguard.stores.redis.permits import ADMISSION, WITH_WINDOWS, RedisPermits
from taskguard.stores.redis.scripts import Script, joint_script

VERB = "claim_and_admit"


class RedisJoint:
    """A `JointStore` in one Redis server."""

    def __init__(self, connections: Connections, permits: RedisPermits) -> None:
        self._connections, self._permits = connections, permits
        self._any, self._buckets = self._claiming(WITH_WINDOWS), self._claiming(ADMISSION)

    def _claiming(self, prologues: tuple[str, ...]) -> tuple[Script, bytes]:
        chosen = joint_script(VERB, ("_record", "claim"), (*prologues, "admit"), ("_record", "rest"))
        return chosen, b"".join(map(bulk, (b"EVALSHA", chosen.sha, b"1", self._permits.partition)))

    def claim(
        self, envelope: Envelope, *, holder: str, lease: float, max_crashes: int, ask: Ask, resting: Resting | None
    ) -> Entered:
        clock = self._permits.clock
        now = b"" if clock is None else ms(clock())
        claiming = claim_arguments(envelope, holder, lease, max_crashes)
        rest = () if resting is None else _rest_arguments(envelope, resting)
        own = (now, b"%d" % len(claiming), *claiming, b"%d" % len(rest), *rest)
        shape, size, asking = self._permits.packed(ask)
        chosen, head = self._buckets if shape.only_buckets else self._any
        command = b"*%d\r\n%b%b%b" % (4 + len(own) + size, head, b"".join(map(bulk, own)), asking)
        claimed, *more = self._connections.run_packed(chosen, command)
        if not more:
            return Entered(claim_of(claimed))
        answer, due = more
        return Entered(claim_of(claimed), self._permits.read(ask, shape, answer), due / 1000 if due else None)


def _rest_arguments(envelope: Envelope, resting: Resting) -> tuple[bytes, ...]:
    deadline = b"" if envelope.deadline_at is None else b"%d" % to_ms(envelope.deadline_at)
    return (deadline, encoded(resting.attempt.to_json()), *envelope_arguments(resting.following))
