"""The contract once more, as a plain Python object without locks, bytes or pages, to hold the stores against.

Written from the docstrings of the ports and the table in the design, not from `taskguard.lifecycle`. Tokens and names
of relay leases are the store's to choose; the model learns them and checks what is promised of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from taskguard.custody import (
    Buried,
    Claim,
    Claimed,
    Completed,
    Conflict,
    Dropped,
    Hold,
    InProgress,
    Poisoned,
    Superseded,
)
from taskguard.envelope import Envelope
from taskguard.record import Failure, State

ENDED = (State.DONE, State.DEAD, State.DISCARDED)
WEEK = 7 * 86400.0


@dataclass
class Entry:
    """What is expected of one record."""

    envelope: Envelope
    primary: bool
    state: State = State.PENDING
    token: int = 0
    holder: str = ""
    crashes: int = 0
    lease: str = ""
    kept: bool = False
    due_at: float | None = None
    expires_at: float | None = None
    waits_on: str = ""
    resting: bool = True
    result: bytes = b""
    failure: Failure | None = None
    reason: str = ""
    outcomes: list[str] = field(default_factory=list)


class Model:
    """A message store that is obviously right, or else obviously wrong."""

    def __init__(self) -> None:
        self.now = 0.0
        self.entries: dict[str, Entry] = {}
        self.newest_token: dict[str, int] = {}
        self.revoked: dict[str, float] = {}
        self.names: dict[str, tuple[str, float]] = {}

    def get(self, id: str) -> Entry | None:
        """The entry, unless its time is over."""
        entry = self.entries.get(id)
        if entry is not None and entry.expires_at is not None and entry.expires_at <= self.now:
            del self.entries[id]
            return None
        return entry

    def living(self) -> dict[str, Entry]:
        """All entries whose time is not over."""
        return {id: entry for id in list(self.entries) if (entry := self.get(id)) is not None}

    # -- custody ----------------------------------------------------------------------------------------------------

    def claim(self, asked: Envelope, holder: str, lease: float, max_crashes: int) -> Claim:
        """The answer, with token 0 where the store chooses one, and then `granted` must follow."""
        entry = self.get(asked.id)
        if entry is not None:
            refusal = self._refusal(entry, asked, holder)
            if refusal is not None:
                return refusal
        if entry is not None and entry.state in ENDED:
            if entry.state is State.DEAD and entry.envelope.task_id != asked.task_id:
                entry.primary = False
                self.entries[entry.envelope.copy_id] = entry
            entry = None
        if entry is None:
            entry = self.entries[asked.id] = Entry(asked, primary=True)
        if entry.state is State.RUNNING:
            entry.crashes += 1
            entry.outcomes.append("crash")
        entry.envelope, entry.resting, entry.kept, entry.lease = asked, True, False, ""
        entry.expires_at = None
        if self.revoked.get(asked.task_id, 0.0) > self.now:
            self._end(entry, State.DISCARDED, WEEK)
            entry.reason, entry.token = "revoked", 0
            return Dropped("revoked")
        entry.state, entry.holder, entry.due_at = State.RUNNING, holder, self.now + lease
        answer = Poisoned if entry.crashes >= max_crashes else Claimed
        return answer(0, entry.crashes)

    def granted(self, id: str, token: int) -> None:
        """Learn the token of a new run. It outranks every earlier one of the key, forgotten ones included."""
        assert token > self.newest_token.get(id, 0), f"token {token} is not larger than {self.newest_token[id]}"
        self.newest_token[id] = self.entries[id].token = token

    def _refusal(self, entry: Entry, asked: Envelope, holder: str) -> Claim | None:
        held = entry.envelope
        left = max(0.0, (entry.due_at or self.now) - self.now)
        if held.task_id != asked.task_id and entry.state not in (State.DEAD, State.DISCARDED):
            if held.fingerprint != asked.fingerprint:
                return Conflict(held.task_id)
            if entry.state is State.DONE:
                return Completed(entry.result)
            return InProgress(False, held.task_id, left)
        if entry.state is State.DONE:
            return Completed(entry.result)
        if entry.state in (State.DEAD, State.DISCARDED):
            if held.task_id != asked.task_id or asked.sequence > held.sequence:
                return None
            return Buried(entry.failure) if entry.failure else Dropped(entry.reason)
        if asked.sequence < held.sequence:
            return Superseded()
        if entry.state is State.RUNNING:
            if entry.holder == holder:
                return Claimed(entry.token, entry.crashes)
            if left > 0:
                return InProgress(asked.sequence == held.sequence, held.task_id, left)
        return None

    def owned(self, id: str, token: int) -> Entry | None:
        """The run with this token."""
        entry = self.get(id)
        return entry if entry is not None and entry.state is State.RUNNING and entry.token == token else None

    def repeated(self, id: str, token: int, state: State, sequence: int | None) -> bool:
        """Whether this very step of the run was made before, and nothing has happened since."""
        entry = self.get(id)
        if entry is None or entry.token != token or entry.state is not state:
            return False
        return sequence is None or entry.envelope.sequence == sequence

    def held(self, hold: Hold) -> Entry | None:
        """The run of this holder."""
        entry = self.get(hold.id)
        return entry if entry is not None and entry.state is State.RUNNING and entry.holder == hold.holder else None

    def end(self, entry: Entry, state: State, retention: float | None) -> None:
        """The run is over, and those that wait for it are due."""
        self._end(entry, state, retention)

    def _end(self, entry: Entry, state: State, retention: float | None) -> None:
        entry.state = state
        begins = entry.due_at if entry.kept and entry.due_at else self.now
        entry.expires_at = None if retention is None else begins + retention
        if not entry.kept:
            self._let_go(entry)
        for waiting in self.entries.values():
            if waiting.waits_on == entry.envelope.id and waiting.state is State.PENDING:
                waiting.waits_on, waiting.due_at = "", self.now

    def _let_go(self, entry: Entry) -> None:
        entry.kept, entry.holder, entry.due_at, entry.lease = False, "", None, ""
        entry.resting = entry.state is State.DEAD

    def rest(self, entry: Entry, following: Envelope, due_at: float) -> None:
        """The entry is *following* now, and waits."""
        entry.envelope, entry.resting, entry.state, entry.due_at = following, True, State.PENDING, due_at
        entry.kept, entry.holder, entry.lease, entry.expires_at = False, "", "", None

    def crash(self, entry: Entry) -> None:
        """The run ended without an outcome."""
        self.rest(entry, entry.envelope, self.now)
        entry.crashes += 1
        entry.token = 0
        entry.outcomes.append("crash")

    def finish(self, hold: Hold) -> None:
        """What follows the outcome is done."""
        entry = self.get(hold.id)
        if entry is not None and entry.state in ENDED and entry.kept and entry.holder == hold.holder:
            self._let_go(entry)

    # -- at rest ----------------------------------------------------------------------------------------------------

    def schedule(self, envelope: Envelope, due_at: float, waits_on: str, unique: str, seconds: float) -> str:
        """The task id that holds the name, else the message's own."""
        if unique:
            holder, until = self.names.get(unique, ("", 0.0))
            if until > self.now and holder != envelope.task_id:
                return holder
            self.names[unique] = (envelope.task_id, self.now + seconds)
        before = self.get(envelope.copy_id)
        if before is None or (before.state is State.PENDING and before.lease):
            awaited = self.get(waits_on) if waits_on else None
            if waits_on and (awaited is None or awaited.state in ENDED):
                due_at, waits_on = min(due_at, self.now), ""
            self.entries[envelope.copy_id] = Entry(envelope, primary=False, due_at=due_at, waits_on=waits_on)
        return envelope.task_id

    def bury_message(self, envelope: Envelope, failure: Failure) -> None:
        """A dead letter beside the key's record, once."""
        before = self.get(envelope.copy_id)
        if before is None or before.state is not State.DEAD:
            self.entries[envelope.copy_id] = Entry(envelope, primary=False, state=State.DEAD, failure=failure)

    def due(self) -> dict[str, float]:
        """What a relay must be given, and since when it is due."""
        return {
            id: entry.due_at
            for id, entry in self.living().items()
            if entry.due_at is not None and entry.due_at <= self.now
        }

    def lease_out(self, id: str, lease: str, seconds: float) -> Entry:
        """A relay has it."""
        entry = self.entries[id]
        if entry.state is State.RUNNING:
            self.crash(entry)
        entry.lease, entry.due_at = lease, self.now + seconds
        return entry

    def remove(self, id: str, lease: str) -> bool:
        """It is published."""
        entry = self.get(id)
        if entry is None or not entry.lease or entry.lease != lease:
            return False
        if entry.state in ENDED:
            self._let_go(entry)
        elif entry.primary:
            entry.state, entry.lease, entry.due_at, entry.resting = State.PUBLISHED, "", None, False
            entry.expires_at = self.now + WEEK
        else:
            del self.entries[id]
        return True

    def purge(self, id: str, entry: Entry, retention: float) -> None:
        """The dead letter is forgotten; a primary leaves a stone."""
        if entry.primary:
            entry.kept, entry.failure, entry.reason = False, None, "purged"
            self._end(entry, State.DISCARDED, retention)
        else:
            del self.entries[id]
