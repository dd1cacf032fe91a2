"""A message store over any place that can lock, read and write one record at a time.

The operations of `MessageStore`, written once: each opens a `Unit` of work, applies the pure function of `lifecycle`,
and writes the record back if it changed. Memory and SQL supply the unit; Redis, where a unit would cost round trips,
runs the same steps as scripts instead.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from taskguard import lifecycle
from taskguard.custody import Claim, Dropped, Hold, Leased, ResultEntry, Unique
from taskguard.envelope import Envelope
from taskguard.ports import JointStore, PermitStore
from taskguard.record import Attempt, Failure, Record, State

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="RecordStore")


class Unit(Protocol):
    """One atomic piece of work. ``now`` is the store's instant, the same for the whole unit."""

    @property
    def now(self) -> float:
        """The store's instant."""

    def lock(self, ids: Iterable[str]) -> None:
        """Lock these records at once, always in the same order, for a `get` each.

        A store may leave their wire and result unread, with b"" in their place: what stays b"" is not written.
        """

    def get(self, id: str) -> Record | None:
        """The record, locked until the unit ends. None also when its time is over."""

    def watch(self, id: str) -> Record | None:
        """As `get`, noting that a message is about to wait on this record."""

    def put(self, record: Record) -> None:
        """Write the record, new or not."""

    def delete(self, id: str) -> None:
        """Remove the record."""

    def wake(self, id: str) -> None:
        """Make the messages that wait on this primary record due now."""

    def due(self, limit: int) -> Iterable[Record]:
        """Due records, the longest due first, locked; those that another unit has locked are passed over."""

    def revoked(self, task_id: str) -> bool:
        """Whether this task id was revoked and the revocation still stands."""

    def unique_holder(self, name: str) -> str | None:
        """The task id that holds the name now."""

    def hold_unique(self, name: str, task_id: str, *, until: float) -> None:
        """Let *task_id* hold the name, whose `unique_holder` this unit has asked for."""

    def drop_unique(self, name: str) -> None:
        """Let the name go."""


