"""The envelope: one immutable message, and the wire form in which it rests.

The body is kept as the bytes the producer sent, never decoded and encoded again, so that whatever a task could read
the first time it can read after a rescue, a retry or a requeue. ``to_wire`` is what stores keep and the relay
publishes; it is JSON, because an operator must be able to read a dead letter with nothing but a database client.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from operator import attrgetter
from types import NoneType
from typing import Any, Self

from taskguard.clock import LATEST
from taskguard.errors import MessageError

WIRE_VERSION = 1
READY_VERSION = 2
"""A message in whose wire form the queue item lies that kombu's Redis transport would make of it: see `to_ready`."""

BRIEF_VERSION = 3
"""A message whose wire form leaves out what nearly all of Celery's say alike: `_UNSET`, and its correlation id."""

_WIRE_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("task", "task_id", "key", "content_type", "content_encoding", "exchange", "routing_key"), (str,)),
    **dict.fromkeys(("queue", "fingerprint"), (str,)),
    **dict.fromkeys(("headers", "properties"), (dict,)),
    "sequence": (int,),
    "deadline_at": (int, float, NoneType),
}


_encode = json.JSONEncoder(separators=(",", ":"), default=str).encode
_UNSET = dict.fromkeys(("shadow", "eta", "expires", "group", "group_index", "parent_id", "stamped_headers"))
"""Headers that Celery always sends, nearly always as null."""
_CORRELATION = "correlation_id"
_READY, _ITEM, _DEADLINE = b'{"v":%d,' % READY_VERSION, b',"message":', b',"deadline_at":'
_WIRE_MOST = {"sequence": 2**31 - 1, "deadline_at": LATEST}
"""What stores can hold and clocks can show: integers of 32 bits, and the year 9999."""


def record_id(*parts: str) -> str:
    """A short, fixed-length name for a record: BLAKE2b over the parts, 80 bits, hexadecimal."""
    apart = "\0".join(parts)
    if "\\" in apart or apart.count("\0") >= len(parts):
        apart = "\0".join(part.replace("\\", "\\\\").replace("\0", "\\0") for part in parts)
    return hashlib.blake2b(apart.encode("utf-8", "surrogatepass"), digest_size=10).hexdigest()


_lasting_id = lru_cache(maxsize=64)(record_id)
"""The same, for names that are asked for again and again while one message is handled."""

_SAYABLE = (
    *("task", "task_id", "key", "fingerprint", "sequence"),
    *("content_type", "content_encoding", "exchange", "routing_key", "deadline_at"),
)
_sayable_of = attrgetter(*_SAYABLE)


def _said(headers: Mapping[str, Any], queue: str) -> dict[str, Any]:
    """What the fields of `_SAYABLE` are where a message at rest does not name them."""
    stamp = headers.get("taskguard")
    stamp = stamp if isinstance(stamp, dict) else {}  # another mapping would be read back as text
    return {
        "task": headers.get("task"),
        "task_id": headers.get("id"),
        "key": stamp.get("key"),
        "fingerprint": stamp.get("fp"),
        "sequence": stamp.get("seq"),
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "exchange": "",
        "routing_key": queue,
        "deadline_at": None,
    }


@lru_cache(maxsize=1000, typed=True)
def _ready_head(queue: str, priority: int) -> bytes:
    """The beginning of a wire form of `Envelope.to_ready`, the same for all messages that go the same way."""
    return _encode({"v": READY_VERSION, "queue": queue, "priority": priority})[:-1].encode() + _ITEM


