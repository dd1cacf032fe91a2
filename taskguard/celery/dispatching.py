"""Rows of an outbox on their way to the broker: many in one request, and one confirmation for all.

Redis gets one LPUSH for each queue, of items that were made when the message was sent. RabbitMQ gets the frames of a
whole batch in one write, and its confirms are awaited together. What neither can do so (other exchanges than the
default one, other transports, a chord's first message) is published one by one, as the relay publishes all else.

Order within an ordering key: on Redis the items of a queue are pushed in one command, all or none. On RabbitMQ a
message of a key goes out when the one before it is confirmed; the keys of a batch go side by side.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from taskguard.celery.confirming import ConfirmingChannel
from taskguard.celery.faults import is_servers
from taskguard.celery.redis_broker.stock import redis as stock
from taskguard.envelope import Envelope, ready_item
from taskguard.errors import MessageError
from taskguard.handover import Held, Outgoing
from taskguard.headers import AHEAD, PREPARE

_UNSENT = Held()

WRITTEN_AT_ONCE = 50
"""Messages of one write to RabbitMQ, which takes them while the next ones are made."""

Outcomes = list[Exception | None]
PublishOne = Callable[[Envelope], None]
Declare = Callable[[str], None]


class RedisQueues:
    """Queue items, pushed in one round trip."""

    def __init__(self, channel: Any, declare: Declare, publish: PublishOne) -> None:
        self._channel = channel
        self._declare = declare
        self._publish = publish
        self._keys: dict[bytes, str] = {}

    def dispatch(self, rows: Sequence[Outgoing]) -> Outcomes:
        """See `taskguard.handover.Dispatch`. Raises the driver's error where the connection breaks."""
        outcomes: Outcomes = [None] * len(rows)
        pushes: dict[str, tuple[list[int], list[bytes]]] = {}
        stopped: set[str] = set()
        for number, row in enumerate(rows):
            if row.ordering in stopped:
                outcomes[number] = Held()
                continue
            ready = ready_item(row.wire)
            try:
                if ready is not None:
                    key, item = self._keys.get(ready[0]) or self._key_of(ready[0]), ready[1]
                else:
                    envelope = Envelope.from_wire(row.wire)
                    if (
                        envelope.exchange
                        or PREPARE in envelope.properties
                        or envelope.queue in getattr(self._channel, "_expires", ())
                    ):
                        if row.ordering:
                            self._push(pushes, outcomes)
                        tried = _held_after(rows, outcomes, number) or _tried(self._publish, envelope)
                        outcomes[number] = tried if tried is None else _verdict(tried)
                        if outcomes[number] is not None and row.ordering:
                            stopped.add(row.ordering)
                        continue
                    self._declare(envelope.queue)
                    key, item = self._key(envelope.queue, envelope.properties.get("priority")), envelope.to_item(_tag())
            except self._channel.connection_errors:
                raise
            except Exception as exc:  # noqa: BLE001 (a wire that is none, a queue that cannot be declared)
                outcomes[number] = _verdict(exc)
                if row.ordering:
                    stopped.add(row.ordering)
                continue
            numbers, items = pushes.setdefault(key, ([], []))
            numbers.append(number)
            items.append(item)
        self._push(pushes, outcomes)
        return outcomes

    def _push(self, pushes: dict[str, tuple[list[int], list[bytes]]], outcomes: Outcomes) -> None:
        if not pushes:
            return
        channel = self._channel
        client = getattr(channel, "plain_client", None) or channel.client
        whole = getattr(channel, "key", str)
        with client.pipeline(transaction=False) as pipeline:
            for key, (_, items) in pushes.items():
                pipeline.lpush(whole(key), *items)
            answers = pipeline.execute(raise_on_error=False)
        for answer, (numbers, _) in zip(answers, pushes.values(), strict=True):
            if isinstance(answer, Exception):
                if isinstance(answer, stock.redis.exceptions.ConnectionError):
                    raise answer
                verdict = _verdict(answer)
                for number in numbers:
                    outcomes[number] = verdict
        pushes.clear()

    def _key_of(self, target: bytes) -> str:
        from json import loads

        said = loads(target)
        self._declare(said["queue"])
        if len(self._keys) > 10_000:
            self._keys.clear()
        self._keys[target] = key = self._key(said["queue"], said["priority"])
        return key

    def _key(self, queue: str, priority: Any) -> str:
        channel = self._channel
        known = channel._get_message_priority({"properties": {"priority": priority}}, reverse=False)
        return str(channel._q_for_pri(queue, known))


