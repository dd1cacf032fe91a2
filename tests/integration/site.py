"""A site: one broker, one message store, one namespace, and the real workers a test starts and kills there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
from celery import Celery
from celery.result import AsyncResult
from kombu import Producer
from kombu.connection import Connection
from redis import Redis

from taskguard.deadletters import DeadLetters
from taskguard.envelope import record_id
from taskguard.letter import DeadLetter
from taskguard.ports import MessageStore
from taskguard.record import Record, State
from tests.integration.journal import Deadline, Entry, Journal
from tests.integration.tasks import make_app

ROOT = Path(__file__).parents[2]
LEASE = 2.0
PATIENCE = 90.0
"""Seconds a test waits for what must happen, on a busy machine. Where it happens, nobody waits so long."""


class Worker:
    """One ``celery worker`` with its children, in a process group of its own."""

    def __init__(
        self, name: str, environ: Mapping[str, str], log: Path, *, program: str, pool: str, concurrency: int
    ) -> None:
        self.name = name
        self.log = log
        command = [sys.executable, "-m", "celery", "-A", program, "worker", "--loglevel", "INFO"]
        command += ["--hostname", f"{name}@test", "--concurrency", str(concurrency), "--pool", pool]
        command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=dict(environ), stdout=sink, stderr=sink, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether the parent process runs."""
        return self.process.poll() is None

    def tree(self) -> list[psutil.Process]:
        """The parent and all its children."""
        try:
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """SIGKILL the parent and all its children at once, and see them gone."""
        tree = self.tree()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(timeout=PATIENCE)
        _, alive = psutil.wait_procs(tree, timeout=PATIENCE)
        assert not alive, f"processes outlived SIGKILL: {alive}"

    def terminate(self) -> None:
        """Ask for a warm shutdown; returns at once."""
        self.process.terminate()

    def stacks(self) -> str:
        """What the threads of a living worker's parent are at, which Celery writes to its log on SIGUSR1."""
        before = len(self.log.read_text(errors="replace"))
        if self.alive:
            self.process.send_signal(signal.SIGUSR1)
            Deadline.after(2).reached(lambda: self.says("LOCAL VARIABLES"))
        return self.log.read_text(errors="replace")[before:]

    def wait_end(self) -> int:
        """Wait for the worker to end by itself. Returns its exit status."""
        return self.process.wait(timeout=PATIENCE)

    def says(self, text: str) -> bool:
        """Whether *text* is in the worker's log."""
        return text in self.log.read_text(errors="replace")


