"""The confirming channel when it is closed at the worst moment: nothing counts as published that was not confirmed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from taskguard.celery.confirming import ConfirmingChannel
from taskguard.celery.dispatching import WRITTEN_AT_ONCE, RabbitMQ
from taskguard.envelope import Envelope
from taskguard.handover import Held, Outgoing


class Channel:
    """As much of py-amqp's channel as is used."""

    def __init__(self, connection: Connection, number: int) -> None:
        self.connection: Connection | None = connection
        self.channel_id = number
        self.is_open = True
        self.events: dict[str, set[Callable[..., None]]] = {"basic_ack": set(), "basic_nack": set()}

    def confirm_select(self) -> None: ...

    def prepare_message(self, *args: object) -> Any:
        class Message:
            def _serialize_properties(self) -> bytes:
                return b""

        return Message()

    def shut(self) -> None:
        self.is_open, self.connection = False, None


class Connection:
    """Opens channels until it is ``away``; asked for events, it confirms all, or does as ``drain`` says."""

    connection_errors = (OSError,)
    channel_errors = (KeyError,)
    frame_max = 4096

    def __init__(self) -> None:
        self.channels: list[Channel] = []
        self.written: list[bytes] = []
        self.away = False
        self.drain: Callable[[], None] = self.confirm
        self.transport = self

    def channel(self) -> Channel:
        if self.away:
            raise OSError("refused")
        self.channels.append(Channel(self, len(self.channels) + 1))
        return self.channels[-1]

    def having_timeout(self, seconds: float) -> nullcontext[None]:
        return nullcontext()

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def drain_events(self, timeout: float) -> None:
        self.drain()

    def confirm(self) -> None:
        for acked in self.channels[-1].events["basic_ack"]:
            acked(1_000, True)

    def shut(self) -> None:
        self.channels[-1].shut()


def rows(count: int) -> list[Outgoing]:
    """Messages for one queue."""
    made = [Envelope(task="charge", task_id=str(n), key="", body=b"{}", queue="q") for n in range(count)]
    return [Outgoing(each.task_id, each.to_wire()) for each in made]


@pytest.mark.parametrize("away", [True, False], ids=["cannot be opened again", "could be opened again"])
def test_a_channel_closed_while_frames_are_made_publishes_none_of_them(away: bool) -> None:
    """They are held, and none is written: they carry the number of a channel that is no more."""
    connection = Connection()
    asked: list[str] = []

    def declare(name: str) -> None:
        asked.append(name)
        if len(asked) == 2:
            connection.shut()
            connection.away = away

    way = RabbitMQ(connection, declare, lambda envelope: None, timeout=1)
    outcomes = way.dispatch(rows(3))
    assert [type(outcome) for outcome in outcomes] == [Held] * 3
    assert connection.written == []
    connection.away = False
    assert way.dispatch(rows(3)) == [None] * 3
    assert len(connection.channels) == 2


@pytest.mark.parametrize("away", [True, False], ids=["cannot be opened again", "could be opened again"])
def test_a_channel_closed_before_frames_are_sent_confirms_none_of_them(away: bool) -> None:
    """Whatever was sent before on it."""
    connection = Connection()
    channel = ConfirmingChannel(connection, timeout=1)
    channel.open()
    channel.begin()
    channel.write({7: b"x"})
    assert channel.wait() == []
    channel.begin()
    connection.shut()
    connection.away = away
    with pytest.raises(OSError, match="was closed while its frames were made"):
        channel.write({0: b"x", 1: b"y"})
    assert channel.unconfirmed == {0, 1}
    assert connection.written == [b"x"]


def test_a_broker_that_shuts_down_in_good_order_is_away() -> None:
    """Its channels know their connection no more when the error comes; the error is the driver's all the same."""
    connection = Connection()

    def forced() -> None:
        connection.shut()
        raise OSError("CONNECTION_FORCED")

    connection.drain = forced
    outcomes = RabbitMQ(connection, lambda name: None, lambda envelope: None, timeout=1).dispatch(rows(2))
    assert [str(outcome.away) for outcome in outcomes if isinstance(outcome, Held)] == ["CONNECTION_FORCED"] * 2


def test_a_channel_that_the_broker_closes_leaves_what_it_had_not_confirmed() -> None:
    """To be sent again one by one, on another."""
    connection = Connection()

    def closed() -> None:
        connection.shut()
        raise KeyError("NOT_FOUND")

    connection.drain = closed
    alone: list[str] = []
    way = RabbitMQ(connection, lambda name: None, lambda envelope: alone.append(envelope.task_id), timeout=1)
    assert way.dispatch(rows(2)) == [None] * 2
    assert alone == ["0", "1"]


def test_a_batch_goes_out_in_parts_while_it_is_made() -> None:
    """And is confirmed as a whole; where the connection breaks between two parts, none of it is."""
    connection = Connection()
    many = rows(2 * WRITTEN_AT_ONCE + 1)
    way = RabbitMQ(connection, lambda name: None, lambda envelope: None, timeout=1)
    assert way.dispatch(many) == [None] * len(many)
    assert len(connection.written) == 3

    asked: list[str] = []

    def declare(name: str) -> None:
        asked.append(name)
        if len(asked) == WRITTEN_AT_ONCE + 2:
            connection.shut()

    connection.written.clear()
    outcomes = RabbitMQ(connection, declare, lambda envelope: None, timeout=1).dispatch(many)
    assert [type(outcome) for outcome in outcomes] == [Held] * len(many)
    assert len(connection.written) == 1
