"""The outbox: what a send costs a transaction, and what a relay moves, beside the raw floor and django-celery-outbox.

All sides take turns in one run, on a database made for it; the ratios are medians of each turn's. The floor is the
least that could be done: DELETE … RETURNING and one LPUSH of the same finished items.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import psycopg
from celery import Celery
from redis import Redis
from sqlalchemy import Engine, create_engine, make_url, text

from taskguard import ReliableTask, install
from taskguard.celery.composing import compose
from taskguard.celery.worker import make_relay
from taskguard.envelope import ready_item
from taskguard.stores.sql import SQLStore
from taskguard.stores.sql.outgoing import insertion, parameters
from taskguard.stores.sql.schema import messages
from tests import services
from tests.benchmarks.outboxturns import Spent, in_turns

ROOT = Path(__file__).parents[2]
CARD = "x" * 50
ORDER = text("INSERT INTO bench_orders (number, card) VALUES (:n, :c)")
FLOOR = """DELETE FROM taskguard_messages WHERE ctid = ANY(ARRAY(SELECT ctid FROM taskguard_messages
    WHERE namespace = %s ORDER BY due_at LIMIT 500 FOR UPDATE SKIP LOCKED)) RETURNING wire"""


def make_app(environ: dict[str, str]) -> Celery:
    """The producer's application, its relay's and its worker's."""
    namespace = environ["BENCH_NAMESPACE"]
    app = Celery("outbox", broker=environ["BENCH_BROKER"], set_as_current=False)
    app.conf.update(task_default_queue=namespace, worker_hijack_root_logger=False, task_ignore_result=True)
    install(app, store=environ["BENCH_DATABASE"], namespace=namespace, relay=False)

    @app.task(name="charge", base=ReliableTask, shared=False, ignore_result=True)  # type: ignore[untyped-decorator]
    def charge(order_id: int, card: str) -> None:
        """Nothing."""

    @app.task(name="mark", base=ReliableTask, shared=False, ignore_result=True)  # type: ignore[untyped-decorator]
    def mark() -> None:
        started_at = time.time()
        with Redis.from_url(environ["BENCH_MARKS"]) as client:
            client.rpush(f"{namespace}.marks", started_at)

    return app


