"""The record: what a store keeps about one message, in whatever state it rests.

An outbox row, a delayed task, a waiting retry, a run in custody, a kept result and a dead letter are this one shape and
differ only in `State`. A *primary* record belongs to an execution key and carries its custody; a *copy* holds one
message that waits beside it (a delayed duplicate, a reused key, an undecodable body).
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self

HISTORY_LIMIT = 20
_VOLATILE = re.compile(r"0x[0-9a-f]+|[0-9a-f]{8}-[0-9a-f-]{27}|\d+|'[^']*'|\"[^\"]*\"", re.IGNORECASE)
TRACEBACK_TAIL = 4000


class State(StrEnum):
    """Where a message is. PENDING waits for its moment; PUBLISHED was handed to the broker and not claimed yet."""

    PENDING = "pending"
    PUBLISHED = "published"
    RUNNING = "running"
    DONE = "done"
    DEAD = "dead"
    DISCARDED = "discarded"


class Reason(StrEnum):
    """Why a message became a dead letter."""

    MAX_RETRIES = "max_retries"
    PERMANENT_ERROR = "permanent_error"
    POISON = "poison"
    EXPIRED = "expired"
    KEY_REUSED = "key_reused"
    UNKNOWN_TASK = "unknown_task"
    UNDECODABLE = "undecodable"
    REJECTED = "rejected"
    CIRCUIT_OPEN = "circuit_open"
    REFUSED = "refused"
    UNPUBLISHABLE = "unpublishable"


def brief(exc: BaseException) -> str:
    """The exception's text; never raises, whatever its author made of ``__str__``."""
    try:
        return str(exc)
    except Exception as broken:  # noqa: BLE001
        return f"<{type(exc).__name__} whose text raised {type(broken).__name__}>"


def _plain(argument: object) -> str | int | float | bool | None:
    if argument is None or isinstance(argument, (bool, int, float)):
        return argument
    return (argument if isinstance(argument, str) else repr(argument))[:2000]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a message died: the reason, and the exception behind it. ``traceback`` is its tail.

    ``error_module`` and ``arguments`` let another process show the same exception again.
    """

    reason: Reason
    error_type: str = ""
    error_module: str = ""
    arguments: tuple[str | int | float | bool | None, ...] = ()
    message: str = ""
    traceback: str = ""

    @classmethod
    def of(cls, reason: Reason, exc: BaseException | None = None, traceback: str = "") -> Self:
        """Describe *exc*. The message is cut at 2,000 characters, the traceback to its last 4,000."""
        return cls(
            reason=reason,
            error_type=type(exc).__name__ if exc is not None else "",
            error_module=type(exc).__module__ if exc is not None else "",
            arguments=tuple(map(_plain, exc.args[:10])) if exc is not None else (),
            message=brief(exc)[:2000] if exc is not None else "",
            traceback=traceback[-TRACEBACK_TAIL:],
        )

    def group(self, task: str) -> str:
        """A fingerprint equal for the same cause: numbers, ids and quoted values in the message are left out."""
        shape = _VOLATILE.sub("?", self.message)
        text = "\0".join((task, self.reason, self.error_type, shape))
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()

    def to_json(self) -> str:
        """The form in which it rests. Inverse of `from_json`."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises ValueError, TypeError or KeyError for anything else."""
        fields = json.loads(text)
        arguments = tuple(map(_plain, fields.pop("arguments", ())))
        reason = Reason(fields.pop("reason"))
        for name, value in fields.items():
            if not isinstance(value, str):
                raise TypeError(f"{name} is {value!r}")
        return cls(reason=reason, arguments=arguments, **fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One line of a message's history. ``at`` is epoch seconds; ``outcome`` is retry, defer, crash, timeout or dead."""

    at: float
    worker: str
    outcome: str
    error: str = ""

    def to_json(self) -> str:
        """One line of JSON; the shape the Redis scripts write as well."""
        return json.dumps(
            {"at_ms": round(self.at * 1000), "worker": self.worker, "outcome": self.outcome, "error": self.error[:500]},
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Read one line of history."""
        fields: dict[str, Any] = json.loads(line)
        return cls(
            at=fields["at_ms"] / 1000,
            worker=str(fields["worker"]),
            outcome=str(fields["outcome"]),
            error=str(fields.get("error", "")),
        )


def append_history(history: str, attempt: Attempt | None) -> str:
    """*history* with one more line; the oldest lines go when there are more than twenty."""
    if attempt is None:
        return history
    lines = [*history.split("\n"), attempt.to_json()] if history else [attempt.to_json()]
    return "\n".join(lines[-HISTORY_LIMIT:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record as read from a store. Instants are epoch seconds.

    due_at: when a relay must look at it: the moment it is due, or the end of a lease. None: never.
    expires_at: when it may be forgotten. None: never.
    token: the fencing token of the newest claim. It starts at the epoch milliseconds of the claim, so that it grows
        even when a record was forgotten in between.
    lease: the name of the relay lease that a relay must show to remove the message.
    kept: the broker's copy was acknowledged early, so this record is the only one until `finish`.
    """

    id: str
    task: str
    task_id: str
    key: str
    state: State
    primary: bool
    sequence: int = 0
    fingerprint: str = ""
    queue: str = ""
    token: int = 0
    holder: str = ""
    crashes: int = 0
    lease: str = ""
    kept: bool = False
    due_at: float | None = None
    expires_at: float | None = None
    waits_on: str = ""
    wire: bytes | None = None
    result: bytes | None = None
    failure: str = ""
    history: str = ""
    created_at: float = 0.0
    updated_at: float = 0.0

    @property
    def attempts(self) -> list[Attempt]:
        """The history, oldest first."""
        return [Attempt.from_json(line) for line in self.history.split("\n") if line]
