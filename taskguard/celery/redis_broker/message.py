"""Queue items: what is a message, and what is handed up in the place of what is none."""

from __future__ import annotations

import base64
from typing import Any

from kombu.utils.json import loads

from taskguard.celery.redis_broker.stock import virtual
from taskguard.errors import MessageError

UNDECODABLE = "taskguard.undecodable"
"""The property ``type`` of a message that stands for an item which is none. ``turn.lua`` writes it too."""


class Message(virtual.Message):  # type: ignore[misc]
    """kombu's message, which is made of any payload: one that cannot be unpacked becomes one about its bytes."""

    def __init__(self, payload: dict[str, Any], channel: Any = None, **options: Any) -> None:
        try:
            super().__init__(payload, channel=channel, **options)
        except Exception as exc:  # codecs raise what they like
            if not channel.item_at_hand:
                raise
            tag, queue = payload["properties"]["delivery_tag"], channel.queue_at_hand
            payload = stand_in(channel.item_at_hand, tag, queue, why=f"its body: {type(exc).__name__}: {exc}")
            super().__init__(payload, channel=channel, **options)
        if self.properties.get("type") == UNDECODABLE:
            why = self.properties.pop("flaw", "it was seen before")
            flaw = MessageError(f"an item in queue {self.delivery_info.get('routing_key')!r} is no message: {why}")
            self.errors.append((MessageError, flaw, None))


def payload_of(item: bytes, tag: str, queue: str) -> dict[str, Any]:
    """The message in a queue item, delivered under *tag*; a stand-in where there is none."""
    try:
        payload = loads(item.decode())
        flaw = _flaw(payload)
    except Exception as exc:  # noqa: BLE001 (kombu's JSON rebuilds types, and raises what their constructors raise)
        flaw = f"{type(exc).__name__}: {exc}"
    if flaw:
        return stand_in(item, tag, queue, why=flaw)
    payload["properties"]["delivery_tag"] = tag
    return payload  # type: ignore[no-any-return]


def _flaw(payload: Any) -> str:
    match payload:
        case {"body": str(), "properties": {"delivery_tag": _} as properties}:
            pass
        case _:
            return f"not an object with body, properties and delivery_tag but {type(payload).__name__}"
    for name, value in (
        ("headers", payload.get("headers")),
        ("delivery_info", properties.get("delivery_info")),
    ):
        if not isinstance(value, (dict, type(None))):
            return f"{name} is not an object but {type(value).__name__}"
    for name in ("content-type", "content-encoding"):
        if not isinstance(payload.get(name), (str, type(None))):
            return f"{name} is not text but {type(payload[name]).__name__}"
    return ""


def stand_in(item: bytes, tag: str, queue: str, *, why: str) -> dict[str, Any]:
    """A message whose body is the item's bytes."""
    return {
        "body": base64.b64encode(item).decode(),
        "content-type": "application/octet-stream",
        "content-encoding": "binary",
        "headers": {},
        "properties": {
            "type": UNDECODABLE,
            "flaw": why,
            "body_encoding": "base64",
            "delivery_tag": tag,
            "delivery_info": {"exchange": "", "routing_key": queue},
        },
    }