def ready_item(wire: bytes) -> tuple[bytes, bytes] | None:
    """The target (JSON: queue and priority) and the queue item in a wire form of `Envelope.to_ready`; None in others.

    Nothing is parsed: the target is the same bytes for all messages that go the same way.
    """
    if not wire.startswith(_READY):
        return None
    begin = wire.find(_ITEM)
    return wire[:begin] + b"}", wire[begin + len(_ITEM) : wire.rfind(_DEADLINE)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """One message. ``key`` and ``task`` together are the execution key that custody and dedup hang on.

    ``sequence`` orders the deliveries of one message: it grows by one whenever taskguard writes the message anew
    (retry, defer, edit), so that an older copy still in a queue is known as superseded. ``deadline_at`` is epoch
    seconds. ``headers`` are the Celery message headers and ``properties`` the AMQP ones, both plain JSON.
    """

    task: str
    task_id: str
    key: str
    body: bytes
    content_type: str = "application/json"
    content_encoding: str = "utf-8"
    headers: Mapping[str, Any] = field(default_factory=dict)
    properties: Mapping[str, Any] = field(default_factory=dict)
    exchange: str = ""
    routing_key: str = ""
    queue: str = ""
    fingerprint: str = ""
    sequence: int = 0
    deadline_at: float | None = None

    def __reduce__(self) -> tuple[Callable[..., Envelope], tuple[Any, ...]]:
        # Every message is pickled on its way to a pool's child; what dataclasses do for slots takes twice as long.
        return _restored, _fields_of(self)

    @property
    def id(self) -> str:
        """The record of this execution key: where custody is taken and the result is kept."""
        return _lasting_id(self.task, self.key)

    @property
    def copy_id(self) -> str:
        """The record of this one message at rest, apart from whatever else happens to its key.

        Without a key it is a message that nobody could read, whose task id may be made up: its bytes tell it apart.
        """
        parts = (self.task, self.key, self.task_id)
        return _lasting_id(*parts) if self.key else record_id(*parts, self.body.hex())

    @property
    def retries(self) -> int:
        """How often the task was retried before this message, as Celery counts."""
        value = self.headers.get("retries", 0)
        return value if isinstance(value, int) else 0

    def replace(self, **changes: Any) -> Self:
        """The same message with these fields changed."""
        return replace(self, **changes)

    def to_wire(self) -> bytes:
        """The form in which the message rests, without what its headers say already. Inverse of `from_wire`."""
        said = _said(self.headers, self.queue)
        wire: dict[str, Any] = {"v": WIRE_VERSION, "queue": self.queue}
        for name, value in zip(_SAYABLE, _sayable_of(self), strict=True):
            known = said[name]
            if value != known or type(value) is not type(known):  # True is no 1
                wire[name] = value
        headers, properties = dict(self.headers), dict(self.properties)
        if properties.get(_CORRELATION) == self.task_id and headers.keys() >= _UNSET.keys():
            wire["v"] = BRIEF_VERSION
            headers = {name: value for name, value in headers.items() if value is not None or name not in _UNSET}
            del properties[_CORRELATION]
        wire["headers"], wire["properties"] = headers, properties
        try:
            wire["body"] = self.body.decode("utf-8")
        except UnicodeDecodeError:
            wire["body64"] = base64.b64encode(self.body).decode("ascii")
        return _encode(wire).encode()

    def to_item(self, tag: str) -> bytes:
        """The queue item that kombu's virtual transports make of this message, sent to its queue directly."""
        info = {"exchange": self.exchange, "routing_key": self.routing_key}
        own = {"delivery_info": info, "priority": 0, "body_encoding": "base64", "delivery_tag": tag}
        return _encode(
            {
                "body": base64.b64encode(self.body).decode("ascii"),
                "content-encoding": self.content_encoding,
                "content-type": self.content_type,
                "headers": self.headers,
                "properties": {**own, **self.properties},
            }
        ).encode()

    def to_ready(self, tag: str) -> bytes:
        """The wire form with a queue item inside, which a relay need only cut out: `ready_item`.

        Falls back to `to_wire` for what an item does not say.
        """
        stamp = self.headers.get("taskguard") or {}
        said = (self.headers.get("task"), self.headers.get("id"), stamp.get("key", self.task_id), stamp.get("fp", ""))
        if said != (self.task, self.task_id, self.key, self.fingerprint) or stamp.get("seq", 0) != self.sequence:
            return self.to_wire()
        head = _ready_head(self.queue, self.properties.get("priority") or 0)
        deadline = b"null" if self.deadline_at is None else _encode(self.deadline_at).encode()
        return b"%b%b%b%b}" % (head, self.to_item(tag), _DEADLINE, deadline)

    @classmethod
    def _from_ready(cls, fields: dict[str, Any]) -> Self:
        item = fields["message"]
        headers, properties = item["headers"], dict(item["properties"])
        stamp = headers.get("taskguard") or {}
        info = properties.pop("delivery_info")
        properties.pop("body_encoding")
        properties.pop("delivery_tag")
        if not properties.get("priority"):
            properties.pop("priority", None)
        return cls(
            task=headers["task"],
            task_id=headers["id"],
            key=stamp.get("key", headers["id"]),
            body=base64.b64decode(item["body"], validate=True),
            content_type=item["content-type"],
            content_encoding=item["content-encoding"],
            headers=headers,
            properties=properties,
            exchange=info["exchange"],
            routing_key=info["routing_key"],
            queue=fields["queue"],
            fingerprint=stamp.get("fp", ""),
            sequence=stamp.get("seq", 0),
            deadline_at=fields["deadline_at"],
        )

    @classmethod
    def from_wire(cls, wire: bytes | str) -> Self:
        """Read a message at rest. Raises MessageError for anything `to_wire` and `to_ready` did not write."""
        try:
            fields = json.loads(wire)
            version = fields.pop("v")
            if version == READY_VERSION:
                return cls._from_ready(fields)
            if version not in (WIRE_VERSION, BRIEF_VERSION):
                raise MessageError(f"wire version {version!r} is not {BRIEF_VERSION}; upgrade taskguard to read it")
            body64 = fields.pop("body64", None)
            body = base64.b64decode(body64, validate=True) if body64 is not None else fields.pop("body").encode("utf-8")
            if version == BRIEF_VERSION:
                fields["headers"] = _UNSET | fields["headers"]
            fields = _said(fields["headers"], fields["queue"]) | fields
            if version == BRIEF_VERSION:
                fields["properties"] = {_CORRELATION: fields["task_id"]} | fields["properties"]
            for name, types in _WIRE_TYPES.items():
                if not isinstance(fields[name], types) or isinstance(fields[name], bool):
                    raise TypeError(f"{name} is {fields[name]!r}")
            for name, most in _WIRE_MOST.items():
                if fields[name] is not None and not abs(fields[name]) <= most:  # NaN is not
                    raise ValueError(f"{name} is out of range")
            return cls(body=body, **fields)
        except MessageError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
            head = wire[:80]
            raise MessageError(f"not a taskguard message ({type(exc).__name__}: {exc}): {head!r}") from exc


_NAMES = tuple(Envelope.__dataclass_fields__)
_fields_of = attrgetter(*_NAMES)
_put = tuple(Envelope.__dict__[name].__set__ for name in _NAMES)


def _restored(*values: Any) -> Envelope:
    envelope = object.__new__(Envelope)
    for put, value in zip(_put, values, strict=True):
        put(envelope, value)
    return envelope
