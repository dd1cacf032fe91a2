"""The scene of kills: a thousand tasks, two workers, and five times one of them is SIGKILLed with all its children.

`figures` plays it once, for taskguard or for stock Celery, and counts from the journal, the store and the broker. No
more is sent than the living can have before them, so that the recovery of a task is not the length of a queue. When a
kill falls, and on whom, is drawn by one seed.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from taskguard.record import State
from tests.acceptance.killapp import Side
from tests.acceptance.killscene import Kill, Scene
from tests.integration.conftest import open_site
from tests.integration.journal import Entry
from tests.proof import draw

BROKERS = ("redis", "rabbitmq")
STORES = ("redis", "postgresql")
TASKS = 1000
KILLS = 5
LEASE = 4.0
RECOVERY = 5.0
"""Seconds from a kill to the next start of what the killed worker held, at the 99th percentile."""
HICCUP = 1.0
"""The most that a machine on which any start takes long is allowed beside `RECOVERY`."""
PREFETCHES = (None, 4)
"""``worker_prefetch_multiplier``: the default, which leaves little unstarted, or more."""


@dataclass(slots=True, kw_only=True)
class Figures:
    """What became of the tasks of one scene.

    lost: neither completed, nor a dead letter, nor at the broker. hidden: at the broker when the patience ended.
    completed_twice: keys that were completed more than once. repeated: effects beyond the first of their key.
    started, prefetched: tasks that killed workers had begun, and only received. recovery: seconds from their kill to
    their next start, from the last where several killed workers had it one after the other; those that never started
    again are not in it. ordinary: seconds from sending to starting, at the
    99th percentile, of tasks that no killed worker held: what this machine asks for anyway. slow: what was written
    about tasks that took longer than `RECOVERY`. flaws: promises broken, in words.
    """

    side: Side
    broker: str
    store: str
    seed: int
    prefetch: int | None
    sent: int = 0
    kills: int = 0
    completed: int = 0
    completed_twice: int = 0
    dead: int = 0
    hidden: int = 0
    lost: int = 0
    effects: int = 0
    repeated: int = 0
    started: int = 0
    prefetched: int = 0
    recovery: list[float] = field(default_factory=list)
    ordinary: float = 0.0
    never_again: int = 0
    seconds: float = 0.0
    slow: list[str] = field(default_factory=list)
    flaws: list[str] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        """Of the recovery."""
        return nearest_rank(self.recovery, share)

    @property
    def recovery_allowed(self) -> float:
        """A machine on which any start may take long does not make a recovery quicker; a little of that is granted."""
        return RECOVERY + min(self.ordinary, HICCUP)

    def broken(self) -> list[str]:
        """The promises that did not hold, one line each; a scene in which no kill hurt proves nothing either."""
        promises = {
            f"{KILLS} kills under {TASKS} tasks": (self.sent, self.kills) == (TASKS, KILLS),
            "the kills hit workers with their hands full": self.started + self.prefetched > KILLS,
            "every task completes": self.completed == self.sent,
            "no key completes twice": self.completed_twice == 0,
            "nothing is lost, hidden or dead": self.lost == self.hidden == self.dead == 0,
            "what a killed worker held is started again": self.never_again == 0,
            "effects repeat only where a run was killed": self.repeated <= self.started,
            f"recovery within {self.recovery_allowed:.2f} s": self.percentile(0.99) <= self.recovery_allowed,
        }
        return [*self.flaws, *(f"not so: {promise}" for promise, holds in promises.items() if not holds)]

    def shown(self) -> str:
        """One line."""
        prefetch = "default prefetch" if self.prefetch is None else f"prefetch x{self.prefetch}"
        return (
            f"{self.side:9} {self.broker}-{self.store}, {prefetch}, seed {self.seed}: {self.kills} kills, "
            f"{self.completed} of {self.sent} completed, {self.completed_twice} twice, {self.lost} lost, "
            f"{self.hidden} hidden, {self.dead} dead, {self.effects} effects ({self.repeated} repeated); "
            f"held {self.started} started + {self.prefetched} prefetched, {self.never_again} never again; recovery "
            f"p50 {self.percentile(0.5):.2f} s, p99 {self.percentile(0.99):.2f} s, an ordinary start p99 "
            f"{self.ordinary:.2f} s; {self.seconds:.0f} s"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def nearest_rank(values: Iterable[float], share: float) -> float:
    """The percentile of *share*; not a number where there are no values."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)] if ranked else math.nan


