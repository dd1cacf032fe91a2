"""A stage: one contestant on one broker, store and pool, and the workers a row starts and kills there."""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from amqp.exceptions import NotFound
from celery.exceptions import BackendGetMetaError
from celery.result import AsyncResult

from taskguard.deadletters import DeadLetters
from taskguard.envelope import record_id
from taskguard.errors import StoreUnavailable
from taskguard.record import State
from tests.integration.journal import Deadline
from tests.integration.site import PATIENCE, Site, Worker
from tests.proof import tasks
from tests.proof.outcome import Outcome
from tests.proof.rows import Contestant, Place, Row

SETTLING = 1.0
"""Seconds in which stock may acknowledge what it has shown to be over, before its workers are killed and counted."""

END_PATIENCE = PATIENCE
"""Seconds in which taskguard must have ended what a row sent."""


class Stage(Site):
    """What a row acts on. Everything of `Site`, and: who plays, where, what fired, and the count at the end."""

    program = tasks.__name__
    _make_app = staticmethod(tasks.make_app)

    def __init__(
        self,
        row: Row,
        contestant: Contestant,
        place: Place,
        *,
        servers: Mapping[str, Any],
        backend: str,
        **site: Any,
    ) -> None:
        setup = row.setup(contestant)
        super().__init__(
            **site,
            lease=row.lease,
            TEST_CONTESTANT=contestant,
            TEST_BACKEND=backend,
            TEST_CONF=json.dumps(setup.conf),
            TEST_OPTIONS=json.dumps(setup.options),
            TEST_TRANSPORT=json.dumps(setup.transport),
            TEST_QUEUE_ARGUMENTS=json.dumps(setup.queue),
            **setup.env,
        )
        self.prefix = f"{self.namespace[-6:]}-"  # stages that are open at once may share a virtual host
        self.row = row
        self.contestant = contestant
        self.place = place
        self.servers = servers
        self.faults: list[str] = []
        self._unshown: set[str] = set()

    @property
    def guarded(self) -> bool:
        """Whether taskguard plays."""
        return self.contestant == "taskguard"

    # -- acting -----------------------------------------------------------------------------------------------------

    def start_worker(self, **options: Any) -> Worker:
        """Start a worker of this stage's pool, and wait until it consumes."""
        return super().start_worker(**{"pool": self.place.pool, "concurrency": self.row.concurrency, **options})

    def gate(self) -> str:
        """A new gate for ``held``."""
        return uuid.uuid4().hex

    def send(self, name: str, *args: Any, **options: Any) -> AsyncResult:
        """``apply_async`` of the task *name*."""
        result = super().send(name, *args, **options)
        if options.get("ignore_result"):
            self._unshown.add(result.id)
        return result

    def fired(self, condition: Callable[[], object] | bool, what: str, *, timeout: float = PATIENCE) -> None:
        """The row's fault: wait until it has happened, to either contestant. A row without it proves nothing."""
        check = condition if callable(condition) else lambda: condition
        self.wait(check, f"the fault: {what}", timeout=timeout)
        self.faults.append(what)

    def supervise(self, until: Callable[[], object], *, timeout: float) -> int:
        """Start the worker again whenever it dies, until *until* or the timeout. Returns how often it died."""
        deaths = 0

        def looked() -> object:
            nonlocal deaths
            if not self.workers[-1].alive:
                deaths += 1
                self.start_unready()
            return until()

        Deadline.after(timeout).reached(looked)
        return deaths

    def start_unready(self) -> Worker:
        """Start a worker that may die before it is ready."""
        worker = Worker(
            name := f"{self.prefix}w{len(self.workers) + 1}",
            self.environ(),
            self._directory / f"{name}.log",
            program=self.program,
            pool=self.place.pool,
            concurrency=self.row.concurrency,
        )
        self.workers.append(worker)
        return worker

    @staticmethod
    def clock() -> float:
        """The clock that the journal's lines are stamped by."""
        return time.time()

    # -- watching ---------------------------------------------------------------------------------------------------

    def wait(self, condition: Callable[[], object], what: str, *, timeout: float = PATIENCE) -> None:
        """As `Site.wait`; a store that does not answer has not met the condition."""

        def met() -> object:
            try:
                return condition()
            except StoreUnavailable:
                return False

        super().wait(met, what, timeout=timeout)

    def counts(self, what: str, results: Iterable[AsyncResult]) -> Counter[str]:
        """How many lines of this kind the journal has, by task id."""
        wanted = {result.id for result in results}
        return Counter(entry.task_id for entry in self.journal.entries(what) if entry.task_id in wanted)

    def total(self, what: str, results: Iterable[AsyncResult]) -> int:
        """How many lines of this kind the journal has about these tasks."""
        return self.counts(what, results).total()

    def wait_all(self, what: str, results: Sequence[AsyncResult], *, each: int = 1, timeout: float = PATIENCE) -> None:
        """Wait until each task has *each* lines of this kind."""

        def there() -> bool:
            counts = self.counts(what, results)
            return all(counts[result.id] >= each for result in results)

        self.wait(there, f"{each} {what} of each of {len(results)} tasks", timeout=timeout)

    def shown(self, results: Iterable[AsyncResult]) -> set[str]:
        """The ids of the tasks whose end everyone can see; or that asked to be told none."""
        results = list(results)
        quiet = [result for result in results if result.id in self._unshown]
        done = (
            set(self.counts("completed" if self.guarded else "finished", quiet)) | self.kept(quiet) if quiet else set()
        )
        return done | {r.id for r in results if r.id not in self._unshown and _ready(r)}

    def kept(self, results: Iterable[AsyncResult]) -> set[str]:
        """The ids of those of these tasks that are dead letters. Stock Celery has none."""
        if not self.guarded:
            return set()
        return {letter.record.task_id for letter in DeadLetters(self.store).select()} & {r.id for r in results}

    def left_at_broker(self) -> int:
        """How many messages the broker has when all workers are dead."""
        try:
            return self.queued()
        except NotFound:
            self.__dict__.pop("_connection").release()
            return 0

    # -- the end ----------------------------------------------------------------------------------------------------

    def finish(
        self,
        results: Sequence[AsyncResult],
        *,
        completed: int | None = None,
        starts: int | None = None,
        twice: int = 0,
        forgotten: Sequence[AsyncResult] = (),
        note: str = "",
    ) -> Outcome:
        """Wait for the ends and count. taskguard is held to its promises; stock is given `Row.patience`, and recorded.

        completed: how many tasks complete, all unless told otherwise; the others are dead letters. starts: the most
        runs there may be, one a task unless told otherwise. twice: the most bodies that may end twice. forgotten: tasks
        that only a broker had that has forgotten them: they are counted with the *results*, and they alone may be lost,
        as many as `Row.beyond_saving` says.
        """
        counted = [*results, *forgotten]
        missing = {result.id: result for result in results}

        def ended() -> bool:
            for id in self.shown(list(missing.values())):
                del missing[id]
            return not missing

        if not self.guarded:
            if Deadline.after(self.row.patience).reached(lambda: ended() and self._quiet()):
                time.sleep(SETTLING)
            self.kill_all()
            return self._count(counted, note, waiting=self.left_at_broker())
        self.wait(ended, f"a visible end of {len(missing)} tasks", timeout=END_PATIENCE)
        self.wait_settled()
        outcome = self._count(counted, note, waiting=0)
        # A worker may have fetched some of them before; those complete as all others do.
        survivors = len(self.counts("finished", forgotten))
        gone = len(forgotten) - survivors
        expected = (len(results) if completed is None else completed) + survivors
        runs = (starts or len(results)) + survivors
        completions = self.counts("completed", counted)
        broken = [
            promise
            for promise, holds in {
                f"{expected} tasks complete": outcome.completed == expected,
                "what does not complete is a dead letter": outcome.kept == outcome.sent - gone - expected,
                f"no more than {self.row.beyond_saving} are beyond saving": gone <= self.row.beyond_saving,
                "nothing else is lost": outcome.lost == gone,
                "no task completes twice": max(completions.values(), default=0) <= 1,
                f"no more than {twice} bodies end twice": outcome.twice <= twice,
                f"no more than {runs} runs": outcome.starts <= runs,
                "every end is visible": outcome.seen == outcome.sent - gone,
            }.items()
            if not holds
        ]
        if broken:
            self.fail(f"row {self.row.number}, {'; '.join(broken)}: not so: {outcome.shown()}")
        return outcome

    def _completed(self, task_id: str) -> bool:
        record = self.store.find(record_id(self.journal.entries("started", task_id)[0].name, task_id))
        return record is not None and record.state is State.DONE

    def _quiet(self) -> bool:
        """Whether the broker has nothing more for the workers, as far as one can tell while they live."""
        if self.broker.startswith("redis"):
            return self.queued() == 0
        with self._connection.channel() as channel:
            return not channel.queue_declare(self.queue, passive=True).message_count

    def _count(self, results: Sequence[AsyncResult], note: str, *, waiting: int) -> Outcome:
        finished = self.counts("finished", results)
        told = self.counts("completed", results)
        # The event of a completion can be lost with its process; the completion is not.
        done = {id for id in finished if id in told or not self.guarded or self._completed(id)}
        kept = self.kept(results) - done
        open_ends = len(results) - len(done) - len(kept)
        waiting = min(waiting, open_ends)
        return Outcome(
            sent=len(results),
            starts=self.total("started", results),
            completed=len(done),
            twice=sum(1 for times in finished.values() if times > 1),
            kept=len(kept),
            waiting=waiting,
            lost=open_ends - waiting,
            seen=len(self.shown(results)),
            note=note,
        )


def _ready(result: AsyncResult) -> bool:
    try:
        return bool(result.ready())
    except BackendGetMetaError:  # the row has taken the result backend away
        return False
