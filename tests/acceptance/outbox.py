"""From the producer's commit to the consumer's, while everything in between is killed.

``python -m tests.acceptance.outbox --orders 20000``: 4 producers place orders, half of them rolled back; two relays and
two workers; relays, workers and the broker are SIGKILLed at random, and started again. In the end exactly the committed
orders are done, each once, and the messages of each customer were published in the order of his orders.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, select
from sqlalchemy.schema import CreateTable, DropTable

from taskguard.envelope import record_id
from tests import services
from tests.acceptance.outboxapp import make_app, orders_of
from tests.integration.crew import Relay
from tests.integration.servers import PrivateRedis
from tests.integration.site import ROOT, Site, Worker
from tests.proof.rabbitmq import PrivateRabbitMQ

PAIRS = (("rabbitmq", "postgresql"), ("redis", "mariadb"))
PRODUCERS = 4
VICTIMS = ("relay", "worker", "broker")
STALL = 120.0
"""Seconds without a single order done after which the scene has failed."""

Order = tuple[str, int]


@dataclass(slots=True)
class Outcome:
    """How a scene ended. *flaws* says what should not be; it is empty."""

    broker: str
    store: str
    seed: int
    orders: int
    committed: int = 0
    done: int = 0
    published: int = 0
    """Of the messages that show the order, with those that a relay published a second time."""
    killed: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    flaws: list[str] = field(default_factory=list)

    def shown(self) -> str:
        """A line for people."""
        killed = ", ".join(f"{number} {what}" for what, number in sorted(self.killed.items()))
        verdict = "; ".join(self.flaws) or "each once, in order"
        return (
            f"{self.broker} and {self.store}, seed {self.seed}: {self.orders} orders, {self.committed} committed, "
            f"{self.done} done; killed {killed}; {self.published - self.committed} published again; "
            f"{self.seconds:.0f} s: {verdict}"
        )


class Scene(Site):
    """Two relays and two workers, on a broker of their own."""

    program = "tests.acceptance.outboxapp"
    _make_app = staticmethod(make_app)

    def __init__(self, server: PrivateRedis | PrivateRabbitMQ, **options: Any) -> None:
        super().__init__(broker=server.url, TASKGUARD_RELAY="0", **options)
        self._server = server
        self._named = 0
        self.crew: dict[str, list[Worker]] = {"relay": [], "worker": []}

    def start(self, kind: str) -> Worker:
        """Another one of the crew."""
        self._named += 1
        name = f"{kind}{self._named}"
        log = self._directory / f"{name}.log"
        made: Worker
        if kind == "relay":
            made = Relay(name, self.environ(), log, program=self.program)
        else:
            made = Worker(name, self.environ(), log, program=self.program, pool="prefork", concurrency=2)
        self.workers.append(made)
        self.crew[kind].append(made)
        return made

    def kill_one(self, kind: str, chance: random.Random) -> None:
        """SIGKILL, and start again."""
        if kind == "broker":
            self._server.kill()
            self._server.start()
            return
        victim = chance.choice(self.crew[kind])
        self.crew[kind].remove(victim)
        os.killpg(victim.process.pid, signal.SIGKILL)
        self.start(kind)

    def revive(self) -> None:
        """What has ended by itself is started again, as a supervisor does."""
        for kind, members in self.crew.items():
            for member in list(members):
                if not member.alive:
                    members.remove(member)
                    self.start(kind)

    def stuck(self, orders: set[Order]) -> str:
        """Where the first of these is, by the store and the broker, and what the workers do."""
        records = [
            self.store.find(record_id("fulfil", f"{customer}:{number}")) for customer, number in sorted(orders)[:3]
        ]
        hidden = f", {self.unacknowledged()} unacknowledged" if self.broker.startswith("redis") else ""
        doing = "\n".join(f"{worker.name}: {worker.stacks()}" for worker in self.crew["worker"] if worker.alive)
        return f"{len(orders)} left, records {records}{hidden}\n{doing}"

    def published(self) -> list[Order]:
        """The messages that nobody consumed, in the order in which they were published."""
        found: list[Order] = []
        queue = self.app.amqp.queues.select_add(f"{self.namespace}.audit")
        with self.app.connection_for_read() as connection, connection.channel() as channel:
            bound = queue.bind(channel)
            bound.declare()
            while (message := bound.get()) is not None:
                kwargs = json.loads(message.body)[1]
                found.append((kwargs["customer"], kwargs["number"]))
                message.ack()
        return found


def play(broker: str, store: str, *, orders: int, seed: int, directory: Path, faults: int) -> Outcome:
    """One scene."""
    chance = random.Random(seed)
    outcome = Outcome(broker, store, seed, orders)
    namespace = f"t{uuid.uuid4().hex[:16]}"
    url, journal = services.require(store), services.require("redis")
    with ExitStack() as stack:
        server = PrivateRedis(directory / "redis") if broker == "redis" else PrivateRabbitMQ(directory / "rabbitmq")
        stack.enter_context(server)
        stack.callback(services.delete_redis_keys, journal, f"*{namespace}*")
        stack.callback(services.delete_rows, url, namespace)
        scene = Scene(server, store=url, journal=journal, namespace=namespace, directory=directory)
        tables = orders_of(namespace)
        engine = create_engine(url)
        stack.callback(engine.dispose)
        with engine.begin() as connection:
            for table in tables:
                connection.execute(CreateTable(table))

        def drop() -> None:
            with engine.begin() as connection:
                for table in tables:
                    connection.execute(DropTable(table))

        stack.callback(drop)
        stack.callback(scene.close)

        def rows(table: Any) -> list[Order]:
            with engine.connect() as connection:
                return [tuple(row) for row in connection.execute(select(table.c.customer, table.c.number))]  # type: ignore[misc]

        placed, done = tables
        scene.store.ping()
        for kind in ("relay", "worker") * 2:
            scene.start(kind)
        began = time.monotonic()
        producers = [_producer(scene, number, orders // PRODUCERS, seed) for number in range(PRODUCERS)]
        stack.callback(_end, producers)
        plan = [*VICTIMS, *chance.choices(VICTIMS, k=max(0, faults - len(VICTIMS)))]
        chance.shuffle(plan)
        marks = sorted(chance.randrange(orders // 50, orders * 9 // 20) for _ in plan)
        reached, moved = -1, time.monotonic()
        while True:
            scene.revive()
            now_done = len(rows(done))
            if now_done != reached:
                reached, moved = now_done, time.monotonic()
            if plan and reached >= marks[0]:
                victim = plan.pop()
                marks.pop(0)
                scene.kill_one(victim, chance)
                outcome.killed[victim] += 1
            ended = all(each.poll() is not None for each in producers)
            if ended and not plan and set(rows(placed)) <= set(rows(done)):
                break
            if time.monotonic() - moved > STALL:
                outcome.flaws.append(
                    f"nothing was done for {STALL:g} s: {scene.stuck(set(rows(placed)) - set(rows(done)))}"
                )
                break
            time.sleep(0.1 if orders < 5000 else 0.5)  # how often a supervisor looks
        outcome.seconds = time.monotonic() - began
        outcome.flaws += [f"producer ended with {each.returncode}" for each in producers if each.returncode]
        if not outcome.flaws:
            scene.wait(lambda: scene.store.outbox.status().waiting == 0, "an empty outbox")  # type: ignore[attr-defined]
            scene.wait_settled()
        scene.kill_all()
        _judge(outcome, rows(placed), rows(done), scene.published())
    return outcome


def _producer(scene: Scene, number: int, orders: int, seed: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.acceptance.outboxapp", f"p{number}", str(orders), str(seed)]
    with (scene._directory / f"producer{number}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env=scene.environ(), stdout=log, stderr=log)


def _end(producers: list[subprocess.Popen[bytes]]) -> None:
    for each in producers:
        with suppress(ProcessLookupError):
            each.kill()
        each.wait()


def _judge(outcome: Outcome, placed: list[Order], done: list[Order], published: list[Order]) -> None:
    outcome.committed, outcome.done, outcome.published = len(placed), len(done), len(published)
    times = Counter(done)
    for what, wrong in (
        ("committed and not done", set(placed) - times.keys()),
        ("done and not committed", times.keys() - set(placed)),
        ("done more than once", {order for order, number in times.items() if number > 1}),
        ("committed and not published", set(placed) - set(published)),
        ("published and not committed", set(published) - set(placed)),
    ):
        if wrong:
            outcome.flaws.append(f"{len(wrong)} {what}, such as {sorted(wrong)[:3]}")
    first: dict[str, list[int]] = {}
    for customer, number in dict.fromkeys(published):  # what a killed relay published twice counts where it came first
        first.setdefault(customer, []).append(number)
    out_of_order = [customer for customer, numbers in first.items() if numbers != sorted(numbers)]
    if out_of_order:
        outcome.flaws.append(f"out of order: {out_of_order[:3]}")


def main() -> int:
    """Play every pair, and say how it ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--orders", type=int, default=20000)
    parser.add_argument("--faults", type=int, default=24)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--only", choices=[f"{broker}-{store}" for broker, store in PAIRS])
    given = parser.parse_args()
    flaws = 0
    for broker, store in PAIRS:
        if given.only in (None, f"{broker}-{store}"):
            with tempfile.TemporaryDirectory(prefix="taskguard-outbox-") as directory:
                outcome = play(
                    broker, store, orders=given.orders, seed=given.seed, directory=Path(directory), faults=given.faults
                )
            print(outcome.shown(), flush=True)
            flaws += len(outcome.flaws)
    return 1 if flaws else 0


if __name__ == "__main__":
    raise SystemExit(main())