class OutboxBench:
    """A database of its own, and a queue on each broker."""

    def __init__(self, database: str, broker: str) -> None:
        self.namespace = f"b{uuid.uuid4().hex[:12]}"
        self.marks = services.require("redis")
        self.environ = {
            "BENCH_DATABASE": database,
            "BENCH_BROKER": broker,
            "BENCH_NAMESPACE": self.namespace,
            "BENCH_MARKS": self.marks,
        }
        self.app = make_app(self.environ)
        self.store = SQLStore.from_url(database, namespace=self.namespace)
        self.store.ping()
        self.engine: Engine = create_engine(database)
        with self.engine.begin() as connection:
            connection.execute(text("CREATE TABLE IF NOT EXISTS bench_orders (number INT, card TEXT)"))

    def close(self) -> None:
        """Delete the queue and give connections back."""
        services.delete_queue(self.environ["BENCH_BROKER"], self.namespace)
        services.delete_redis_keys(self.marks, f"*{self.namespace}*")
        self.store.close()
        self.app.taskguard.store.close()
        self.app.close()
        self.engine.dispose()

    # -- the relay --------------------------------------------------------------------------------------------------

    def fill(self, count: int) -> None:
        """So many rows, as a producer leaves them."""
        charge, given = self.app.tasks["charge"], []
        for number in range(count):
            send = (number,), {"card": CARD}
            _, composed = compose(self.app, lambda producer, send=send: charge.apply_async(*send, producer=producer))
            given += [
                parameters(
                    each.envelope, namespace=self.namespace, wire=each.wire, due_at_ms=None, ordering="", step=number,
                    kind="postgresql", tells=False,
                )
                for each in composed
            ]  # fmt: skip
        with self.engine.begin() as connection:
            connection.execute(insertion("postgresql", tells=False), given)
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE taskguard_messages"))

    def relay(self, count: int) -> float:
        """Messages a second of one relay."""
        self.fill(count)
        relaying = make_relay(self.app, store=self.store)
        relaying.hand_over()
        moved, started = 0, time.perf_counter()
        while taken := relaying.hand_over():
            moved += taken
        return moved / (time.perf_counter() - started)

    def floor(self, count: int) -> float:
        """Messages a second where nothing is done but what must be."""
        self.fill(count)
        url = make_url(self.environ["BENCH_DATABASE"])
        where = {"host": url.host, "port": url.port, "user": url.username, "dbname": url.database}
        with psycopg.connect(**where) as connection, Redis.from_url(self.environ["BENCH_BROKER"]) as redis:  # type: ignore[arg-type]
            with self.engine.begin() as other:
                rows = other.execute(
                    text("SELECT id, wire FROM taskguard_messages WHERE namespace = :n"), {"n": self.namespace}
                )
                items = [
                    {"n": self.namespace, "i": id, "w": (ready_item(bytes(wire)) or (b"", b""))[1]} for id, wire in rows
                ]
                other.execute(text("UPDATE taskguard_messages SET wire = :w WHERE namespace = :n AND id = :i"), items)
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as autocommit:
                autocommit.execute(text("VACUUM FULL ANALYZE taskguard_messages"))
            cursor, moved, started = connection.cursor(binary=True), 0, time.perf_counter()
            while items_taken := cursor.execute(FLOOR, (self.namespace,)).fetchall():
                redis.lpush(self.namespace, *[item for (item,) in items_taken])
                connection.commit()
                moved += len(items_taken)
            return moved / (time.perf_counter() - started)

    def two_relays(self, count: int) -> tuple[float, int]:
        """Messages a second of two relay processes together, and how many messages came twice."""
        self.purge()
        self.fill(count)
        context = multiprocessing.get_context("spawn")
        barrier, spans = context.Barrier(2), context.Queue()
        relays = [context.Process(target=_drain, args=(self.environ, barrier, spans)) for _ in range(2)]
        for relay in relays:
            relay.start()
        measured = [spans.get(timeout=120) for _ in relays]
        for relay in relays:
            relay.join()
        seconds = max(end for _, end in measured) - min(begin for begin, _ in measured)
        return count / seconds, self.queued() - count

    def queued(self) -> int:
        """How many messages the broker has."""
        with self.app.connection_for_read() as connection, connection.channel() as channel:
            return int(self.app.amqp.queues[self.namespace](channel).queue_declare(passive=True).message_count)

    def purge(self) -> None:
        """Empty the queue."""
        with self.app.connection_for_read() as connection, connection.channel() as channel:
            queue = self.app.amqp.queues[self.namespace](channel)
            queue.declare()
            queue.purge()

    # -- the send ---------------------------------------------------------------------------------------------------

    def business(self, number: int, how: str = "outbox") -> None:
        """A business transaction: "bare", with an "outbox" row, or "after" it an apply_async."""
        charge = self.app.tasks["charge"]
        with self.engine.begin() as connection:
            connection.execute(ORDER, {"n": number, "c": CARD})
            if how == "outbox":
                charge.apply_async((number,), {"card": CARD}, session=connection)
        if how == "after":
            charge.apply_async((number,), {"card": CARD})

    def sends(self, count: int) -> dict[str, Spent]:
        """What each kind of `business` takes, in turns."""
        return in_turns({how: lambda n, how=how: self.business(n, how) for how in ("bare", "outbox", "after")}, count)

    def insert(self, count: int) -> float:
        """Transactions a second of one writer that sends."""
        started = time.perf_counter()
        for number in range(count):
            self.business(number)
        return count / (time.perf_counter() - started)

    # -- whole processes --------------------------------------------------------------------------------------------

    @contextmanager
    def process(self, *words: str) -> Iterator[psutil.Popen]:
        """A process of this application, which ends with the block."""
        process = psutil.Popen(
            [sys.executable, "-m", *words], cwd=ROOT, env={**os.environ, **self.environ},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=None if os.environ.get("BENCH_LOG") else subprocess.DEVNULL,
        )  # fmt: skip
        try:
            yield process
        finally:
            for each in (*process.children(recursive=True), process):
                each.kill()
            process.wait(timeout=30)

    def relaying(self) -> Any:
        """A relay process."""
        return self.process("taskguard", "-A", "tests.benchmarks.outbox", "outbox", "relay")

    def idle(self, seconds: float) -> float:
        """CPU of a relay with nothing to do, in percent of a core."""
        with self.relaying() as relay:
            self.business(1)
            self._until_empty()
            time.sleep(2)
            before = sum(relay.cpu_times()[:2])
            time.sleep(seconds)
            return float(sum(relay.cpu_times()[:2]) - before) / seconds * 100

    def memory(self, rows: int) -> tuple[float, float]:
        """Megabytes of a relay that drains so many rows: the most in its first fifth, and in its last tenth."""
        self.purge()
        self.fill(1000)
        names = [column.name for column in messages.columns]
        given = ", ".join("md5(id || n)" if name == "id" else name for name in names)
        table, mine = messages.name, {"n": self.namespace}
        more = f"INSERT INTO {table} ({', '.join(names)}) SELECT {given} FROM {table}, generate_series(2, :k) n"
        with self.engine.begin() as connection:
            connection.execute(text(f"{more} WHERE namespace = :n"), {"k": rows // 1000, **mine})
        used: list[float] = []
        moved, last_at = 0, time.monotonic()
        with self.relaying() as relay, Redis.from_url(self.environ["BENCH_BROKER"]) as redis:
            while moved < rows:
                with redis.pipeline() as pipeline:  # nobody consumes
                    came, _ = pipeline.llen(self.namespace).delete(self.namespace).execute()
                if came:
                    moved, last_at = moved + came, time.monotonic()
                    used.append(relay.memory_info().rss / 1e6)
                elif time.monotonic() - last_at > 60:
                    raise RuntimeError("the relay does not drain; BENCH_LOG=1 shows its errors")
                time.sleep(0.05)
        return max(used[: len(used) // 5 + 1]), max(used[-(len(used) // 10) - 1 :])

    def writers(self, count: int) -> tuple[float, float]:
        """Transactions a second of one writer that sends: with nobody relaying, and with a relay that drains."""
        alone = self.insert(count)
        with self.relaying():
            self._until_empty()
            return alone, self.insert(count)

    def latency(self, count: int) -> dict[str, list[float]]:
        """Milliseconds from a commit to the task's first line, by a direct apply_async and by an idle relay."""
        found: dict[str, list[float]] = {"direct": [], "outbox": []}
        worker = ("celery", "-A", "tests.benchmarks.outbox", "worker", "-c", "1", "-l", "ERROR", "--without-gossip")
        mark = self.app.tasks["mark"]
        self.purge()
        with self.process(*worker), self.relaying(), Redis.from_url(self.marks, socket_timeout=None) as redis:
            for number in range(2 * count + 20):
                how = "outbox" if number % 2 else "direct"
                with self.engine.begin() as connection:
                    connection.execute(ORDER, {"n": number, "c": CARD})
                    if how == "outbox":
                        mark.apply_async(session=connection)
                committed_at = time.time()
                if how == "direct":
                    mark.apply_async()
                answer = redis.blpop([f"{self.namespace}.marks"], timeout=60)
                if answer is None:
                    raise RuntimeError("no mark within 60 s; BENCH_LOG=1 shows the processes' errors")
                if number >= 20:
                    found[how].append(1000 * max(0.0, float(answer[1]) - committed_at))
                time.sleep(0.02)
        return found

    def _until_empty(self) -> None:
        until = time.monotonic() + 60
        while self.store.outbox.status().waiting:
            if time.monotonic() > until:
                raise RuntimeError("the relay does not drain; BENCH_LOG=1 shows its errors")
            time.sleep(0.05)

    def rival(self, verb: str, count: int) -> dict[str, Any]:
        """What django-celery-outbox does."""
        words = ["-m", "tests.benchmarks.outboxrival", verb, self.environ["BENCH_BROKER"], self.namespace, str(count)]
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env={**os.environ, **self.environ}, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"django-celery-outbox: {done.stderr[-1000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def _drain(environ: dict[str, str], barrier: Any, spans: Any) -> None:
    app = make_app(environ)
    store = SQLStore.from_url(environ["BENCH_DATABASE"], namespace=environ["BENCH_NAMESPACE"])
    relaying = make_relay(app, store=store)
    relaying._outbox_batch = relaying._outbox_limit = 1
    relaying.hand_over()
    relaying._outbox_batch = relaying._outbox_limit = 500
    barrier.wait(timeout=60)
    begin = time.time()
    end = begin
    while relaying.hand_over():
        end = time.time()
    spans.put((begin, end))


@contextmanager
def database() -> Iterator[str]:
    """A new database."""
    url, name = make_url(services.require("postgresql")), f"taskguard_bench_{uuid.uuid4().hex[:8]}"
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    try:
        yield url.set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
        engine.dispose()


if "BENCH_DATABASE" in os.environ and "BENCH_NAMESPACE" in os.environ:
    app = make_app(dict(os.environ))
