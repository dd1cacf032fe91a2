"""A site whose workers are started again when they die, as a supervisor does, and may be killed at any crash point."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from celery.result import AsyncResult

from taskguard.envelope import record_id
from taskguard.ports import PermitStore
from taskguard.record import Record, State
from taskguard.stores import open_permits
from tests.integration.crashapp import make_app
from tests.integration.crashpoints import ENABLED, Action, Armoury, Point
from tests.integration.journal import Entry
from tests.integration.site import PATIENCE, ROOT, Site, Worker

TRANSPORT = {"visibility_timeout": 2, "unacked_restore_interval": 0.5, "unacked_restore_throttle": 1}
"""Of a Redis broker: a message that died with its worker comes back in seconds."""


PERMITS_TIMEOUT = "5"
"""Seconds: on a busy machine too no call goes without its permit, so that every crash point is passed."""
OFFICE = "office"
"""The role of producers and operators."""


class Relay(Worker):
    """One ``taskguard relay``, alone."""

    @staticmethod
    def command(program: str) -> list[str]:
        """What a shell would run."""
        return [sys.executable, "-m", "taskguard", "-A", program, "relay", "--poll", "0.1s"]

    def __init__(self, name: str, environ: dict[str, str], log: Any, *, program: str) -> None:
        self.name, self.log = name, log
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                self.command(program), cwd=ROOT, env=environ, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip


class Crew(Site):
    """Keeps *size* workers at work, and with *relays* that many relays apart from them."""

    program = "tests.integration.crashapp"
    _make_app = staticmethod(make_app)

    def __init__(self, *, size: int = 2, relays: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self._wanted = ["worker"] * size + ["relay"] * relays
        self._kept: list[Worker | None] = [None] * len(self._wanted)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        self.armoury = Armoury(options["journal"], options["namespace"])
        self._office: subprocess.Popen[str] | None = None
        self._fired_before = 0
        self.expected: list[tuple[AsyncResult, int]] = []

    def environ(self, **changes: str) -> dict[str, str]:
        """The environment of a process that may be killed at a crash point."""
        transport = {"TEST_TRANSPORT": json.dumps(TRANSPORT)} if self.broker.startswith("redis") else {}
        relay = {"TASKGUARD_RELAY": "0"} if "relay" in self._wanted else {}
        patience = {"TASKGUARD_PERMITS_TIMEOUT": PERMITS_TIMEOUT}
        return super().environ(**{ENABLED: "worker", **transport, **relay, **patience, **changes})

    @cached_property
    def permits(self) -> PermitStore:
        """The permit store, seen from the test's process."""
        return open_permits(self.store_url, namespace=self.namespace, timeout=float(PERMITS_TIMEOUT))

    # -- the supervisor ---------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """Start the crew, wait until all are at work, and start again whoever dies from now on."""
        self._thread.start()
        self.wait(lambda: len(self.journal.entries("ready")) >= self._wanted.count("worker"), "the crew at work")

    def _supervise(self) -> None:
        while not self._stop.wait(0.05):
            for number, worker in enumerate(self._kept):
                if worker is None or not worker.alive:
                    if worker is not None:
                        worker.kill()
                    self._kept[number] = self._start(self._wanted[number])

    def _start(self, kind: str) -> Worker:
        name = f"{kind[0]}{len(self.workers) + 1}"
        log = self._directory / f"{name}.log"
        worker: Worker
        if kind == "relay":
            worker = Relay(name, self.environ(), log, program=self.program)
        else:
            worker = Worker(name, self.environ(), log, program=self.program, pool="prefork", concurrency=2)
        self.workers.append(worker)
        return worker

    def close(self) -> None:
        """End the crew for good."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=PATIENCE)
        if self._office is not None:
            self._office.kill()
            self._office.communicate()
        if "permits" in self.__dict__:
            self.permits.close()
        super().close()
        self.armoury.close()

    # -- crashes ----------------------------------------------------------------------------------------------------

    def arm(
        self, point: Point, task: str, task_id: str, *, key: str = "", action: Action = "die", role: str = ""
    ) -> None:
        """Die at *point* when this task gets there, in any process or in those of a *role*."""
        key = key or task_id
        self.armoury.arm(
            point, [task_id, record_id(task, key), record_id(task, key, task_id)], action=action, role=role
        )

    def begin_scene(self) -> None:
        """Disarm all, and forget the crashes so far."""
        self.armoury.clear()
        self._fired_before = len(self.journal.entries("fired"))

    @contextmanager
    def kept_by_the_broker(self, task: str, task_id: str) -> Iterator[None]:
        """In the block this task's lease is never renewed, so that the broker's copy is not acknowledged early.

        A worker's heart beats for all of its runs at once: however short one is, a beat may fall into it.
        """
        beat = Point("MessageStore.renew", "before")
        self.arm(beat, task, task_id, action="refuse each")
        try:
            yield
        finally:
            self.armoury.disarm(beat)

    def send_armed(self, point: Point, name: str, *args: Any, **options: Any) -> AsyncResult:
        """Send a task that will meet *point*. Its ``key`` is its idempotency key, where it has one."""
        task_id, key = options.pop("task_id", None) or str(uuid.uuid4()), options.pop("key", "")
        self.arm(point, name, task_id, key=key)
        return self.send(name, *args, task_id=task_id, **options)

    def wait_fired(self, point: Point) -> Entry:
        """Wait for the crash. Returns its entry in the journal."""
        self.wait(lambda: str(point) not in self.armoury.armed(), f"a crash {point}")
        self.wait(lambda: self.fired(point), f"the journal's entry of a crash {point}")
        return self.fired(point)[-1]

    def fired(self, point: Point) -> list[Entry]:
        """The times that a process died at *point* in this scene."""
        return [entry for entry in self.journal.entries("fired")[self._fired_before :] if entry.name == str(point)]

    def run(self, *command: str, dies: bool) -> str:
        """Run a producer's or operator's command, which dies at a crash point, or not. Returns what it printed."""
        if self._office is None:
            self._office = subprocess.Popen(
                [sys.executable, "-c", f"from {self.program} import serve; serve()"],
                cwd=ROOT, env=self.environ(**{ENABLED: OFFICE}), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, bufsize=1,
            )  # fmt: skip
        assert self._office.stdin is not None
        assert self._office.stdout is not None
        self._office.stdin.write(json.dumps(command) + "\n")
        answer = self._office.stdout.readline()
        status, printed = json.loads(answer or '[1, "nothing: it has ended"]')
        if status != (-signal.SIGKILL if dies else 0):
            self.fail(f"{command} ended with status {status}: {printed}")
        return str(printed)

    def produce(self, *words: str, dies: bool) -> None:
        """Run a producer that may die."""
        self.run("produce", *words, dies=dies)

    def operate(self, *words: str, dies: bool) -> str:
        """Run ``taskguard`` as an operator does."""
        return self.run("taskguard", *words, dies=dies)

    # -- what must hold ---------------------------------------------------------------------------------------------

    def assert_ended(
        self, result: AsyncResult, task: str, state: State, *, starts: int, cut: int = 0, key: str = "", shown: str = ""
    ) -> Record:
        """The task was started *starts* times in all, and came to this one end, which everybody can see.

        The crash may have taken *cut* runs with it that had started and not completed: those are counted as crashes.
        """
        if wanted := shown or {State.DONE: "SUCCESS", State.DEAD: "FAILURE"}.get(state, ""):
            self.wait_state(result, wanted)
        self.wait_settled()
        runs, told = self.started(result), self.told("completed", result)
        repeated = len(runs) - starts
        if not 0 <= repeated <= cut or len(told) > (state is State.DONE):
            self.fail(f"{len(runs)} starts (expected {starts}) and {len(told)} completions of {task} {result.id}")
        tokens = [run.token for run in runs]
        assert tokens == sorted(set(tokens)), "a newer run has a greater token"
        letters = self.letters(result.id)
        assert len(letters) == (state is State.DEAD), f"{len(letters)} dead letters of {result.id}"
        record = letters[0].record if letters else self.store.find(record_id(task, key or result.id))
        assert record is not None
        assert record.state is state
        assert record.crashes >= repeated, "what ran again had been cut"
        if starts and state is State.DONE:
            ends = self.finished(result)
            assert ends[-1].token == record.token, "the run that ended last is the one that counts"
        self.expected.append((result, len(runs)))
        return record

    def assert_still(self) -> None:
        """Nothing is on its way any more, and nothing has run since its end was seen."""
        self.wait_settled()
        self.wait(lambda: not self._ready(), "an empty queue")
        for result, starts in self.expected:
            if len(self.started(result)) != starts:
                told = "\n".join(str(entry) for entry in self.journal.entries(task_id=result.id))
                self.fail(f"{result.id} ran again after its end:\n{told}\n")

    def _ready(self) -> int:
        """How many messages wait in the broker."""
        if self.broker.startswith("redis"):
            return self.queued()
        with self._connection.channel() as channel:
            return int(channel.queue_declare(self.queue, passive=True).message_count)


def gate() -> str:
    """The name of a gate that nobody else waits at."""
    return uuid.uuid4().hex
