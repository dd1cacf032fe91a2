"""Dead letters as JSON Lines: one letter a line, its message, failure and history whole, for backup, `jq` or a move.

Reading one in is idempotent: a letter that the store knows, dead or already requeued, is left as it is. A purged
letter comes back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from taskguard.clock import iso
from taskguard.envelope import Envelope
from taskguard.errors import MessageError
from taskguard.letter import UNREADABLE, DeadLetter
from taskguard.ports import MessageStore
from taskguard.record import HISTORY_LIMIT, Attempt, Failure, State

FORMAT = 1


def to_line(letter: DeadLetter) -> str:
    """One letter as one line of JSON, without the newline. ``id`` and ``dead_at`` are for readers alone."""
    record = letter.record
    wire = (record.wire or b"").decode("utf-8", "backslashreplace")
    line = {
        "v": FORMAT,
        "id": record.id,
        "dead_at": iso(letter.dead_at),
        "wire": wire if letter.envelope is None else json.loads(wire),
        "failure": json.loads(letter.failure.to_json()),
        "history": [json.loads(attempt.to_json()) for attempt in letter.attempts],
    }
    return json.dumps(line, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Letter:
    """What one line holds."""

    envelope: Envelope
    failure: Failure
    history: str


def from_line(line: str) -> Letter:
    """Read what `to_line` wrote. Raises MessageError saying what is wrong with it."""
    try:
        outer = json.loads(line)
        if outer["v"] != FORMAT:
            raise MessageError(f"format {outer['v']!r} is not {FORMAT}; upgrade taskguard to read it")
        failure = Failure.from_json(json.dumps(outer["failure"]))
        history = [Attempt.from_json(json.dumps(attempt)).to_json() for attempt in outer["history"]]
        envelope = Envelope.from_wire(json.dumps(outer["wire"]))
    except MessageError:
        raise
    except UNREADABLE as exc:
        raise MessageError(f"not a line of `taskguard dlq export` ({type(exc).__name__}: {exc})") from exc
    return Letter(envelope, failure, "\n".join(history[-HISTORY_LIMIT:]))


def load(store: MessageStore, lines: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Import letters, lazily: the id of each and whether it is new to the store. Blank lines are passed over.

    Raises MessageError with the line's number; the lines before it are imported.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            letter = from_line(line)
        except MessageError as exc:
            raise MessageError(
                f"line {number}: {exc}; the lines before it are imported, and importing them again changes nothing"
            ) from exc
        known = _known(store, letter.envelope)
        if known:
            yield known, False
        else:
            yield store.bury_message(letter.envelope, failure=letter.failure, history=letter.history), True


def _known(store: MessageStore, envelope: Envelope) -> str:
    for id in (envelope.copy_id, envelope.id):
        record = store.find(id)
        if record is not None and record.task_id == envelope.task_id and record.state is not State.DISCARDED:
            return id
    return ""
