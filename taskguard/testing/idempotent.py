"""`assert_idempotent`: a task put through every way in which its message can come twice.

The task is run once as it should be, and then once for each crash point that this clean run came by: there its process
ends, the broker delivers the message again, the lease ends and the run is rescued. Then the message comes once more
after its end, comes twice before it, and, where the task has an idempotency key, another message with the same key
comes. After each of these histories the effects must be those of the clean run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, MutableSet
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from celery.canvas import Signature

from taskguard.celery.task import ReliableTask
from taskguard.errors import ConfigurationError
from taskguard.letter import DeadLetter
from taskguard.record import Reason
from taskguard.testing.clock import ManualClock
from taskguard.testing.process import Process
from taskguard.testing.reliable import Reliable

ENDED_WELL = frozenset({"completed", "replayed"})
BY_DECLARATION = frozenset({Reason.EXPIRED, Reason.POISON})
"""Reasons for which a task that was interrupted is not begun again, because it says so itself."""

WAY_OUT = (
    "A process can end at any instant, so the body of a task can always begin again. Hand self.custody.key to the "
    "other side as an idempotency key, or write the effect and the proof of it in one transaction."
)


def assert_idempotent(
    task: Any,
    *args: Any,
    effects: Any,
    reset: Callable[[], Any] | None = None,
    clock: ManualClock | None = None,
    **kwargs: Any,
) -> tuple[str, ...]:
    """Run a task through every crash point and redelivery. Returns the histories it was put through, one line each.

    task: a reliable task with its *args* and *kwargs*, or a signature of one.
    effects: what the task does to the world: a callable that returns something comparable, such as the rows of a
        table, or a list, dict or set that your fake of the other side fills.
    reset: puts the effects back to the beginning, before each run. A list, dict or set is emptied without it.
    clock: each run begins at its instant, and leaves it where it is.

    Raises AssertionError that names each history after which the effects differ, with the expected and the actual ones.
    """
    __tracebackhide__ = True
    trial = _Trial(_signature(task, args, kwargs), _snapshot(effects), _reset(effects, reset), clock or ManualClock())
    clean, points = trial.clean()
    histories = [_History(f"its process ends {point}; then it is rescued", at) for at, point in enumerate(points)]
    histories += [
        _History("its message is delivered again after its end", redelivered=True),
        _History("its message is delivered twice before it has run", doubled=True),
    ]
    if trial.task.idempotency_key is not None:
        histories.append(_History("another message with the same idempotency key is sent", repeated=True))
    complaints = [line for history in histories for line in trial.complaints(history, clean)]
    if complaints:
        raise AssertionError("\n\n".join([f"{trial.task.name} is not idempotent.", *complaints, WAY_OUT]))
    return tuple(history.name for history in histories)


@dataclass(frozen=True, slots=True)
class _History:
    name: str
    fatal: int | None = None
    redelivered: bool = False
    doubled: bool = False
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class _Outcome:
    effects: Any
    well: bool
    letters: tuple[DeadLetter, ...]
    process: Process

    @property
    def reasons(self) -> frozenset[Reason]:
        """Why it is a dead letter, if it is."""
        return frozenset(letter.failure.reason for letter in self.letters)

    @property
    def end(self) -> str:
        """How it ended, for people."""
        if self.letters:
            letter = self.letters[0]
            return f"a dead letter ({letter.failure.reason}: {letter.error})"
        return "completed" if self.well else "neither completed nor a dead letter"


@dataclass(frozen=True, slots=True)
class _Trial:
    signature: Signature
    snapshot: Callable[[], Any]
    reset: Callable[[], Any]
    clock: ManualClock
    task_id: str = field(default_factory=lambda: str(uuid4()))
    """The same in every run, so that keys made of it are, too."""

    @property
    def task(self) -> ReliableTask:
        """The task that is tried."""
        found: ReliableTask = self.signature.app.tasks[self.signature.task]
        return found

    def clean(self) -> tuple[_Outcome, list[str]]:
        """A run without any fault, and the crash points it came by. Raises AssertionError where there is none."""
        __tracebackhide__ = True
        self.reset()
        nothing = self.snapshot()
        history, name = _History("nothing happens"), self.task.name
        clean = self.run(history, watch=False)
        if not clean.well or clean.letters:
            raise AssertionError(
                f"assert_idempotent: {name} ended as {clean.end} when nothing went wrong; "
                "give it arguments with which it completes"
            )
        if clean.effects == nothing:
            raise AssertionError(
                f"assert_idempotent: {name} ran and effects= shows {_shown(nothing)} as before; "
                "give effects= that show what the task does"
            )
        again = self.run(history)
        if again.effects != clean.effects:
            raise AssertionError(
                f"assert_idempotent: two clean runs of {name} differ, {_shown(clean.effects)} and "
                f"{_shown(again.effects)}; leave out of effects= what is new each time, or give reset="
            )
        return clean, again.process.points

    def complaints(self, history: _History, clean: _Outcome) -> Iterator[str]:
        """What is wrong after this history."""
        outcome = self.run(history)
        if history.fatal is not None and not outcome.process.crashed:
            yield f"  {history.name}\n    was not reached: the task takes another way each time"
            return
        if outcome.process.bodies <= 1 and outcome.reasons & BY_DECLARATION:
            return  # its deadline, or max_crashes, kept it from beginning again: nothing can be repeated
        if outcome.effects != clean.effects:
            yield (
                f"  {history.name}\n"
                f"    expected effects: {_shown(clean.effects)}\n"
                f"    actual effects:   {_shown(outcome.effects)}"
            )
        elif outcome.letters or not outcome.well:
            yield f"  {history.name}\n    expected end: completed\n    actual end:   {outcome.end}"

    def run(self, history: _History, *, watch: bool = True) -> _Outcome:
        """Live through a history, from nothing."""
        process = Process(watch=self.task_id, fatal=history.fatal)
        self.reset()
        with (
            Reliable(self.task.app, clock=self.clock.branch(), process=process) as reliable,
            process.watching(self.task, self.snapshot) if watch else nullcontext(),
        ):
            result = self.signature.clone().apply_async(task_id=self.task_id)
            if history.doubled:
                reliable.send_again(result)
            reliable.drain(until="idle")
            if history.redelivered:
                reliable.send_again(result)
            if history.repeated:
                self.signature.clone().apply_async()
            reliable.drain(until="idle")
            events = {event.name for event in reliable.events if event.task_id == self.task_id}
            letters = tuple(each for each in reliable.dead_letters if each.record.task_id == self.task_id)
            return _Outcome(self.snapshot(), bool(events & ENDED_WELL), letters, process)


def _signature(task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature:
    if isinstance(task, Signature):
        made = task.clone(args, kwargs)
        task = made.app.tasks.get(made.task)
    else:
        made = task.s(*args, **kwargs) if isinstance(task, ReliableTask) else None
    if made is None or not isinstance(task, ReliableTask):
        raise ConfigurationError(f"assert_idempotent: {task!r} is no ReliableTask; give the task, not what calls it")
    return made


def _snapshot(effects: Any) -> Callable[[], Any]:
    if callable(effects):
        return lambda: deepcopy(effects())
    if isinstance(effects, (MutableSequence, MutableMapping, MutableSet)):
        return lambda: deepcopy(effects)
    raise ConfigurationError(
        f"assert_idempotent: effects={effects!r} cannot change; give a callable that returns what the task has done, "
        "or the list, dict or set that your fake fills"
    )


def _reset(effects: Any, reset: Callable[[], Any] | None) -> Callable[[], Any]:
    if reset is not None:
        if not callable(reset):
            raise ConfigurationError(f"assert_idempotent: reset={reset!r} cannot be called; leave off the parentheses")
        return reset
    if isinstance(effects, (MutableSequence, MutableMapping, MutableSet)):
        clear: Callable[[], Any] = effects.clear
        return clear
    raise ConfigurationError(
        "assert_idempotent: effects= is a callable, so give reset=, too: a callable that puts the effects back to the "
        "beginning before each run"
    )


def _shown(effects: Any) -> str:
    text = repr(effects)
    return text if len(text) <= 2000 else f"{text[:2000]}… ({len(text)} characters)"