def figures(
    broker: str,
    store: str,
    side: Side = "taskguard",
    *,
    seed: int,
    prefetch: int | None = None,
    tasks: int = TASKS,
    kills: int = KILLS,
    directory: Path | None = None,
) -> Figures:
    """Play the scene once and count. *prefetch*: ``worker_prefetch_multiplier``; None leaves each side its default."""
    began = time.monotonic()
    conf = {} if prefetch is None else {"worker_prefetch_multiplier": prefetch}
    with ExitStack() as stack:
        logs = directory or Path(stack.enter_context(TemporaryDirectory()))
        kind: Any = partial(Scene, lease=LEASE, TEST_SIDE=side, TEST_CONF=json.dumps(conf))
        scene: Any = open_site(stack, broker, store, logs, kind)
        scene.play(seed, tasks=tasks, kills=kills)
        told = Figures(side=side, broker=broker, store=store, seed=seed, prefetch=prefetch)
        _count(scene, told)
        told.seconds = time.monotonic() - began
        return told


def _count(scene: Scene, told: Figures) -> None:
    guarded = told.side == "taskguard"
    if guarded and len(scene.done) == len(scene.sent):
        scene.wait_idle()
    scene.kill_all()
    scene.read()
    told.sent, told.kills = len(scene.sent), len(scene.kills)
    account = Account(scene)
    completions = Counter(entry.task_id for entry in scene.book if entry.what == "completed")
    if guarded:
        done = {id for id, record in account.records.items() if record and record.state is State.DONE}
        told.dead = scene.store.depths()[State.DEAD].count
    else:
        done = {id for id in scene.sent if id in completions or scene.app.AsyncResult(id).successful()}
    told.completed = len(done)
    told.completed_twice = sum(1 for times in completions.values() if times > 1)
    left = told.sent - told.completed - told.dead
    told.hidden = min(left, scene.queued()) if left else 0
    told.lost = left - told.hidden
    told.effects = sum(map(len, account.effects.values()))
    told.repeated = told.effects - len(account.effects)
    held = set()
    for kill in scene.kills:
        for id, begun in account.held_by(kill):
            held.add(id)
            again = account.next_start(id, kill)
            if again is None and id in done:
                continue  # its run had completed, and was killed before it could say so
            told.started += begun
            told.prefetched += not begun
            if again is None:
                told.never_again += 1
            elif not account.held_again(id, kill, again):
                told.recovery.append(again - kill.at)
                if again - kill.at > RECOVERY:
                    told.slow += account.trail(id, kill)
    told.ordinary = account.ordinary(but=held)
    if guarded:
        told.flaws = account.flaws()


