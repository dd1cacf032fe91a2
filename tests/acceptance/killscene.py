"""Two workers at work, one of which is SIGKILLed with all its children now and then, and replaced at once."""

from __future__ import annotations

import json
import math
import random
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import Any

from redis import Redis

from taskguard.envelope import record_id
from taskguard.record import Record, State
from tests.acceptance import killapp
from tests.acceptance.killapp import KEY, TASK
from tests.integration.journal import Deadline, Entry
from tests.integration.site import Site, Worker

CONCURRENCY = 4
WINDOW = CONCURRENCY + 2
"""Tasks under way for each worker at work. More are not sent, so that the recovery of a task is the time it takes to be
found and started, and not the length of a queue."""
RESERVE = 60
"""Tasks kept for each kill still to come, so that it meets a worker with its hands full."""
SEND_PATIENCE = 240.0
"""Seconds in which all is sent and every kill has come."""
PATIENCE = 60.0
"""Seconds in which all must be done after the last task was sent; what stock has not done by then, it hides."""


@dataclass(frozen=True, slots=True)
class Kill:
    """A worker's death, begun at this instant."""

    worker: str
    at: float


class Scene(Site):
    """A site with two workers at work, one of which dies now and then."""

    program = killapp.__name__
    _make_app = staticmethod(killapp.make_app)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._lines = Redis.from_url(options["journal"], decode_responses=True)
        self.book: list[Entry] = []
        self.done: set[str] = set()
        self._ready: set[str] = set()
        self._holder: dict[str, str] = {}
        self._buried: set[str] = set()
        self.sent: dict[str, int] = {}
        self.sent_at: dict[str, float] = {}
        self.kills: list[Kill] = []

    def close(self) -> None:
        """End what was started."""
        super().close()
        self._lines.close()

    def read(self) -> list[Entry]:
        """What was written since the last reading, which is all in `book`."""
        lines = self._lines.lrange(f"{self.namespace}:journal", len(self.book), -1)
        new = [Entry(**json.loads(line)) for line in lines]
        self.book += new
        for entry in new:
            match entry.what:
                case "completed":
                    self.done.add(entry.task_id)
                case "ready":
                    self._ready.add(entry.name.partition("@")[0])
                case "received":
                    self._holder[entry.task_id] = entry.name
                    self._buried.discard(entry.task_id)
        return new

    def hire(self) -> None:
        """Start a worker; it is ready when it says so."""
        name = f"w{len(self.workers) + 1}"
        self.workers.append(
            Worker(
                name,
                self.environ(),
                self._directory / f"{name}.log",
                program=self.program,
                pool="prefork",
                concurrency=CONCURRENCY,
            )
        )

    def at_work(self) -> list[Worker]:
        """The living workers that consume."""
        return [worker for worker in self.workers if worker.alive and worker.name in self._ready]

    def hands_full(self) -> list[Worker]:
        """The workers at work that have more than one task."""
        held = Counter(holder for id, holder in self._holder.items() if id not in self.done)
        return [worker for worker in self.at_work() if held[f"{worker.name}@test"] > 1]

    def strike(self, victim: Worker) -> None:
        """SIGKILL a worker and start another at once."""
        name = f"{victim.name}@test"
        self.kills.append(Kill(name, time.time()))
        victim.kill()
        self.read()
        self._buried |= {id for id, holder in self._holder.items() if holder == name} - self.done
        self.hire()

    def play(self, seed: int, *, tasks: int, kills: int) -> None:
        """Send, kill, and wait for the end; or, for stock, for as long as the patience lasts."""
        chance = random.Random(seed)
        lengths = random.Random(seed + 1)
        due = draw_kills(chance, tasks, kills)
        strike_at = math.inf
        for _ in range(2):
            self.hire()
        self.wait(lambda: self.read() is not None and len(self.at_work()) == 2, "two workers at work")
        limit = time.monotonic() + SEND_PATIENCE
        while len(self.sent) < tasks or due or strike_at < math.inf:
            self.read()
            staff = len(self.at_work())
            if due and strike_at == math.inf and staff == 2 and len(self.sent) >= due[0].after:
                strike_at = time.monotonic() + due.pop(0).pause
            may_send = len(self.sent) < tasks - RESERVE * len(due)
            if time.monotonic() >= strike_at and (victims := self.hands_full() if may_send else self.at_work()):
                strike_at = math.inf
                self.strike(chance.choice(victims))
            elif may_send and self._under_way() < WINDOW * staff:
                self._send_next(lengths)
            else:
                time.sleep(0.01)
            if time.monotonic() > limit:
                self.fail(f"sent {len(self.sent)} tasks and killed {len(self.kills)} workers in {SEND_PATIENCE:g} s")
        Deadline.after(PATIENCE).reached(self._finished)

    def _send_next(self, chance: random.Random) -> None:
        number, before, after = len(self.sent), chance.uniform(0.02, 0.1), chance.uniform(0.02, 0.1)
        task_id = f"{number:04}-{uuid.UUID(int=chance.getrandbits(128))}"
        self.sent_at[task_id] = time.time()
        self.send(TASK, number, before, after, task_id=task_id)
        self.sent[task_id] = number

    def _under_way(self) -> int:
        """How many tasks the living have before them."""
        return len(self.sent) - len(self.done | self._buried)

    def _finished(self) -> bool:
        self.read()
        if hasattr(self.app, "taskguard"):
            return self.store.depths()[State.DONE].count == len(self.sent)
        return len(self.done) == len(self.sent)

    def wait_idle(self) -> None:
        """Wait until nothing is under way that could still run: not in the store, and not at the broker."""
        self.wait_settled()
        self.wait(lambda: not self._at_broker(), "an empty broker")

    def _at_broker(self) -> int:
        if self.broker.startswith("redis"):
            return self.queued()
        with self._connection.channel() as channel:
            return int(channel.queue_declare(self.queue, passive=True).message_count)

    def records(self) -> dict[str, Record | None]:
        """The store's records, by task id."""
        return {id: self.store.find(record_id(TASK, KEY.format(number=n))) for id, n in self.sent.items()}


@dataclass(frozen=True, slots=True)
class Draw:
    """A kill to come: when so many tasks were sent and both workers are at work, after a pause in seconds."""

    after: int
    pause: float


def draw_kills(chance: random.Random, tasks: int, kills: int) -> list[Draw]:
    """Kills at random instants, in the order in which they come."""
    counts = sorted(chance.randrange(WINDOW * 2, tasks - RESERVE * kills) for _ in range(kills))
    return [Draw(count, chance.uniform(0.0, 1.0)) for count in counts]