class RabbitMQ:
    """Frames of a batch in one write, its confirms awaited together."""

    def __init__(self, connection: Any, declare: Declare, publish: PublishOne, *, timeout: float) -> None:
        self._channel = ConfirmingChannel(connection, timeout=timeout)
        self._declare = declare
        self._publish = publish

    def dispatch(self, rows: Sequence[Outgoing]) -> Outcomes:
        """See `taskguard.handover.Dispatch`."""
        outcomes: Outcomes = [_UNSENT] * len(rows)
        try:
            for round in _rounds(rows):
                self._send(rows, round, outcomes)
        except self._channel.connection_errors as exc:
            # What is confirmed stays so. Of the rest the broker may have taken some: they go out again.
            return [Held(exc) if outcome is _UNSENT else outcome for outcome in outcomes]
        return outcomes

    def _send(self, rows: Sequence[Outgoing], round: Sequence[int], outcomes: Outcomes) -> None:
        self._channel.open()
        self._channel.begin()
        frames: dict[int, bytes] = {}
        envelopes: dict[int, Envelope] = {}
        written: set[int] = set()
        left: Iterable[int] = ()
        try:
            for number in round:
                held = _held_after(rows, outcomes, number)
                if held is not None:
                    outcomes[number] = held
                    continue
                try:
                    envelope = envelopes[number] = Envelope.from_wire(rows[number].wire)
                    if PREPARE in envelope.properties:
                        outcomes[number] = _tried(self._publish, envelope)
                        continue
                    if not envelope.exchange:
                        self._declare(envelope.queue)
                    properties = {name: value for name, value in envelope.properties.items() if name != AHEAD}
                    frames[number] = self._channel.frames(envelope, {"delivery_mode": 2, **properties})
                except self._channel.connection_errors:
                    raise
                except Exception as exc:  # noqa: BLE001 (serialisers raise what they like)
                    outcomes[number] = exc
                if len(frames) >= WRITTEN_AT_ONCE:
                    written |= frames.keys()
                    self._channel.write(frames)
                    frames = {}
            written |= frames.keys()
            self._channel.write(frames)
            left = self._channel.wait()
        finally:
            for number in written - self._channel.unconfirmed:
                outcomes[number] = None
        for number in left:  # one of them was refused: each tells alone whether it is the one
            outcomes[number] = _tried(self._publish, envelopes[number])


def one_by_one(rows: Sequence[Outgoing], publish: PublishOne) -> Outcomes:
    """Any other transport."""
    outcomes: Outcomes = []
    for number, row in enumerate(rows):
        held = _held_after(rows, outcomes, number)
        if held is not None:
            outcomes.append(held)
            continue
        try:
            envelope = Envelope.from_wire(row.wire)
        except MessageError as exc:
            outcomes.append(exc)
        else:
            outcomes.append(_tried(publish, envelope))
    return outcomes


def _verdict(exc: Exception) -> Exception:
    """What Redis said: a refusal of the message, or `Held` where the trouble is its own."""
    return Held(exc) if is_servers(exc) else exc


def _tried(publish: PublishOne, envelope: Envelope) -> Exception | None:
    try:
        publish(envelope)
    except Held as exc:
        return exc
    except Exception as exc:  # noqa: BLE001 (transports raise what their drivers raise)
        return exc
    return None


def _held_after(rows: Sequence[Outgoing], outcomes: Outcomes, number: int) -> Held | None:
    """Whether an earlier message of this one's ordering key was not published."""
    ordering = rows[number].ordering
    if ordering:
        for before in range(min(number, len(outcomes))):
            if rows[before].ordering == ordering and outcomes[before] is not None:
                return Held()
    return None


def _rounds(rows: Sequence[Outgoing]) -> Iterator[list[int]]:
    """The rows in rounds: no ordering key twice in one."""
    rounds: list[list[int]] = []
    seen: dict[str, int] = {}
    for number, row in enumerate(rows):
        at = seen.get(row.ordering, 0) if row.ordering else 0
        if row.ordering:
            seen[row.ordering] = at + 1
        if at == len(rounds):
            rounds.append([])
        rounds[at].append(number)
    yield from rounds


def _tag() -> str:
    return str(uuid.uuid4())
