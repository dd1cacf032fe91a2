"""A RabbitMQ channel in confirm mode that sends many messages in few writes and waits for all their confirms.

py-amqp writes a message at a time and waits for each. The frames are the protocol's (AMQP 0-9-1, 4.2), the encoding of
properties is py-amqp's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import pack
from typing import Any

from taskguard.envelope import Envelope

METHOD, HEADER, BODY, END = 1, 2, 3, b"\xce"
BASIC, PUBLISH = 60, 40
OVERHEAD = 8
"""Bytes of a frame beside its payload."""


class ConfirmingChannel:
    """One channel of kombu's *connection*. *timeout*: seconds without any confirm after which the broker is away."""

    def __init__(self, connection: Any, *, timeout: float) -> None:
        self._timeout = timeout
        self._connection = connection
        self._channel: Any = None
        self._sent = 0
        self._awaited: dict[int, int] = {}
        self._refused: list[int] = []
        self._oldest = 1
        self._methods: dict[tuple[str, str], bytes] = {}

    @property
    def connection_errors(self) -> tuple[type[Exception], ...]:
        """What the driver raises when the connection breaks."""
        return tuple(self._connection.connection_errors)

    def open(self) -> None:
        """Open a channel where there is none, before frames are made: they carry its number, and go out on no other."""
        if self._channel is None or not self._channel.is_open:
            self._channel = None
            channel = self._connection.channel()
            channel.confirm_select()
            channel.events["basic_ack"].add(self._acked)
            channel.events["basic_nack"].add(self._nacked)
            self._sent, self._oldest = 0, 1
            self._methods.clear()
            self._channel = channel

    def _opened(self) -> Any:
        channel = self._channel
        if channel is None or not channel.is_open:
            raise ConnectionResetError("the channel was closed while its frames were made")
        return channel

    def frames(self, envelope: Envelope, properties: Mapping[str, Any]) -> bytes:
        """The frames of one message, to be sent next on this channel.

        Raises what the encoding raises, and ConnectionResetError where the channel is not open any more.
        """
        channel = self._opened()
        priority = properties.get("priority")
        rest = {name: value for name, value in properties.items() if name != "priority"}
        body = envelope.body
        message = channel.prepare_message(
            body, priority, envelope.content_type, envelope.content_encoding, dict(envelope.headers), rest
        )
        encoded = message._serialize_properties()
        target = envelope.exchange, envelope.routing_key
        method = self._methods.get(target) or self._method(target)
        number = channel.channel_id
        most = channel.connection.frame_max - OVERHEAD
        header = pack(">BHIHHQ", HEADER, number, 12 + len(encoded), BASIC, 0, len(body))
        parts = [method, header, encoded, END]
        for begin in range(0, len(body), most):
            piece = body[begin : begin + most]
            parts += [pack(">BHI", BODY, number, len(piece)), piece, END]
        return b"".join(parts)

    def _method(self, target: tuple[str, str]) -> bytes:
        names = b""
        for name in target:
            encoded = name.encode()
            names += pack(">B", len(encoded)) + encoded
        payload = pack(">HHH", BASIC, PUBLISH, 0) + names + b"\0"
        method = pack(">BHI", METHOD, self._opened().channel_id, len(payload)) + payload + END
        self._methods[target] = method
        return method

    def begin(self) -> None:
        """What is written from now on is confirmed by the next `wait`."""
        self._refused.clear()
        self._awaited = {}

    def write(self, frames: Mapping[int, bytes]) -> None:
        """Send these messages; the broker takes them while the next ones are made.

        Raises the driver's error where the connection breaks: how many were taken is then unknown; and
        ConnectionResetError where the channel is not the one of these frames any more: none of them was sent.
        """
        # Whatever is raised from here on, none of them is confirmed.
        self._awaited |= {self._sent + place: number for place, number in enumerate(frames, start=1)}
        if not frames:
            return
        channel = self._opened()
        self._sent += len(frames)
        connection = channel.connection  # a channel that the broker's shutdown has closed knows it no more
        if connection is None:
            raise ConnectionResetError("the channel lost its connection while its frames were made")
        with connection.transport.having_timeout(self._timeout):
            connection.transport.write(b"".join(frames.values()))

    def wait(self) -> list[int]:
        """Wait for the confirms of all that was written. Returns the numbers of those that were not confirmed, because
        the broker refused one of them, and may be sent again. Raises as `write` does."""
        if self._awaited:
            connection = self._opened().connection
            if connection is None:
                raise ConnectionResetError("the channel lost its connection before its messages were confirmed")
            try:
                while self._awaited:
                    connection.drain_events(timeout=self._timeout)
            except connection.channel_errors:
                self._channel = None  # the broker has closed it
        return sorted(self.unconfirmed)

    @property
    def unconfirmed(self) -> set[int]:
        """The numbers written since `begin` that got no confirm, or a refusal."""
        return {*self._refused, *self._awaited.values()}

    def _acked(self, tag: int, multiple: bool) -> None:
        for each in range(self._oldest, tag + 1) if multiple else (tag,):
            self._awaited.pop(each, None)
        if multiple:
            self._oldest = tag + 1

    def _nacked(self, tag: int, multiple: bool) -> None:
        for each in range(self._oldest, tag + 1) if multiple else (tag,):
            number = self._awaited.pop(each, None)
            if number is not None:
                self._refused.append(number)
        if multiple:
            self._oldest = tag + 1
