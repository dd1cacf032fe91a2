"""One side of one setting, measured with a real worker: what it does in a second, and what that costs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from redis import Redis

from taskguard.celery.publishing import capturing
from taskguard.celery.runtime import new_holder
from taskguard.stores import open_store
from tests import services
from tests.benchmarks.app import TASKGUARD, make_app

ROOT = Path(__file__).parents[2]
WARM_UP = 300
"""Tasks before the first mark: connections, imports, caches."""
PATIENCE = 120.0


@dataclass(frozen=True, slots=True)
class Setting:
    """Which servers and which pool. ``floor``: the ratio to stock that is promised."""

    name: str
    broker: str = "redis"
    store: str = "redis"
    backend: bool = False
    floor: float = 0.9


@dataclass(frozen=True, slots=True)
class Sample:
    """One drain. For each task, ``main`` and ``children``: CPU milliseconds; ``reads``: round trips to Redis."""

    rate: float
    main: float
    children: float
    reads: float


@dataclass(frozen=True, slots=True)
class Rest:
    """An idle worker: CPU in percent of a core, memory of its whole process tree in MB (proportional shares)."""

    cpu: float
    memory: float


class Bench:
    """The servers of one setting, and fresh queues for every drain."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.marks = services.require("redis")

    @contextmanager
    def _worker(self, side: str) -> Iterator[tuple[dict[str, str], list[subprocess.Popen[bytes]]]]:
        """A namespace of its own for *side*: its environment, and the list of its workers, which end with the block."""
        namespace = f"b{uuid.uuid4().hex[:12]}"
        workers: list[subprocess.Popen[bytes]] = []
        with ExitStack() as stack:
            stack.callback(services.delete_redis_keys, self.marks, f"*{namespace}*")
            broker = services.require(self.setting.broker)
            if self.setting.broker == "rabbitmq":
                broker = stack.enter_context(services.rabbitmq_vhost(broker, namespace))
            store = self._store(stack, namespace)
            environ = {
                "BENCH_SIDE": side,
                "BENCH_NAMESPACE": namespace,
                "BENCH_BROKER": broker,
                "BENCH_STORE": store,
                "BENCH_BACKEND": services.require("redis") if self.setting.backend else "",
                "BENCH_MARKS": self.marks,
            }
            try:
                yield environ, workers
            finally:
                for worker in workers:
                    _end(worker)

    def _store(self, stack: ExitStack, namespace: str) -> str:
        if self.setting.store == "sqlite":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            return f"sqlite:///{folder}/taskguard.sqlite3"
        url = services.require(self.setting.store)
        if self.setting.store != "redis":
            stack.callback(services.delete_rows, url, namespace)
        return url

    def drain(self, side: str, tasks: int) -> Sample:
        """*tasks* no-ops are waiting when the worker starts; measured from the end of the warm-up to the last."""
        with self._worker(side) as (environ, workers), Redis.from_url(self.marks, socket_timeout=None) as redis:
            with make_app(environ) as app, app.connection_for_write() as connection:
                producer = app.amqp.Producer(connection)
                noop, mark = app.tasks["noop"], app.tasks["mark"]
                for send in [noop] * WARM_UP:
                    send.apply_async(producer=producer)
                mark.apply_async(("begin",), producer=producer)
                for send in [noop] * tasks:
                    send.apply_async(producer=producer)
                mark.apply_async(("end",), producer=producer)
            workers.append(_start(environ))
            begin = _marked(redis, environ, "begin")
            before, reads = _cpu(workers[0].pid), _reads(redis)
            end = _marked(redis, environ, "end")
            after = _cpu(workers[0].pid)
            main, children = (1000 * (late - early) / tasks for early, late in zip(before, after, strict=True))
            return Sample(tasks / (end - begin), main, children, (_reads(redis) - reads) / tasks)

    def rest(self, side: str, seconds: float) -> Rest:
        """A worker with nothing to do."""
        with self._worker(side) as (environ, workers), Redis.from_url(self.marks, socket_timeout=None) as redis:
            with make_app(environ) as app:
                for _ in range(WARM_UP):
                    app.tasks["noop"].apply_async()
                app.tasks["mark"].apply_async(("end",))
            workers.append(_start(environ))
            _marked(redis, environ, "end")
            tree = _tree(workers[0].pid)
            before = sum(_cpu(workers[0].pid))
            time.sleep(seconds)
            cpu = (sum(_cpu(workers[0].pid)) - before) / seconds * 100
            return Rest(cpu, sum(process.memory_full_info().pss for process in tree) / 1e6)

    def custody(self, runs: int = 200) -> tuple[float, float]:
        """Redis keys and bytes that one running task costs beside its message, the indexes' share included."""
        with self._worker(TASKGUARD) as (environ, _), Redis.from_url(self.marks) as redis:
            namespace = environ["BENCH_NAMESPACE"]
            store = open_store(self.marks, namespace=namespace)
            with make_app(environ) as app:
                for _ in range(runs):
                    with capturing() as captured:
                        app.tasks["noop"].apply_async()
                    holder = new_holder("celery@worker-1")
                    store.claim(captured.envelopes[0], holder=holder, lease=15.0, max_crashes=3)
            store.close()
            keys = list(redis.scan_iter(f"*{namespace}*", count=1000))
            used = sum(redis.memory_usage(key, samples=0) or 0 for key in keys)
            messages = sum(redis.strlen(key) for key in keys if b":wire:" in key)
            return len(keys) / runs, (used - messages) / runs


def _start(environ: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "celery", "-A", "tests.benchmarks.app", "worker", "--concurrency", "2"]
    command += ["--loglevel", "ERROR", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environ}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if not os.environ.get("BENCH_LOG") else None, start_new_session=True,
    )  # fmt: skip


def _end(worker: subprocess.Popen[bytes]) -> None:
    tree = _tree(worker.pid)
    for process in tree:
        process.kill()
    worker.wait(timeout=PATIENCE)
    psutil.wait_procs(tree, timeout=PATIENCE)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _cpu(pid: int) -> tuple[float, float]:
    """CPU seconds so far: of the parent, of all its children. To the nanosecond, for an idle worker uses little."""
    own, *children = (_cpu_of(process.pid) for process in _tree(pid))
    return own, sum(children)


def _cpu_of(pid: int) -> float:
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(each.read_text().split()[0]) for each in tasks) / 1e9


def _reads(redis: Redis) -> int:
    return int(redis.info("stats")["total_reads_processed"])


def _marked(redis: Redis, environ: dict[str, str], name: str) -> float:
    found = redis.blpop([f"{environ['BENCH_NAMESPACE']}.marks"], timeout=PATIENCE)
    if found is None:
        raise RuntimeError(f"no mark {name!r} within {PATIENCE:g} s; BENCH_LOG=1 shows the workers' errors")
    said, at = found[1].decode().split()
    assert said == name, said
    return float(at)
