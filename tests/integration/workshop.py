"""An application whose every task exists plain, reliable and keyed, and the workers that run it on any pool.

``celery -A tests.integration.workshop worker``. The three kinds share their bodies, so that a workflow can be put
through each and the outcomes compared. Every body notes in a Redis list that it ran.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from celery import Celery, Task, chord, group, signals
from kombu.messaging import Producer
from redis import Redis

import taskguard
from taskguard import ReliableTask
from taskguard.deadletters import DeadLetters
from taskguard.record import State
from tests.integration import crashpoints
from tests.integration.journal import Journal

ROOT = Path(__file__).parents[2]
PATIENCE = 90.0
"""Seconds a test waits for what must happen, on a busy machine."""

KINDS: dict[str, tuple[type[Task], dict[str, Any]]] = {
    "plain": (Task, {"acks_late": True}),
    "reliable": (ReliableTask, {}),
    "keyed": (ReliableTask, {"idempotency_key": lambda *args, **kwargs: json.dumps([args, kwargs])}),
}


def make_app(environ: Mapping[str, str]) -> Celery:
    """The application as *environ* describes it; taskguard reads its own settings there."""
    namespace, broker, notes = environ["TEST_NAMESPACE"], environ["TEST_BROKER"], environ["TEST_NOTES"]
    transport = json.loads(environ.get("TEST_TRANSPORT", "{}"))
    if broker.startswith("redis"):
        transport["global_keyprefix"] = f"{namespace}."
    app = Celery("tests.workshop", broker=broker, backend=notes, set_as_current=False)
    app.conf.update(
        task_default_queue=f"{namespace}.tasks",
        broker_transport_options=transport,
        result_backend_transport_options={"global_keyprefix": f"{namespace}."},
        result_chord_join_timeout=20,
        worker_hijack_root_logger=False,
        **json.loads(environ.get("TEST_CONF", "{}")),
    )
    app.notes = Notes(notes, namespace)
    app.notes.watch()
    given = json.loads(environ.get("TEST_INSTALL", "{}"))
    taskguard.install(app, **given)
    for kind, (base, options) in KINDS.items():
        _declare(app, kind, base, options)
    _declare_reliable(app)
    crashpoints.install(app, environ, Journal(notes, namespace))
    return app


class Notes:
    """What was sent, ran and was over, in the order in which it happened."""

    def __init__(self, url: str, namespace: str) -> None:
        self._redis = Redis.from_url(url, decode_responses=True)
        self._list = f"{namespace}:notes"

    def add(self, *what: Any) -> None:
        """Note *what*."""
        self._redis.rpush(self._list, json.dumps(what, default=str))

    def all(self) -> list[list[Any]]:
        """Every note so far."""
        return [json.loads(line) for line in self._redis.lrange(self._list, 0, -1)]

    def watch(self) -> None:
        """Note each message that Celery sends, and each run that is over with all that Celery sends at its end."""
        signals.before_task_publish.connect(self._sent)
        signals.task_postrun.connect(self._over)

    def _sent(self, headers: Mapping[str, Any], **_: Any) -> None:
        self.add("sent", headers["id"], headers.get("root_id") or headers["id"])

    def _over(self, sender: Task, task_id: str, **_: Any) -> None:
        self.add("over", task_id, root(sender))

    def close(self) -> None:
        """Watch no more, and give the connections back."""
        signals.before_task_publish.disconnect(self._sent)
        signals.task_postrun.disconnect(self._over)
        self._redis.close()


def root(task: Task) -> str:
    """The id of the task that a producer sent and that what runs now follows from."""
    by_worker = task.app.current_worker_task or task  # `map` and `chunks` call their task themselves
    return str(by_worker.request.root_id or by_worker.request.id)


def _declare(app: Celery, kind: str, base: type[Task], options: Mapping[str, Any]) -> None:
    def task(name: str, **more: Any) -> Callable[..., Any]:
        return app.task(name=f"{kind}.{name}", base=base, shared=False, **{**options, **more})

    def ran(self: Task, *args: Any) -> None:
        app.notes.add("ran", self.request.id, self.name, self.request.retries, list(args), root(self))

    @task("add", bind=True)
    def add(self: Task, x: int, y: int = 0) -> int:
        ran(self, x, y)
        return x + y

    @task("total", bind=True)
    def total(self: Task, numbers: list[int]) -> int:
        ran(self, numbers)
        return sum(numbers)

    @task("broken", bind=True)
    def broken(self: Task, *args: Any) -> None:
        ran(self)
        raise ValueError("no such card")

    @task("mourn", bind=True)
    def mourn(self: Task, *args: Any, label: str = "") -> None:
        ran(self, label)

    @task("flaky", bind=True, max_retries=2)
    def flaky(self: Task, x: int, failures: int = 1) -> int:
        ran(self, x)
        if self.request.retries < failures:
            raise self.retry(countdown=0.2, exc=OSError("bank down"))
        return x

    @task("delegate", bind=True)
    def delegate(self: Task, x: int, how: str) -> Any:
        ran(self, x, how)
        tasks = app.tasks
        plus, sums = tasks[f"{kind}.add"], tasks[f"{kind}.total"]
        match how:
            case "task":
                raise self.replace(plus.s(x, 100))
            case "chain":
                raise self.replace(plus.s(x, 100) | plus.s(1000))
            case "chord":
                raise self.replace(chord([plus.s(x, 1), plus.s(x, 2)], sums.s()))
            case "group":
                raise self.replace(group(plus.s(x, 1), plus.s(x, 2)))
            case _:
                return x

    @task("countdown", bind=True)
    def countdown(self: Task, n: int, seen: int = 0) -> int:
        ran(self, n)
        if n:
            raise self.replace(self.s(n - 1, seen + 1))
        return seen


def _declare_reliable(app: Celery) -> None:
    """Tasks with nothing plain to compare with."""

    def task(name: str, **options: Any) -> Callable[..., Any]:
        return app.task(name=name, base=ReliableTask, shared=False, bind=True, **options)

    @task("long")
    def long(self: ReliableTask, seconds: float) -> int:
        app.notes.add("ran", self.request.id, "long", self.custody.attempt, self.custody.crashes)
        time.sleep(seconds)
        return self.custody.crashes

    @task("once", idempotency_key="once:{n}")
    def once(self: ReliableTask, n: int, seconds: float = 0.5) -> str:
        app.notes.add("ran", self.request.id, "once", n)
        time.sleep(seconds)
        return f"by {self.request.id}"

    @task("dying", max_crashes=2)
    def dying(self: ReliableTask) -> None:
        app.notes.add("ran", self.request.id, "dying")
        os.kill(os.getpid(), signal.SIGKILL)

    @task("crashing")
    def crashing(self: ReliableTask) -> None:
        app.notes.add("ran", self.request.id, "crashing")
        os.kill(os.getpid(), signal.SIGKILL)

    @task("outer")
    def outer(self: ReliableTask, own: float | None = None) -> tuple[float | None, str]:
        return self.remaining(), app.tasks["inner"].apply_async(deadline=own).id

    @task("inner")
    def inner(self: ReliableTask) -> float | None:
        return self.remaining()

    @task("single", unique_for=60, idempotency_key="single:{n}")
    def single(self: ReliableTask, n: int, how: str = "well") -> str:
        app.notes.add("ran", self.request.id, "single", n)
        if how == "fail":
            raise ValueError("no such card")
        return self.request.id


def stutter() -> None:
    """From now on every task message of this process is published twice, as after a lost reply."""
    publish = Producer.publish

    def twice(self: Producer, *args: Any, **options: Any) -> Any:
        own = options.get("headers") or {}
        if str(own.get("task", "")).startswith(("reliable.", "keyed.")):
            publish(self, *args, **options)
        return publish(self, *args, **options)

    Producer.publish = twice


class Workshop:
    """One namespace on one broker and store: a producer, workers, and what they did."""

    def __init__(self, *, broker: str, notes: str, store: str, namespace: str, directory: Path, **env: str) -> None:
        self.directory = directory
        self.environ = {
            "TEST_BROKER": broker,
            "TEST_NOTES": notes,
            "TEST_JOURNAL": notes,
            "TEST_NAMESPACE": namespace,
            "TASKGUARD_STORE": store,
            "TASKGUARD_NAMESPACE": namespace,
            **env,
        }
        self.app = make_app(self.environ | {"TEST_INSTALL": json.dumps({"store": store, "namespace": namespace})})
        self.workers: list[subprocess.Popen[bytes]] = []
        self.compared: list[tuple[Any, Any]] = []
        """Workflows that ran the same bodies, of plain tasks and of others."""

    def __getattr__(self, kind: str) -> SimpleNamespace:
        """The tasks of a kind: ``workshop.plain.add``."""
        prefix = f"{kind}."
        return SimpleNamespace(**{n.removeprefix(prefix): t for n, t in self.app.tasks.items() if n.startswith(prefix)})

    def start(self, pool: str = "prefork", *, concurrency: int = 2, wait: bool = True, **env: str) -> int:
        """Start a worker; returns its number. With *wait*, it consumes when this returns."""
        number = len(self.workers)
        command = [sys.executable, "-m", "celery", "-A", "tests.integration.workshop", "worker", "-l", "INFO"]
        command += ["-P", pool, "-c", str(concurrency), "-n", f"w{number}@test"]
        command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        with self.log(number).open("wb") as sink:
            environ = {**os.environ, **self.environ, **env}
            self.workers.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environ,
                    stdout=sink,
                    stderr=sink,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
        if wait:
            self.wait(lambda: " ready." in self.said(number) or self.workers[number].poll() is not None, "ready")
            assert self.workers[number].poll() is None, self.said(number)
        return number

    def log(self, number: int) -> Path:
        """Where a worker writes."""
        return self.directory / f"w{number}.log"

    def said(self, number: int) -> str:
        """What a worker wrote."""
        return self.log(number).read_text(errors="replace")

    def keep(self, number: int, stop: threading.Event, **env: str) -> threading.Thread:
        """Start *number* workers, and start again whoever dies until *stop* is set."""

        def supervise() -> None:
            kept = [self.start(wait=False, **env) for _ in range(number)]
            while not stop.wait(0.05):
                for place, worker in enumerate(kept):
                    if self.workers[worker].poll() is not None:
                        kept[place] = self.start(wait=False, **env)

        supervisor = threading.Thread(target=supervise, name="supervisor", daemon=True)
        supervisor.start()
        self.wait(lambda: sum(" ready." in self.said(each) for each in range(len(self.workers))) >= number, "ready")
        return supervisor

    def kill(self, number: int) -> None:
        """SIGKILL a worker and its children."""
        worker = self.workers[number]
        if worker.poll() is None:
            tree = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)]
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait(PATIENCE)
            assert not psutil.wait_procs(tree, timeout=PATIENCE)[1]

    def close(self) -> None:
        """End every worker, warmly first, so that it can say what it covered."""
        for worker in self.workers:
            if worker.poll() is None:
                worker.terminate()
        for number, worker in enumerate(self.workers):
            try:
                worker.wait(15)
            except subprocess.TimeoutExpired:
                self.kill(number)
        self.app.notes.close()
        self.app.taskguard.store.close()

    def wait(self, condition: Callable[[], Any], what: str, *, timeout: float = PATIENCE) -> None:
        """Wait until *condition* is true; fail with the workers' logs otherwise. Processes tell nobody."""
        until = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > until:
                logs = "\n".join(self.said(number)[-3000:] for number in range(len(self.workers)))
                raise AssertionError(f"not within {timeout:g} s: {what}\n{self.app.notes.all()[-20:]}\n{logs}")
            time.sleep(0.03)

    def wait_ready(self, result: Any) -> Any:
        """Wait for the end of a task. Returns its result."""
        self.wait(result.ready, f"{result!r} ready")
        return result

    def wait_settled(self) -> None:
        """Wait until nothing runs or waits in the store."""
        busy = (State.PENDING, State.RUNNING, State.PUBLISHED)
        store = self.app.taskguard.store
        self.wait(lambda: not any(store.depths()[state].count for state in busy), "nothing under way")

    def wait_idle(self) -> None:
        """Wait until no message is queued, and nothing has run between two looks that found none."""
        queue, seen = self.app.conf.task_default_queue, [-1]
        on_redis = self.environ["TEST_BROKER"].startswith("redis")  # where an empty queue is none

        def idle() -> bool:
            before, seen[0] = seen[0], len(self.app.notes.all())
            with self.app.connection_for_read() as connection, connection.channel() as channel:
                queued = channel.queue_declare(queue, passive=not on_redis).message_count
            return not queued and before == seen[0]

        self.wait(idle, "an empty queue")
        self.wait_settled()

    def runs(self, result: Any) -> list[list[Any]]:
        """The notes of one task id."""
        return [note for note in self.app.notes.all() if note[:2] == ["ran", result.id]]

    def letter(self, result: Any) -> Any:
        """The dead letter of a task."""
        letters = [each for each in DeadLetters(self.app.taskguard.store).select() if each.record.task_id == result.id]
        assert len(letters) == 1
        return letters[0]


if "TEST_NAMESPACE" in os.environ:
    if os.environ.get("TEST_STUTTER"):
        stutter()
    app = make_app(os.environ)
