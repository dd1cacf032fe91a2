"""How messages rest in Redis: the names of keys, the order of arguments, the fields of a record.

A partition is the set of keys that one script may touch: a primary record, its copies, what waits for it and the names
it holds, with the indexes over them. They share the hash tag ``{tg:<namespace>:<partition>}``, so that a Cluster keeps
them on one node. A single server is one partition; many would be told apart by `Envelope.id`, task and key, which a
primary and its copies have in common.

Records end by the `expiry` index and `expire`, not by PEXPIRE: a key that vanishes by itself would leave its entries
in the other indexes behind, and would not follow a clock that is given.
"""

from __future__ import annotations

from collections.abc import Sequence

from taskguard.clock import to_ms
from taskguard.envelope import Envelope
from taskguard.record import Record, State


def partition(namespace: str, number: int = 0) -> bytes:
    """The key from which all keys of the partition are made, and their hash tag."""
    return f"{{tg:{namespace}:{number}}}".encode()


def encoded(text: str) -> bytes:
    """Text as it rests. Lone surrogates, which a message that could not be read may hold, survive."""
    return text.encode("utf-8", "surrogatepass")


def decoded(data: bytes) -> str:
    """Inverse of `encoded`."""
    return data.decode("utf-8", "surrogatepass")


def ms(seconds: float) -> bytes:
    """A duration or an instant in milliseconds."""
    return b"%d" % to_ms(seconds)


def envelope_arguments(envelope: Envelope) -> tuple[bytes, ...]:
    """The eight arguments that `envelope()` in ``_record.lua`` reads."""
    return (
        encoded(envelope.task),
        encoded(envelope.key),
        encoded(envelope.task_id),
        encoded(envelope.copy_id),
        encoded(envelope.queue),
        encoded(envelope.fingerprint),
        b"%d" % envelope.sequence,
        envelope.to_wire(),
    )


def to_record(id: str, fields: Sequence[bytes], wire: bytes | None, result: bytes | None) -> Record:
    """The record behind the reply of HGETALL and the two texts beside it."""
    record = dict(zip(fields[::2], fields[1::2], strict=True))

    def text(field: bytes) -> str:
        return decoded(record.get(field, b""))

    def number(field: bytes) -> int:
        return int(record.get(field, 0))

    def instant(field: bytes) -> float | None:
        return int(record[field]) / 1000 if field in record else None

    token = number(b"tok")
    return Record(
        id=id,
        task=text(b"task"),
        task_id=text(b"tid"),
        key=text(b"key") if b"key" in record else text(b"tid"),
        state=State(text(b"st")),
        primary=b"cp" in record or b"copy" in record,
        sequence=number(b"seq"),
        fingerprint=text(b"fp"),
        queue=text(b"q"),
        token=token,
        holder=text(b"who"),
        crashes=number(b"cr"),
        lease=text(b"ls"),
        kept=b"kp" in record,
        due_at=instant(b"due"),
        expires_at=instant(b"exp"),
        waits_on=text(b"on"),
        wire=wire,
        result=result,
        failure=text(b"why"),
        history=text(b"log"),
        created_at=instant(b"new") or token / 1000,
        updated_at=instant(b"at") or token / 1000,
    )