class Site:
    """Where a test's workers live. Sends, watches, starts and kills. *environ* is added to every process's."""

    program = "tests.integration.app"
    """The module whose application the workers run."""

    prefix = ""
    """Of the workers' names: RabbitMQ lets no two of one name be in a virtual host."""

    def __init__(
        self,
        *,
        broker: str,
        store: str,
        journal: str,
        namespace: str,
        directory: Path,
        lease: float = LEASE,
        **environ: str,
    ) -> None:
        self.broker = broker
        self.store_url = store
        self.namespace = namespace
        self.queue = f"{namespace}.tasks"
        self.workers: list[Worker] = []
        self._directory = directory
        self._environ = {
            "TASKGUARD_STORE": store,
            "TASKGUARD_NAMESPACE": namespace,
            "TASKGUARD_LEASE": str(lease),
            "TEST_BROKER": broker,
            "TEST_JOURNAL": journal,
            "TEST_QUEUE": self.queue,
            **environ,
        }

    _make_app = staticmethod(make_app)

    @cached_property
    def app(self) -> Celery:
        """The application as the producer has it."""
        return self._make_app(self._environ, store=self.store_url, namespace=self.namespace)

    @cached_property
    def _connection(self) -> Connection:
        return self.app.connection_for_write()

    @property
    def journal(self) -> Journal:
        """What ran."""
        journal: Journal = self.app.journal
        return journal

    @property
    def store(self) -> MessageStore:
        """The message store, seen from the test's process."""
        store: MessageStore = self.app.taskguard.store
        return store

    def environ(self, **changes: str) -> dict[str, str]:
        """The environment of a process at this site."""
        return {**os.environ, **self._environ, **changes}

    # -- workers ----------------------------------------------------------------------------------------------------

    def start_worker(
        self, *, pool: str = "prefork", concurrency: int = 2, transport: Mapping[str, Any] | None = None, **env: str
    ) -> Worker:
        """Start a worker and wait until it consumes. *transport*: broker options; *env*: its environment."""
        name = f"{self.prefix}w{len(self.workers) + 1}"
        if transport:
            env["TEST_TRANSPORT"] = json.dumps(transport)
        worker = Worker(
            name,
            self.environ(**env),
            self._directory / f"{name}.log",
            program=self.program,
            pool=pool,
            concurrency=concurrency,
        )
        self.workers.append(worker)
        self.wait(
            lambda: any(entry.name == f"{name}@test" for entry in self.journal.entries("ready")) or not worker.alive,
            f"worker {name} ready",
        )
        if not worker.alive:
            self.fail(f"worker {name} ended with status {worker.process.returncode} instead of becoming ready")
        return worker

    def worker(self) -> Worker:
        """A plain worker that is alive; a new one if there is none."""
        for worker in self.workers:
            if worker.alive:
                return worker
        return self.start_worker()

    def kill_all(self) -> None:
        """SIGKILL every worker with all its children."""
        for worker in list(self.workers):  # whoever supervises them starts others meanwhile
            if worker.alive:
                worker.kill()

    def close(self) -> None:
        """End what was started."""
        self.kill_all()
        if "_connection" in self.__dict__:
            self._connection.release()
        if "app" in self.__dict__:
            self.journal.close()
            if hasattr(self.app, "taskguard"):
                self.store.close()
            self.app.close()

    # -- sending ----------------------------------------------------------------------------------------------------

    def send(self, name: str, *args: Any, **options: Any) -> AsyncResult:
        """``apply_async`` of the task *name*."""
        return self.app.tasks[name].apply_async(args, **options)

    def send_repeatable(self, name: str, *args: Any, **options: Any) -> tuple[AsyncResult, Callable[[], None]]:
        """The same, and a function that publishes the very same message again."""
        producer = Recording(self.app.amqp.Producer(self._connection))
        return self.send(name, *args, producer=producer, **options), producer.again

    def publish_raw(
        self, body: bytes, headers: Mapping[str, Any], *, content_type: str = "application/json",
        content_encoding: str = "utf-8",
    ) -> None:  # fmt: skip
        """Put bytes that no producer of ours would send into the workers' queue."""
        queue = self.app.amqp.queues[self.queue]
        Producer(self._connection).publish(
            body, exchange=queue.exchange, routing_key=queue.routing_key, headers=dict(headers), declare=[queue],
            content_type=content_type, content_encoding=content_encoding,
        )  # fmt: skip

    # -- watching ---------------------------------------------------------------------------------------------------

    def wait(self, condition: Callable[[], object], what: str, *, timeout: float = PATIENCE) -> None:
        """Wait until *condition* is true; fail with all that is known otherwise."""
        if not Deadline.after(timeout).reached(condition):
            self.fail(f"not within {timeout:g} s: {what}")

    def fail(self, message: str) -> NoReturn:
        """Fail the test and show the journal and the end of each worker's log."""
        lines = [f"{message} ({self.broker} with {self.store_url})", "journal:"]
        lines += [f"  {entry.at:.3f} {entry}" for entry in self.journal.entries()[-40:]]
        for worker in self.workers[-3:]:
            log = worker.log.read_text(errors="replace")
            lines += [f"log of {worker.name}:", *log.splitlines()[-60:], *worker.stacks().splitlines()]
        pytest.fail("\n".join(lines), pytrace=True)

    def started(self, result: AsyncResult) -> list[Entry]:
        """The runs of the task's body."""
        return self.journal.entries("started", result.id)

    def finished(self, result: AsyncResult) -> list[Entry]:
        """The runs that reached the end of the body."""
        return self.journal.entries("finished", result.id)

    def told(self, what: str, result: AsyncResult, detail: str = "") -> list[Entry]:
        """The events of this name about the task."""
        return [entry for entry in self.journal.entries(what, result.id) if detail in entry.detail]

    def wait_started(self, result: AsyncResult, times: int = 1) -> Entry:
        """Wait until the body was started *times* times. Returns the latest start."""
        self.wait(lambda: len(self.started(result)) >= times, f"{times} starts of {result.id}")
        return self.started(result)[-1]

    def wait_state(self, result: AsyncResult, state: str) -> None:
        """Wait until the result backend shows *state*."""
        self.wait(lambda: result.state == state, f"{result.id} {state}")

    def record(self, result: AsyncResult, task: str) -> Record | None:
        """The record of a task without an idempotency key."""
        return self.store.find(record_id(task, result.id))

    def letter(self, task_id: str) -> DeadLetter:
        """The one dead letter of this task."""
        letters = self.letters(task_id)
        assert len(letters) == 1, f"{len(letters)} dead letters of {task_id}"
        return letters[0]

    def letters(self, task_id: str) -> Sequence[DeadLetter]:
        """The dead letters of this task."""
        return [letter for letter in DeadLetters(self.store).select() if letter.record.task_id == task_id]

    def queued(self) -> int:
        """How many messages the broker still has when all workers are dead, hidden ones included."""
        if self.broker.startswith("redis"):
            with Redis.from_url(self.broker) as client:
                return client.llen(f"{self.namespace}.{self.queue}") + self.unacknowledged()
        with self._connection.channel() as channel:
            self.app.amqp.queues[self.queue].bind(channel).declare()  # no worker may have lived long enough to
            self.wait(
                lambda: not channel.queue_declare(self.queue, passive=True).consumer_count, "the broker to miss them"
            )
            return int(channel.queue_declare(self.queue, passive=True).message_count)

    def unacknowledged(self) -> int:
        """How many delivered messages a Redis broker keeps until it is told to forget them."""
        with Redis.from_url(self.broker) as client:
            return client.hlen(f"{self.namespace}.unacked")

    def wait_settled(self) -> None:
        """Wait until nothing runs, waits or is on its way, so that nothing can still run twice."""
        states = (State.PENDING, State.RUNNING, State.PUBLISHED)
        self.wait(lambda: not any(self.store.depths()[state].count for state in states), "nothing under way")

    def wait_past(self, at: float) -> None:
        """Wait until the store's clock shows more than *at*."""
        self.wait(lambda: self.store.now() > at, "the store's clock")

    def assert_done_once(self, result: AsyncResult, task: str, *, starts: int) -> None:
        """The body was started *starts* times and completed once; everyone can see it."""
        self.wait_state(result, "SUCCESS")
        self.wait_settled()
        self.wait(lambda: self.told("completed", result), "the completion's event, which follows the result")
        runs = self.started(result)
        completions = self.told("completed", result)
        if len(runs) != starts or len(completions) != 1:
            self.fail(f"{len(runs)} starts (expected {starts}) and {len(completions)} completions of {result.id}")
        assert [run.token for run in runs] == sorted({run.token for run in runs}), "a newer run has a greater token"
        record = self.record(result, task)
        assert record is not None
        assert record.state is State.DONE
        assert not self.letters(result.id)


class Recording:
    """A producer that can publish its last message again, as one does whose broker's reply was lost."""

    def __init__(self, producer: Any) -> None:
        self._producer = producer
        self._calls: list[tuple[Any, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def publish(self, body: Any, **options: Any) -> Any:
        """Publish, and remember it."""
        self._calls.append((body, options))
        return self._producer.publish(body, **options)

    def again(self) -> None:
        """Publish the last message once more."""
        body, options = self._calls[-1]
        self._producer.publish(body, **options)
