"""Scenes of tasks whose downstream is narrow, or down: ``python -m tests.acceptance.downstream`` plays them in full.

The declared rate leaves room below the downstream's own limit for what no limiter can know: how long a call takes from
its permit to the other side. Each process can delay one call at a time, so a second sees at most the rate, one more,
and one for each process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from redis import Redis

from taskguard.record import Record, State
from tests.acceptance import downapp
from tests.acceptance.narrow import Call, Served, busiest, most_overtaken
from tests.integration.conftest import open_site
from tests.integration.journal import Deadline
from tests.integration.servers import PrivateRedis
from tests.integration.site import PATIENCE, Site

LIMIT = 50
WORKERS, CONCURRENCY = 2, 2
BURST = 4
RATE = LIMIT - BURST - WORKERS * CONCURRENCY
DECLARED = {"rate": RATE, "burst": BURST}


class Scene(Site):
    """A site whose workers call a narrow downstream."""

    program = downapp.__name__
    _make_app = staticmethod(downapp.make_app)

    def __init__(self, *, narrow: Served, declared: Mapping[str, Any], **options: Any) -> None:
        super().__init__(
            **options,
            TEST_NARROW=str(narrow.port),
            TEST_DOWNSTREAM=json.dumps(declared),
        )
        self.narrow = narrow

    def hire(self, count: int = WORKERS) -> None:
        """Start workers and wait until they consume."""
        for _ in range(count):
            self.start_worker(concurrency=CONCURRENCY)

    def send_calls(self, numbers: range) -> None:
        """Send one task a number, in order."""
        with self.app.producer_pool.acquire(block=True) as producer:
            for number in numbers:
                self.app.tasks["call"].apply_async((number,), producer=producer)

    def served(self) -> set[int]:
        """The numbers of the calls that were answered well."""
        return {each.number for each in self.narrow.calls() if each.status == 201}

    def wait_all(self, count: int, *, timeout: float) -> None:
        """Wait until all of that many tasks are done."""
        Deadline.after(timeout).reached(lambda: len(self.served()) >= count, every=0.3)
        self.wait(lambda: self.store.depths()[State.DONE].count >= count, f"{count} tasks done", timeout=15)

    def done(self) -> list[Record]:
        """The records of what is done."""
        return list(self.store.scan(State.DONE))


@contextmanager
def scene(
    declared: Mapping[str, Any], *, broker: str = "redis", store: str = "redis", directory: Path | None = None,
    own: str | None = None, **environ: str,
) -> Iterator[Scene]:  # fmt: skip
    """A scene on the shared servers. *own*: the URL of a store of its own."""
    with ExitStack() as stack:
        logs = directory or Path(stack.enter_context(TemporaryDirectory()))
        narrow = stack.enter_context(Served(LIMIT))

        def made(**options: Any) -> Scene:
            return Scene(narrow=narrow, declared=declared, **{**options, "store": own or options["store"]}, **environ)

        kind: Any = made
        opened: Any = open_site(stack, broker, store, logs, kind)
        yield opened


@dataclass(slots=True, kw_only=True)
class Figures:
    """What one scene came to."""

    name: str
    sent: int
    done: int = 0
    dead: int = 0
    refused: int = 0
    failed: int = 0
    busiest: int = 0
    overtaken: float = 0.0
    retries: int = 0
    deferred: int = 0
    seconds: float = 0.0
    trips: float = 0.0
    idle: float = 0.0
    probes: list[float] = field(default_factory=list)

    def shown(self) -> str:
        """One line."""
        return (
            f"{self.name}: {self.done} of {self.sent} done in {self.seconds:.1f} s, {self.dead} dead, "
            f"{self.refused} times 429, {self.failed} times 503, at most {self.busiest} in a second, "
            f"overtaken by {self.overtaken:.2f} s at most, {self.deferred} deferrals, {self.retries} retries; "
            f"{self.trips:.2f} store round trips a task ({self.idle:.1f} a second when idle)"
        )


def _counted(client: Redis) -> int:
    """Round trips so far: the scripts that were called, and the few commands that are sent alone."""
    stats: dict[str, Any] = client.info("commandstats")
    return sum(int(stats.get(f"cmdstat_{name}", {}).get("calls", 0)) for name in ("evalsha", "eval", "fcall"))


def paced(tasks: int, *, max_wait: float = 0.0, broker: str = "redis", directory: Path | None = None) -> Figures:
    """*tasks* at once, for a downstream that takes 50 a second and says 429 to more."""
    told = Figures(name=f"paced, {broker}, max_wait {max_wait:g} s", sent=tasks)
    with TemporaryDirectory() as home, PrivateRedis(Path(home) / "store", "--appendonly", "no") as server:
        declared = {**DECLARED, "max_wait": max_wait}
        with scene(declared, broker=broker, own=server.url, directory=directory) as played, _client(server) as client:
            played.hire()
            before, since = _counted(client), time.monotonic()
            time.sleep(2)
            told.idle = (_counted(client) - before) / (time.monotonic() - since)
            before, began = _counted(client), time.monotonic()
            played.send_calls(range(tasks))
            played.wait_all(tasks, timeout=tasks / RATE * 2 + 30)
            told.seconds = time.monotonic() - began
            told.trips = (_counted(client) - before - told.idle * told.seconds) / tasks
            _count(played, told)
    return told


def outage(tasks: int, period: float, *, directory: Path | None = None, on_open: str = "defer") -> Figures:
    """*tasks* arrive while the downstream is down for *period* seconds."""
    told = Figures(name=f"down for {period:g} s, {on_open}", sent=tasks)
    circuit = {
        "minimum_calls": 3, "wait_in_open": 1.0, "backoff": 1.5, "max_wait_in_open": 5.0, "slow_start": 2.0,
        "probe_lease": 5.0, "on_open": on_open,
    }  # fmt: skip
    with scene({**DECLARED, "circuit": circuit}, directory=directory) as played:
        played.hire()
        began = time.monotonic()
        played.narrow.go_down(3600)
        trip(played)
        tripped_at = played.narrow.calls()[-1].at
        step = max(1, int(tasks / period / 10))
        for start in range(0, tasks, step):
            played.send_calls(range(start, min(start + step, tasks)))
            time.sleep(max(0.0, (start + step) / tasks * period * 0.8 - (time.monotonic() - began)))
        time.sleep(max(0.0, period - (time.monotonic() - began)))
        up_at = time.time()
        played.narrow.go_down(0)
        played.wait_all(tasks, timeout=tasks / RATE * 2 + period + 30)
        told.seconds = time.monotonic() - began
        told.probes = [each.at - tripped_at for each in played.narrow.calls() if tripped_at < each.at < up_at]
        _count(played, told)
    return told


def trip(played: Scene) -> None:
    """Find out that it is down, outside of any task: what trips a circuit is a failure like any other."""
    from tests.acceptance import narrow

    downstream = played.app.narrow

    def tripped() -> bool:
        with suppress(Exception):
            downstream.call(narrow.call, played.narrow.port, -1)
        return bool(downstream.circuit.view.state != "closed")

    assert Deadline.after(PATIENCE).reached(tripped)


def _client(server: PrivateRedis) -> Redis:
    return Redis.from_url(server.url)


def _count(played: Scene, told: Figures) -> None:
    calls = [each for each in played.narrow.calls() if each.number >= 0]
    _tally(calls, told)
    done = played.done()
    told.done = len(done)
    told.dead = played.store.depths()[State.DEAD].count
    told.deferred = len(played.journal.entries("deferred"))
    told.retries = len(played.journal.entries("retried"))


def _tally(calls: list[Call], told: Figures) -> None:
    told.busiest = busiest([each.at for each in calls])
    told.refused = sum(each.status == 429 for each in calls)
    told.failed = sum(each.status == 503 for each in calls)
    told.overtaken = most_overtaken(calls)


def main() -> None:
    """Play all scenes in full and print their figures."""
    for play in (
        partial(paced, 1000),
        partial(paced, 1000, max_wait=1.0),
        partial(paced, 1000, broker="rabbitmq"),
        partial(outage, 2000, 20.0),
        partial(outage, 2000, 20.0, on_open="pause_queue"),
    ):
        print(play().shown(), flush=True)


if __name__ == "__main__":
    main()
