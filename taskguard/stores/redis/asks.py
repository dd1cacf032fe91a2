"""What the permit scripts are told. What a declaration says of itself is packed once: policies do not change."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

from taskguard.clock import span_us
from taskguard.limits import breaker, rates
from taskguard.permits import Ask, RateAsk, RateView, Slot
from taskguard.policies.circuit import CircuitBreaker
from taskguard.policies.rates import Rate
from taskguard.stores.redis.layout import encoded

REMEMBERED = 4096
"""Declarations that are kept packed; with one more, all are packed anew."""


def number(value: float) -> bytes:
    """A double to the last digit."""
    return repr(float(value)).encode()


def numbers(values: Sequence[float]) -> bytes:
    """Doubles, as the scripts' ``numbers`` reads them."""
    return b" ".join(map(number, values))


def named(slots: Sequence[Slot]) -> list[bytes]:
    """Name and holder of each."""
    return [part for slot in slots for part in (encoded(slot.name), encoded(slot.holder))]


def bulk(part: bytes) -> bytes:
    """One part of a command as it goes over the wire."""
    return b"$%d\r\n%b\r\n" % (len(part), part)


def terms_of_breaker(policy: CircuitBreaker) -> bytes:
    """The numbers of a breaker."""
    return numbers(breaker.terms_of(policy))


class Bucket(NamedTuple):
    """A limit that is one bucket, in the numbers that decide on a call; ``most`` and ``full`` are `limits.ROUNDED`."""

    policy: Rate
    limit: float
    need: float
    most: float
    full: float
    capacity: float
    interval: float

    def view(self, name: str, held: float) -> RateView:
        """What `limits.room` says of a backlog that is true now."""
        left = (self.capacity - held) / self.interval
        return RateView(name, self.limit, float(max(int(left + 1e-6), 0)), ceil(held) / 1e6)


def bucket_of(rate: RateAsk) -> Bucket | None:
    """None where another algorithm decides, the limit adapts, or the cost can never be admitted."""
    terms = rates.terms_of(rate.policy)
    if terms.kind != "bucket" or rate.adaptive or rate.cost > terms.most:
        return None
    most, full = (max(terms.burst, each) * terms.interval * rates.ROUNDED for each in (rate.cost, terms.most))
    need = rate.cost * terms.interval
    return Bucket(rate.policy, terms.limit, need, most, full, terms.burst * terms.interval, terms.interval)


class Shape(NamedTuple):
    """What all asks of a kind have in common. ``policies``: kept, so that nothing else has their ids. ``alone``: where
    one bucket is the only rate. ``size``: how many ``arguments`` are packed here."""

    policies: tuple[object, ...]
    only_buckets: bool
    alone: Bucket | None
    size: int
    arguments: bytes


class Shapes:
    """The arguments of ``admit.lua`` from the flags to the rates; those before and behind are the call's own."""

    def __init__(self) -> None:
        self._known: dict[object, Shape] = {}

    def of(self, ask: Ask) -> Shape:
        slot, circuit = ask.slot, ask.circuit
        key = (
            tuple([(rate.name, rate.cost, id(rate.policy), rate.adaptive) for rate in ask.rates]),
            None if slot is None else (slot.name, slot.limit, slot.lease),
            None if circuit is None else (circuit.name, id(circuit.policy)),
            ask.book,
            ask.booked,
        )
        shape = self._known.get(key)
        if shape is None:
            shape = _shape(ask)
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[key] = shape
        return shape


def _shape(ask: Ask) -> Shape:
    slot, circuit = ask.slot, ask.circuit
    alone = bucket_of(ask.rates[0]) if len(ask.rates) == 1 else None
    arguments = [b"%d%d" % (ask.book, ask.booked)]
    arguments += [b""] * 3 if alone is None else map(number, (alone.need, alone.most, alone.full))
    if slot is None:
        arguments += (b"0", b"", b"")
    else:
        arguments += (b"%d" % slot.limit, encoded(slot.name), number(span_us(slot.lease)))
    arguments += (b"", b"") if circuit is None else (encoded(circuit.name), terms_of_breaker(circuit.policy))
    arguments.append(b"%d" % len(ask.rates))
    kinds = set()
    for rate in ask.rates:
        terms = rates.terms_of(rate.policy)
        kinds.add(terms.kind)
        told = numbers((rate.cost, terms.limit, terms.period, terms.burst, terms.most))
        arguments += (encoded(rate.name), b"%b %d %b" % (terms.kind.encode(), rate.adaptive, told))
    policies = (*(rate.policy for rate in ask.rates), None if circuit is None else circuit.policy)
    return Shape(policies, kinds <= {"bucket"}, alone, len(arguments), b"".join(map(bulk, arguments)))
