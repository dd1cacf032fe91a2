"""Permits in Redis: what `admission`, `limits`, `line`, `bulkheads` and `breaker` decide, translated to Lua.

Every operation is one script and one round trip; the instant is the server's unless a clock is given. All keys share
the hash tag of the message store's partition, so that one script may one day claim and admit, and every key has a
TTL no shorter than what it says is of use: a server that evicts by TTL drops what matters least. What is for good (a
circuit forced and a queue paused without an end) has none. A failover that loses the last writes admits those again.

The usual ask, one bucket and nothing else, has a shorter script over the same state, and its command is packed once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Self

from taskguard.clock import Clock, from_us, span_us, to_us
from taskguard.downstream.leases import Loan
from taskguard.errors import ConfigurationError
from taskguard.limits import rates
from taskguard.permits import (
    AdaptiveView,
    Answer,
    Ask,
    CircuitView,
    Outcomes,
    Permit,
    ProbeOutcome,
    RateAsk,
    Refusal,
    Slot,
)
from taskguard.policies import checks
from taskguard.policies.circuit import CircuitBreaker, CircuitState
from taskguard.policies.rates import Rate, TokenBucket
from taskguard.stores.cells import ADAPTED_FOR, CHANGES_KEPT, FORCED
from taskguard.stores.redis.answers import Seen, adaptive_view, answer_of, circuit_view
from taskguard.stores.redis.asks import (
    REMEMBERED,
    Bucket,
    Shape,
    Shapes,
    bucket_of,
    bulk,
    named,
    number,
    numbers,
    terms_of_breaker,
)
from taskguard.stores.redis.connection import Connections, packed
from taskguard.stores.redis.layout import decoded, encoded, partition
from taskguard.stores.redis.scripts import Script, script
from taskguard.stores.redis.subscription import bell
from taskguard.stores.redis.watching import Watch

RATES: Final = ("_permits", "_limits", "_lines")
SLOTS: Final = ("_permits", "_bulkheads")
CIRCUIT: Final = ("_permits", "_breaker")
ADMISSION: Final = ("_usual", "_permits", "_limits", "_lines", "_bulkheads", "_breaker", "_admission")
WITH_WINDOWS: Final = (*ADMISSION[:3], "_windows", *ADMISSION[3:])
ALONE: Final = ("_permits",)


class RedisPermits:
    """A `PermitStore` in one Redis server, which also lends (`leases.Lender`)."""

    def __init__(self, connections: Connections, *, namespace: str, clock: Clock | None = None) -> None:
        self.connections = connections
        self.partition = partition(namespace)
        self.clock = clock
        self._shapes, self._seen = Shapes(), Seen()
        self._buckets: dict[tuple[str, float, bool], tuple[Rate, Bucket | None, bytes]] = {}
        self._take = script("take_permit")
        self._admit, self._admit_any = self._admitting(ADMISSION), self._admitting(WITH_WINDOWS)

    @classmethod
    def from_url(cls, url: str, *, namespace: str, timeout: float = 0.1, clock: Clock | None = None) -> Self:
        """The permits behind *url*. Raises ConfigurationError for a URL that redis-py cannot read."""
        return cls(Connections(url, timeout), namespace=namespace, clock=clock)

    def _now(self) -> bytes:
        return b"" if self.clock is None else b"%.0f" % to_us(self.clock())

    def _run(self, verb: str, prologues: tuple[str, ...], *arguments: bytes) -> Any:
        return self.connections.run(script(verb, *prologues), self.partition, self._now(), *arguments)

    # -- calls ------------------------------------------------------------------------------------------------------

    def admit(self, ask: Ask) -> Answer:
        rates = ask.rates
        if len(rates) == 1 and ask.circuit is None and ask.slot is None and not (ask.release or ask.book):
            answer = self._take_permit(rates[0])
            if answer is not None:
                return answer
        shape, size, arguments = self.packed(ask)
        chosen, head = self._admit if shape.only_buckets else self._admit_any
        reply = self.connections.run_packed(chosen, b"*%d\r\n%b%b" % (4 + size, head, arguments))
        return self.read(ask, shape, reply)

    def packed(self, ask: Ask) -> tuple[Shape, int, bytes]:
        """The arguments of ``admit.lua``: of what shape, how many, and as they go over the wire."""
        shape = self._shapes.of(ask)
        slot, circuit, release = ask.slot, ask.circuit, ask.release
        now = self._now()
        place = b"" if slot is None else encoded(slot.holder)
        probe = b"" if circuit is None else encoded(circuit.holder)
        own = b"$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(now), now, len(place), place, len(probe), probe)
        back = b"".join(map(bulk, named(release))) if release else b""
        return shape, 3 + shape.size + 2 * len(release), b"%b%b%b" % (own, shape.arguments, back)

    def read(self, ask: Ask, shape: Shape, reply: Sequence[Any]) -> Answer:
        """What ``admit.lua`` answered."""
        if reply[0] != 2:
            return answer_of(ask, reply)
        assert shape.alone is not None
        view = None if ask.circuit is None else self._seen.of(ask.circuit.name, reply)
        return Permit((shape.alone.view(ask.rates[0].name, float(reply[1])),), view, False, int(reply[2]))

    def _admitting(self, prologues: tuple[str, ...]) -> tuple[Script, bytes]:
        chosen = script("admit", *prologues)
        return chosen, b"".join(map(bulk, (b"EVALSHA", chosen.sha, b"1", self.partition)))

    def _take_permit(self, rate: RateAsk) -> Answer | None:
        """The answer of the short script; None where it does not know."""
        known = self._buckets.get((rate.name, rate.cost, rate.adaptive))
        if known is None or (known[0] is not rate.policy and known[0] != rate.policy):
            known = self._remember(rate)
        _, bucket, command = known
        if bucket is None:
            return None
        reply = self.connections.run_packed(
            self._take, command if self.clock is None else self._take_command(rate, bucket)
        )
        if type(reply) is bytes:
            held, _, version = reply.partition(b" ")
            return Permit((bucket.view(rate.name, float(held)),), None, False, int(version or 0))
        if reply is None:
            return None
        wait, held, version = reply
        return Refusal("rate", rate.name, wait / 1e6, None, (bucket.view(rate.name, float(held)),), None, int(version))

    def _remember(self, rate: RateAsk) -> tuple[Rate, Bucket | None, bytes]:
        bucket = bucket_of(rate)
        known = (rate.policy, bucket, b"" if bucket is None else self._take_command(rate, bucket))
        if len(self._buckets) >= REMEMBERED:
            self._buckets.clear()
        self._buckets[rate.name, rate.cost, rate.adaptive] = known
        return known

    def _take_command(self, rate: RateAsk, bucket: Bucket) -> bytes:
        name = encoded(rate.name)
        keys = (b"%b:permit:%b:%b" % (self.partition, kind, name) for kind in (b"bucket", b"line"))
        told = map(number, (bucket.need, bucket.most, bucket.full))
        return packed(b"EVALSHA", self._take.sha, b"3", *keys, self.partition + b":rules:version", self._now(), *told)

    def lend(self, name: str, policy: TokenBucket, *, most: int) -> Loan:
        """As `leases.Lender` says."""
        terms = rates.terms_of(policy)
        told = numbers((terms.limit, terms.period, terms.burst, terms.most))
        permits, wait = self._run("lend", RATES, encoded(name), b"%d" % most, told)
        return Loan(permits, wait / 1e6)

    def release(self, slots: Sequence[Slot]) -> None:
        if slots:
            self._run("release", SLOTS, *named(slots))

    def renew_slots(self, slots: Sequence[Slot], *, lease: float) -> list[bool]:
        if not slots:
            return []
        return [bool(held) for held in self._run("renew_slots", SLOTS, number(span_us(lease)), *named(slots))]

    def unbook(self, name: str, slot_at: float) -> None:
        self._run("unbook", RATES, encoded(name), number(to_us(slot_at)))

    # -- circuits ---------------------------------------------------------------------------------------------------

    def report(
        self, name: str, policy: CircuitBreaker, outcomes: Outcomes, probe: ProbeOutcome | None = None
    ) -> CircuitView:
        counts = (outcomes.generation, outcomes.calls, outcomes.failures, outcomes.slow)
        told = (b"", b"") if probe is None else (encoded(probe.holder), probe.outcome.encode())
        arguments = (*(b"%d" % count for count in counts), *told, terms_of_breaker(policy))
        return circuit_view(name, *self._run("report", (*CIRCUIT, "_reports"), encoded(name), *arguments))

    def circuit(self, name: str) -> CircuitView:
        return circuit_view(name, *self._run("circuit", CIRCUIT, encoded(name)))

    def circuits(self) -> list[CircuitView]:
        reply = iter(self._run("circuits", CIRCUIT))
        views = [circuit_view(decoded(name), *parts) for name, *parts in zip(reply, reply, reply, reply, strict=True)]
        return sorted(views, key=lambda view: view.name)

    def watch_circuits(self, changed: Callable[[CircuitView], None], *, stop: Callable[[], bool]) -> None:
        Watch(self.connections, self.partition + b":permit:changes", self, changed, stop=stop).run()

    def force(self, name: str, state: CircuitState, *, until: float | None, who: str, why: str) -> CircuitView:
        if state not in FORCED:
            raise ConfigurationError(f"circuit {name}: {state!r} is no state to force; use one of {', '.join(FORCED)}")
        end = 0.0 if until is None or state == "closed" else to_us(until)
        told = (encoded(name), state.encode(), number(end), encoded(who), encoded(why))
        return circuit_view(name, *self._run("force", CIRCUIT, *told))

    # -- adaptive limits and paused queues --------------------------------------------------------------------------

    def adapt(self, name: str, limit: float, *, why: str) -> AdaptiveView:
        if not checks.number(f"limit {name}", limit, least=0.0):
            raise ConfigurationError(f"limit {name}: 0 admits nothing; force the circuit open to stop calls")
        told = (encoded(name), number(limit), encoded(why), b"%d" % CHANGES_KEPT, number(ADAPTED_FOR))
        return adaptive_view(name, self._run("adapt", ALONE, *told))

    def adaptive(self, name: str) -> AdaptiveView | None:
        reply = self._run("adaptive", ALONE, encoded(name))
        return None if reply is None else adaptive_view(name, reply)

    def pause(self, queue: str, *, until: float | None, who: str, why: str) -> None:
        end = b"inf" if until is None else number(to_us(until))
        self._run("pause", ALONE, encoded(queue), end, json.dumps([who, why]).encode())

    def resume(self, queue: str) -> bool:
        return bool(self._run("resume", ALONE, encoded(queue)))

    def paused(self) -> Mapping[str, tuple[float | None, str, str]]:
        reply = iter(self._run("paused", ALONE))
        found = {}
        for queue, end, words in zip(reply, reply, reply, strict=True):
            who, why = json.loads(words)
            found[decoded(queue)] = (None if end == b"inf" else from_us(float(end)), who, why)
        return dict(sorted(found.items()))

    def watch_paused(self, told: Callable[[bool], None], *, stop: Callable[[], bool]) -> None:
        bell(self.connections, self.partition + b":permit:pauses", told, stop=stop).run()

    def now(self) -> float:
        if self.clock is not None:
            return from_us(to_us(self.clock()))
        seconds, microseconds = self.connections.call(b"TIME")
        return int(seconds) + int(microseconds) / 1e6

    def close(self) -> None:
        """Close the connections that are not in use."""
        self.connections.close()