class Account:
    """What the journal and the store say about each task."""

    def __init__(self, scene: Scene) -> None:
        self.records = scene.records() if hasattr(scene.app, "taskguard") else {}
        self.effects: dict[str, list[Entry]] = defaultdict(list)
        self._of: dict[str, list[Entry]] = defaultdict(list)
        self._book, self._sent_at = scene.book, scene.sent_at
        self._killed = {kill.worker: kill.at for kill in scene.kills}
        self._workers: dict[int, str] = {}
        for entry in scene.book:
            if entry.name:
                self._workers[entry.pid] = entry.name
            if entry.what == "effect":
                self.effects[entry.task_id].append(entry)
            self._of[entry.task_id].append(entry)

    def held_by(self, kill: Kill) -> list[tuple[str, bool]]:
        """What a worker held when it was killed, and of each whether it had begun with it."""
        held = []
        for id, entries in self._of.items():
            steps = [entry.what for entry in entries if self._workers.get(entry.pid) == kill.worker]
            if "received" not in steps:
                continue
            since = steps[len(steps) - steps[::-1].index("received") :]
            if not {"completed", "discarded", "replayed"} & set(since):
                held.append((id, "entered" in since))
        return held

    def trail(self, id: str, kill: Kill) -> list[str]:
        """What was written about a task, and what stores and relays complained of, by seconds from the kill."""
        complaints = [e for e in self._book if e.what in ("store_unavailable", "relay_failed")]
        lines = sorted([*self._of[id], *complaints], key=lambda entry: entry.at)
        return [f"{id}, held by {kill.worker}:"] + [
            f"  {entry.at - kill.at:+.2f} {entry.what} {self._workers.get(entry.pid, entry.pid)} {entry.detail[:100]}"
            for entry in lines
            if -1 < entry.at - kill.at < 60
        ]

    def ordinary(self, but: Collection[str]) -> float:
        """The 99th percentile of the seconds between a task's sending and its first start, without some tasks."""
        starts = {e.task_id: e.at for e in reversed(self._book) if e.what == "started"}
        return nearest_rank(
            (at - self._sent_at[id] for id, at in starts.items() if id in self._sent_at and id not in but), 0.99
        )

    def next_start(self, id: str, kill: Kill) -> float | None:
        """When the task was started for the first time after this kill, by another worker."""
        later = [e.at for e in self._of[id] if e.what == "started" and e.at > kill.at and e.name != kill.worker]
        return min(later, default=None)

    def held_again(self, id: str, kill: Kill, start: float) -> bool:
        """Whether a worker had it between this kill and this start and was killed, too: from then on it counts."""
        had = {self._workers.get(e.pid, "") for e in self._of[id] if e.what == "received" and kill.at < e.at < start}
        return any(kill.at < self._killed.get(worker, 0.0) < start for worker in had)

    def flaws(self) -> list[str]:
        """taskguard's promises that do not hold, one line each."""
        flaws = []
        for id, record in self.records.items():
            if record is None or record.state is not State.DONE:
                flaws.append(f"{id} is {record.state if record else 'not in the store'}")
                continue
            *earlier, last = self.effects[id] or [None]
            if last is None or last.token != record.token:
                flaws.append(f"{id}: the effect of the run that completed, token {record.token}, is not the last one")
            # The worker's death came after all that it wrote, and its run did not complete: the token is another.
            flaws += [f"{id}: {effect.name} repeated it alive" for effect in earlier if effect.name not in self._killed]
            flaws += self._overcounted(id)
        return flaws

    def _overcounted(self, id: str) -> list[str]:
        """Starts that were told of more crashes than runs were killed: a death that was none of theirs."""
        killed, flaws = 0, []
        for entry in self._of[id]:
            if entry.what == "started" and entry.crashes > killed - (entry.name in self._killed):
                flaws.append(f"{id}: {entry.crashes} crashes before the start on {entry.name}")
            killed += entry.what == "entered" and entry.name in self._killed
        return flaws


def every_scene() -> Iterator[tuple[str, str, Side, int | None]]:
    """Broker, store, side and prefetch: every pair, and stock once beside each broker."""
    for broker in BROKERS:
        for store in STORES:
            for prefetch in PREFETCHES:
                yield broker, store, "taskguard", prefetch
        yield broker, STORES[0], "stock", None


def main() -> None:
    """Print every pair's figures, stock beside taskguard. ``PROOF_SEED`` repeats a run."""
    for broker, store, side, prefetch in every_scene():
        print(figures(broker, store, side, seed=draw.seed(), prefetch=prefetch).shown(), flush=True)


if __name__ == "__main__":
    main()
