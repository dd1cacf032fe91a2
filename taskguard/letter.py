"""One dead letter as an operator sees it, and which letters are meant.

A letter may hold anything, because undecodable messages end here too. Nothing in it is ever unpickled or executed:
arguments are decoded from JSON bodies alone, and other bodies are known by the reprs their producer put in the headers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Self

from taskguard.clock import iso
from taskguard.envelope import Envelope
from taskguard.errors import MessageError
from taskguard.record import Attempt, Failure, Reason, Record

JSON_TYPE = "application/json"
_EMBED: dict[str, Any] = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a JSON body holds: ``embed`` is Celery's canvas, callbacks and chord, which an edit leaves alone."""

    args: list[Any]
    kwargs: dict[str, Any]
    embed: Any = field(default_factory=_EMBED.copy)

    @classmethod
    def of(cls, envelope: Envelope) -> Self | None:
        """The decoded body; None where it is not plain JSON of Celery's shape."""
        if envelope.content_type != JSON_TYPE:
            return None
        try:
            args, kwargs, embed = json.loads(envelope.body)
        except UNREADABLE:
            return None
        return cls(args, kwargs, embed) if isinstance(args, list) and isinstance(kwargs, dict) else None

    def to_body(self) -> bytes:
        """The body Celery sends for these arguments."""
        return json.dumps([self.args, self.kwargs, self.embed]).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """One dead letter as an operator sees it. ``envelope`` is None when the record holds no readable message."""

    record: Record
    failure: Failure
    attempts: tuple[Attempt, ...]
    envelope: Envelope | None
    arguments: Arguments | None

    @classmethod
    def of(cls, record: Record) -> Self:
        """Read a record; whatever of it cannot be read is shown as empty, never raised."""
        try:
            failure = Failure.from_json(record.failure)
        except UNREADABLE:
            failure = Failure(reason=Reason.REJECTED, message=f"unreadable failure: {record.failure[:200]}")
        try:
            attempts = tuple(record.attempts)
        except UNREADABLE:
            attempts = ()
        try:
            envelope = Envelope.from_wire(record.wire or b"")
        except MessageError:
            envelope = None
        arguments = Arguments.of(envelope) if envelope is not None else None
        return cls(record=record, failure=failure, attempts=attempts, envelope=envelope, arguments=arguments)

    @property
    def id(self) -> str:
        """The record's id."""
        return self.record.id

    @property
    def dead_at(self) -> float:
        """When it was buried, epoch seconds."""
        return self.record.updated_at

    @property
    def error(self) -> str:
        """The exception on one line: type and message."""
        return ": ".join(part for part in (self.failure.error_type, self.failure.message) if part)

    @property
    def group(self) -> str:
        """The fingerprint of its cause."""
        return self.failure.group(self.record.task)

    @property
    def args(self) -> Any:
        """The positional arguments; the producer's repr of them where the body is not plain JSON."""
        return self.arguments.args if self.arguments else self._header("argsrepr")

    @property
    def kwargs(self) -> Any:
        """The keyword arguments; the producer's repr of them where the body is not plain JSON."""
        return self.arguments.kwargs if self.arguments else self._header("kwargsrepr")

    def _header(self, name: str) -> str:
        return str(self.envelope.headers.get(name) or "") if self.envelope else ""

    @property
    def body(self) -> str:
        """The raw body as text, bytes that are not UTF-8 escaped."""
        return self.envelope.body.decode("utf-8", "backslashreplace") if self.envelope else ""

    def as_dict(self) -> dict[str, Any]:
        """The letter as plain JSON. ``body`` is there when the arguments could not be decoded."""
        shown: dict[str, Any] = {
            "id": self.id,
            "task": self.record.task,
            "task_id": self.record.task_id,
            "key": self.record.key,
            "reason": self.failure.reason.value,
            "error": self.error,
            "attempts": [
                {"at": iso(a.at), "worker": a.worker, "outcome": a.outcome, "error": a.error} for a in self.attempts
            ],
            "queue": self.record.queue,
            "dead_at": iso(self.dead_at),
            "args": self.args,
            "kwargs": self.kwargs,
            "group": self.group,
            "error_type": self.failure.error_type,
            "message": self.failure.message,
            "traceback": self.failure.traceback,
        }
        if self.arguments is None:
            shown |= {"content_type": self.envelope.content_type if self.envelope else "", "body": self.body}
        return shown

    def text(self) -> str:
        """Everything a search may look at: texts as they are, arguments as JSON."""
        record = self.record
        arguments = [
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for value in (self.args, self.kwargs)
        ]
        attempts = [f"{attempt.worker} {attempt.outcome} {attempt.error}" for attempt in self.attempts]
        names = [record.id, record.task, record.task_id, record.key, record.queue, self.failure.reason]
        return "\n".join([*names, self.error, self.failure.traceback, *arguments, *attempts, self.body])


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which letters. Empty fields let everything through; ages are seconds; texts are compared without case."""

    task: str = ""
    reasons: frozenset[Reason] = frozenset()
    error: str = ""
    queue: str = ""
    text: str = ""
    group: str = ""
    older_than: float | None = None
    newer_than: float | None = None

    def matches(self, letter: DeadLetter, *, now: float) -> bool:
        """Whether *letter* is meant. ``task`` is a glob."""
        age = now - letter.dead_at
        return (
            (not self.task or fnmatchcase(letter.record.task, self.task))
            and (not self.reasons or letter.failure.reason in self.reasons)
            and (not self.queue or letter.record.queue == self.queue)
            and (self.older_than is None or age >= self.older_than)
            and (self.newer_than is None or age < self.newer_than)
            and (not self.group or letter.group == self.group)
            and self.error.casefold() in letter.error.casefold()
            and (not self.text or self.text.casefold() in letter.text().casefold())
        )


EVERYTHING = Filter()