def atomic(
    operation: Callable[Concatenate[S, Unit, P], T],
) -> Callable[Concatenate[S, P], T]:
    """Give the operation a unit of work; a store that had to undo it runs it again from the start."""

    @wraps(operation)
    def in_one_unit(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(lambda unit: operation(self, unit, *args, **kwargs))

    return in_one_unit


class RecordStore(ABC):
    """The operations that are the same wherever one record can be locked, read and written."""

    @abstractmethod
    def _run(self, work: Callable[[Unit], T]) -> T:
        """Do *work* in one unit: all of it or nothing, perhaps more than once until it could be committed."""

    def watch_due(self, told: Callable[[bool], None], *, stop: Callable[[], bool]) -> None:
        return  # it cannot push

    @atomic
    def claim(self, unit: Unit, envelope: Envelope, *, holder: str, lease: float, max_crashes: int) -> Claim:
        before = unit.get(envelope.id)
        after, answer = lifecycle.claim(
            before, envelope, holder=holder, lease=lease, max_crashes=max_crashes, now=unit.now
        )
        if after is before:
            return answer
        letter = lifecycle.displaced(before, envelope)
        if letter is not None:
            unit.put(letter)
        if unit.revoked(envelope.task_id):
            unit.put(lifecycle.discard(after, reason="revoked", retention=lifecycle.PUBLISHED_RETENTION, now=unit.now))
            unit.wake(after.id)
            return Dropped("revoked")
        unit.put(after)
        return answer

    @atomic
    def renew(self, unit: Unit, holds: Sequence[Hold], *, lease: float, keep: bool) -> list[bool]:
        renewed = []
        unit.lock(hold.id for hold in holds)
        for hold in holds:
            before = unit.get(hold.id)
            after = lifecycle.renew(before, hold.holder, lease=lease, now=unit.now, keep=keep)
            renewed.append(after is not before)
            if after is not None and after is not before:
                unit.put(after)
        return renewed

    @atomic
    def holds(self, unit: Unit, id: str, token: int) -> bool:
        return lifecycle.owned(unit.get(id), token)

    @atomic
    def _settle(self, unit: Unit, id: str, token: int, step: Callable[[Record, float], Record]) -> bool:
        unit.lock([id])
        record = unit.get(id)
        if record is None:
            return False
        settled = step(record, unit.now)
        if not lifecycle.owned(record, token):
            # The same step, repeated after a lost reply, has been made already; any other comes too late.
            made = (record.token, record.state, record.sequence)
            return made == (token, settled.state, settled.sequence)
        unit.put(settled)
        if settled.state in lifecycle.TERMINAL:
            unit.wake(id)
        return True

    def joined_with(self, permits: PermitStore) -> JointStore | None:
        return None

    def writes_results_to(self, host: str, port: int, user: str = "") -> bool:
        return False

    def complete(
        self, id: str, token: int, *, result: bytes, retention: float, entry: ResultEntry | None = None
    ) -> bool:
        return self._settle(
            id, token, lambda record, now: lifecycle.complete(record, result=result, retention=retention, now=now)
        )

    def rest(self, id: str, token: int, envelope: Envelope, *, due_at: float, attempt: Attempt | None) -> bool:
        return self._settle(
            id, token, lambda record, now: lifecycle.rest(record, envelope, due_at=due_at, attempt=attempt, now=now)
        )

    def bury(self, id: str, token: int, *, failure: Failure, attempt: Attempt | None) -> bool:
        return self._settle(
            id, token, lambda record, now: lifecycle.bury(record, failure=failure, attempt=attempt, now=now)
        )

    def discard(self, id: str, token: int, *, reason: str, retention: float) -> bool:
        return self._settle(
            id, token, lambda record, now: lifecycle.discard(record, reason=reason, retention=retention, now=now)
        )

    @atomic
    def crash(self, unit: Unit, hold: Hold, envelope: Envelope, *, attempt: Attempt) -> bool:
        record = unit.get(hold.id)
        if record is None:
            record = lifecycle.fresh(envelope, primary=True, now=unit.now)
        elif lifecycle.awaits(record, envelope):
            record = replace(record, wire=envelope.to_wire(), expires_at=None)
        elif record.state is not State.RUNNING or record.holder != hold.holder:
            return False
        unit.put(lifecycle.crashed(record, now=unit.now, attempt=attempt))
        return True

    @atomic
    def finish(self, unit: Unit, holds: Sequence[Hold]) -> None:
        unit.lock(hold.id for hold in holds)
        for hold in holds:
            before = unit.get(hold.id)
            after = lifecycle.finish(before, hold.holder, now=unit.now)
            if after is not None and after is not before:
                unit.put(after)

    @atomic
    def schedule(
        self,
        unit: Unit,
        envelope: Envelope,
        *,
        due_at: float,
        waits_on: str = "",
        lease: str = "",
        unique: Unique | None = None,
    ) -> str:
        if unique is not None:
            holder = unit.unique_holder(unique.name)
            if holder is not None and holder != envelope.task_id:
                return holder
            unit.hold_unique(unique.name, envelope.task_id, until=unit.now + unique.seconds)
        before = unit.get(envelope.copy_id)
        if before is not None and not lifecycle.leased_to_another(before, lease):
            return envelope.task_id
        if waits_on:
            awaited = unit.watch(waits_on)
            if awaited is None or awaited.state in lifecycle.TERMINAL:
                due_at, waits_on = min(due_at, unit.now), ""
        unit.put(lifecycle.scheduled(envelope, due_at=due_at, waits_on=waits_on, lease=lease, now=unit.now))
        return envelope.task_id

    @atomic
    def bury_message(self, unit: Unit, envelope: Envelope, *, failure: Failure, history: str = "") -> str:
        before = unit.get(envelope.copy_id)
        if before is None or before.state is not State.DEAD:
            unit.put(lifecycle.buried(envelope, failure=failure, history=history, now=unit.now))
        return envelope.copy_id

    @atomic
    def take_due(self, unit: Unit, *, limit: int, lease: float) -> list[Leased]:
        name = uuid.uuid4().hex
        taken = []
        for record in unit.due(limit):
            leased = lifecycle.lease_out(record, name, seconds=lease, now=unit.now)
            unit.put(leased)
            taken.append(Leased(leased.id, name, leased.wire or b"", rescued=leased.crashes > 0))
        return taken

    @atomic
    def remove(self, unit: Unit, leased: Sequence[Leased]) -> int:
        removed = 0
        unit.lock(item.id for item in leased)
        for item in leased:
            before = unit.get(item.id)
            after = lifecycle.remove(before, item.lease, now=unit.now)
            if after is before:
                continue
            removed += 1
            if after is None:
                unit.delete(item.id)
            else:
                unit.put(after)
        return removed

    @atomic
    def release_unique(self, unit: Unit, name: str, task_id: str) -> bool:
        if unit.unique_holder(name) != task_id:
            return False
        unit.drop_unique(name)
        return True

    @atomic
    def find(self, unit: Unit, id: str) -> Record | None:
        return unit.get(id)

    @atomic
    def requeue(self, unit: Unit, id: str, envelope: Envelope, *, due_at: float) -> bool:
        record = unit.get(id)
        if record is None or record.state is not State.DEAD:
            return False
        unit.put(lifecycle.requeue(record, envelope, due_at=due_at, now=unit.now))
        return True

    @atomic
    def purge(self, unit: Unit, id: str, *, retention: float) -> bool:
        record = unit.get(id)
        if record is None or record.state is not State.DEAD:
            return False
        stone = lifecycle.purge(record, retention=retention, now=unit.now)
        if stone is None:
            unit.delete(id)
        else:
            unit.put(stone)
        return True
