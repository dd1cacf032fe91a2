"""The claim and the question to the first downstream, in one step where both are asked on one server.

The question is made before the claim, as the first step of the downstream's block, and goes along with it. A message
that the rates put off rests in the same step. What the claim does not give custody to is asked nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from celery.exceptions import SoftTimeLimitExceeded

from taskguard.celery import admission
from taskguard.custody import Claim, Entered, Resting
from taskguard.downstream import timeouts
from taskguard.downstream.admittance import Question
from taskguard.downstream.blocks import PermitBlock
from taskguard.downstream.desk import Desk
from taskguard.envelope import Envelope
from taskguard.headers import Booking
from taskguard.permits import Answer, Ask
from taskguard.ports import JointStore

if TYPE_CHECKING:
    from taskguard.celery.task import ReliableTask


class NotGiven(Exception):
    """The claim gave no custody, so nothing was asked."""

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
        """Until when the message rests, where it was put off."""
        return None if self._entered is None else self._entered.due_at

    def claim(self, alone: Callable[[], Claim]) -> Claim:
        """Claim with the question, or *alone* where none can go along."""
        if self._entered is not None:
            return self._entered.claim
        joint = self._joint(self._first.desk)
        question = None if joint is None else self._question()
        if joint is None or question is None:
            return alone()
        try:
            question.carried(partial(self._ask, joint))
        except NotGiven as told:
            return told.claim
        assert self._entered is not None
        return self._entered.claim

    def _question(self) -> Question | None:
        budget = timeouts.deadline_at.set(self._envelope.deadline_at)
        try:
            with admission.coming_back(self._task, self._envelope):
                block = self.block or admission.block_of(self._first, self._task, self._args, self._kwargs)
                question = block.start()
                self.block = block
                return question
        except SoftTimeLimitExceeded:
            raise
        except Exception:  # noqa: BLE001 (a cost or a key that fails does so again in the run, whose failure it is)
            return None
        finally:
            timeouts.deadline_at.reset(budget)

    def _joint(self, desk: Desk) -> JointStore | None:
        return None if desk.store.outage.since is not None else self._task.guard.joined_with(desk.store.store)

    def _ask(self, joint: JointStore, ask: Ask) -> Answer:
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
        self._entered = entered
        return entered.answer

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
    """The entrance of a delivery; None where nothing is to be asked of a downstream, or of rules before."""
    if not task.downstreams or type(task)._identity is not None:
        return None
    return Entrance(task, envelope, args, kwargs, holder=holder)
