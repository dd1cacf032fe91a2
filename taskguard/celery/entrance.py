"""The claim and the question to the first downstream, in one step where both are asked on one server.

The question is made before the claim, as the first step of the downstream's block, and goes along with it. A message
that the rates put off rests in the same step. What the claim does not give custody to is asked nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from celery.exceptions import SoftTimeLimitExceeded

from taskguard.celery import admission
from taskguard.custody import Claim, Entered, Resting
from taskguard.downstream import timeouts
from taskguard.downstream.admittance import Question
from taskguard.downstream.blocks import PermitBlock
from taskguard.envelope import Envelope
from taskguard.errors import StoreUnavailable
from taskguard.headers import Booking
from taskguard.permits import Answer, Ask
from taskguard.ports import JointStore

if TYPE_CHECKING:
    from taskguard.celery.task import ReliableTask


class NotGiven(Exception):
    """The claim gave no custody, or the permits failed: nothing is answered."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim


class Entrance:
    """Of one delivery of a task that declares downstreams. To be closed."""

    def __init__(
        self, task: ReliableTask, envelope: Envelope, args: Sequence[Any], kwargs: Mapping[str, Any], *, holder: str
    ) -> None:
        self._task, self._envelope, self._holder = task, envelope, holder
        self._args, self._kwargs = args, kwargs
        self._first = task.downstreams[0]
        self._entered: Entered | None = None
        self.block: PermitBlock | None = None
        """The first downstream's, where it is begun."""

    @property
    def rests_until(self) -> float | None:
        """Until when the message rests, where it was put off: its run is over."""
        return None if self._entered is None else self._entered.due_at

    def claim(self, alone: Callable[[], Claim]) -> Claim:
        """Claim with the question, or *alone* where none can go along."""
        question = self._question()
        if question is None:
            return alone()
        try:
            question.carried(self._ask)
        except NotGiven as told:
            return told.claim
        assert self._entered is not None
        return self._entered.claim

    def _question(self) -> Question | None:
        if self._entered is None and self._joint() is None:
            return None
        if self.block is None:
            budget = timeouts.deadline_at.set(self._envelope.deadline_at)
            try:
                with admission.coming_back(self._task, self._envelope):
                    block = admission.block_of(self._first, self._task, self._args, self._kwargs)
                    if block.begin() is not None:
                        self.block = block
            except SoftTimeLimitExceeded:
                raise
            except Exception:  # noqa: BLE001 (a key that fails does so again in the run, whose failure it is)
                return None
            finally:
                timeouts.deadline_at.reset(budget)
        return None if self.block is None else self.block.begin()

    def _joint(self) -> JointStore | None:
        store = self._first.desk.store
        return None if store.outage.since is not None else self._task.guard.joined_with(store.store)

    def _ask(self, ask: Ask) -> Answer:
        if self._entered is None:
            joint = self._joint()
            if joint is None:
                raise StoreUnavailable("the permit store went away between two attempts to ask it")
            self._entered = self._claimed(joint, ask)
        assert self._entered.answer is not None
        return self._entered.answer

    def _claimed(self, joint: JointStore, ask: Ask) -> Entered:
        entered = joint.claim(
            self._envelope,
            holder=self._holder,
            lease=self._task.guard.settings.lease,
            max_crashes=self._task.terms.max_crashes,
            ask=ask,
            resting=self._resting(ask),
        )
        if entered.answer is None:
            raise NotGiven(entered.claim)
        return entered

    def _resting(self, ask: Ask) -> Resting | None:
        if ask.booked or not ask.rates or not self._first.guard.rests_at_once:
            return None
        following = admission.following_of(self._task, self._envelope, self._first.name, Booking())
        return Resting(following, self._task.guard.gate.deferral(self._holder))

    def close(self) -> None:
        """Give back what was taken for a run that does not come to its downstream."""
        if self.block is not None and self.rests_until is None:
            self.block.abandon()


def entrance_of(
    task: ReliableTask, envelope: Envelope, args: Sequence[Any], kwargs: Mapping[str, Any], *, holder: str
) -> Entrance | None:
    """The entrance of a delivery; None where nothing is to be asked of a downstream, or rules before it, or where code
    of the user's says what the call costs or whose it is: that runs in custody."""
    if not task.downstreams or type(task)._identity is not None:
        return None
    first = task.downstreams[0]
    if callable(first.cost) or any(callable(each.key) for each in first.limits):
        return None
    return Entrance(task, envelope, args, kwargs, holder=holder)
