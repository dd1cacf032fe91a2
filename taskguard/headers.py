"""The names of the message headers taskguard reads and writes, and the only place that rewrites them.

taskguard's own state travels as one dictionary under ``headers["taskguard"]``: ``key`` (idempotency key), ``fp``
(fingerprint), ``seq`` (sequence) and ``deadline_ms`` (epoch milliseconds, absent without a deadline). Celery hands
unknown headers on through retries and groups, so the dictionary survives wherever the message goes. Two entries belong
to one delivery alone and go with the next rewriting: ``booked`` (the places it comes back for, by downstream) and
``spared`` (how often its failing cost no attempt). Every function is pure: an envelope goes in, another comes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from taskguard.clock import LATEST, to_ms
from taskguard.envelope import Envelope

KEY = "taskguard"
REMAINING = "X-Request-Deadline-Ms"
"""An HTTP header that the transports of `clients` send on: milliseconds left of the budget when the request left."""
AHEAD = "taskguard_ahead"
"""A property, not a header: this message is put before all others in its queue, where the transport can do that."""
PREPARE = "taskguard_prepare"
"""A property as well: what the result backend must be told before this message is published, see `celery.effects`."""
BOOKED = "booked"
SPARED = "spared"
OF_ONE_DELIVERY = frozenset({"deadline_ms", BOOKED, SPARED})
"""Entries that are not carried over when the dictionary is made anew."""

DELIVERY_HEADERS = frozenset({"redelivered", "x-delivery-count", "x-death"})


class Booking(NamedTuple):
    """A place in a downstream's line: the slot (epoch seconds) and the limit that booked it.

    Slot 0.0 is a place without a slot: the message has waited its turn, and there is nothing to give back.
    """

    at: float = 0.0
    limit: str = ""


def redelivered_headers_dropped(headers: Mapping[str, Any]) -> dict[str, Any]:
    """*headers* without what brokers wrote about an earlier delivery, which would be taken for the next one's."""
    kept = dict(headers)
    for name in DELIVERY_HEADERS:
        kept.pop(name, None)
    return kept


def stamp_of(envelope: Envelope) -> Mapping[str, Any]:
    """taskguard's dictionary in the envelope's headers; empty where there is none."""
    stamp = envelope.headers.get(KEY)
    return stamp if isinstance(stamp, Mapping) else {}


def without_delivery(stamp: Mapping[str, Any]) -> dict[str, Any]:
    """*stamp* without what belongs to one delivery alone."""
    return {name: value for name, value in stamp.items() if name not in OF_ONE_DELIVERY}


def stamped(envelope: Envelope) -> dict[str, Any]:
    """The envelope's headers with taskguard's dictionary made from its fields; entries it does not know stay."""
    own = without_delivery(stamp_of(envelope))
    own |= {"key": envelope.key, "fp": envelope.fingerprint, "seq": envelope.sequence}
    if envelope.deadline_at is not None:
        own["deadline_ms"] = to_ms(envelope.deadline_at)
    return {**envelope.headers, KEY: own}


def next_attempt(envelope: Envelope, *, retries: int) -> Envelope:
    """The message's next delivery: sequence + 1, so that older copies are known as superseded.

    ``eta`` is cleared: the record's ``due_at`` says when, and Celery's own waiting is not used.
    """
    headers = redelivered_headers_dropped(envelope.headers) | {"retries": retries, "eta": None}
    following = envelope.replace(sequence=envelope.sequence + 1, headers=headers)
    return following.replace(headers=stamped(following))


def with_deadline(envelope: Envelope, deadline_at: float | None) -> Envelope:
    """The message with this deadline (epoch seconds) instead of any it had; None: without one.

    Celery's ``expires`` and the broker's ``expiration`` go: one clock alone decides, and no broker drops in silence.
    """
    properties = {name: value for name, value in envelope.properties.items() if name != "expiration"}
    changed = envelope.replace(
        deadline_at=deadline_at, headers={**envelope.headers, "expires": None}, properties=properties
    )
    return changed.replace(headers=stamped(changed))


def with_bookings(envelope: Envelope, booked: Mapping[str, Booking], *, spared: int = 0) -> Envelope:
    """The message as it comes back for what was booked for it, by downstream. *spared*: see `spared`."""
    own = {**stamp_of(envelope), BOOKED: {name: [to_ms(each.at), each.limit] for name, each in booked.items()}}
    if spared:
        own[SPARED] = spared
    return envelope.replace(headers={**envelope.headers, KEY: own})


def bookings(envelope: Envelope) -> dict[str, Booking]:
    """What this delivery comes back for, by downstream. What is no booking is left out.

    Anyone may write a header: a forged booking gets ahead in the line, and past no limit.
    """
    found = stamp_of(envelope).get(BOOKED)
    if not isinstance(found, Mapping):
        return {}
    booked = {}
    for name, each in found.items():
        match each:
            case [int(at), str(limit)] if isinstance(name, str) and 0 <= at <= 1000 * LATEST:
                booked[name] = Booking(at / 1000, limit)
    return booked


def spared(envelope: Envelope) -> int:
    """How often this attempt failed and found its circuit open, which cost it nothing."""
    count = stamp_of(envelope).get(SPARED)
    return count if type(count) is int and 0 <= count < 2**30 else 0
