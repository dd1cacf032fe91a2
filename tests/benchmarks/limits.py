"""``python -m tests.benchmarks.limits``, and the second table of ``make bench``: calls to a downstream.

Each row is a ratio of medians in one interleaved run, its goal, and what a prototype reached. It ends with 1 where a
figure misses its goal by more than a quarter: goals are for a quiet machine, ratios move by a tenth on a busy one.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import click
from redis import Redis
from rich.console import Console
from rich.table import Table

from taskguard.downstream.denials import Denials
from taskguard.downstream.leases import Leased
from taskguard.downstream.local import LocalRate
from taskguard.downstream.outage import Shielded
from taskguard.errors import StoreUnavailable
from taskguard.permits import Ask, CircuitAsk, CircuitView, Outcomes, Permit, RateAsk, Slot, SlotAsk
from taskguard.policies.circuit import CircuitBreaker
from taskguard.policies.rates import TokenBucket
from taskguard.stores.memory.permits import MemoryPermits
from taskguard.stores.redis.permits import RedisPermits
from tests import services
from tests.benchmarks import rivals
from tests.benchmarks.slices import Clock, Subject, cpu_of_both, measure
from tests.integration.servers import PrivateRedis

ROOT = Path(__file__).parents[2]
TOLERANCE = 1.25
WIDTH = 150
PLENTY = TokenBucket(rivals.MANY, burst=rivals.MANY)


@dataclass(frozen=True, slots=True)
class Row:
    """A figure and its goal: at most *goal*, or at least where *least*. ``goal`` None: shown only."""

    name: str
    measured: float
    goal: float | None
    prototype: str
    least: bool = False
    unit: str = "x"
    tolerance: float = TOLERANCE

    @property
    def missed(self) -> bool:
        """By more than the tolerance."""
        if self.goal is None:
            return False
        if self.least:
            return self.measured * self.tolerance < self.goal
        return self.measured > self.goal * self.tolerance

    def cells(self) -> tuple[str, ...]:
        """For the table."""
        goal = "" if self.goal is None else f"{'>=' if self.least else '<='} {self.goal:g}"
        mark = "missed" if self.missed else ""
        return self.name, goal, self.prototype, f"{self.measured:.3g} {self.unit}", mark


def _line(url: str) -> socket.socket:
    """A connection with nothing round it: what the kernel and the server take for the shortest of round trips."""
    host, _, port = url.partition("://")[2].partition("/")[0].rpartition("@")[2].partition(":")
    line = socket.create_connection((host, int(port or 6379)))
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return line


class Bench:
    """The permit store and its rivals on one server, in a namespace that ends with the bench."""

    def __init__(self, rounds: int, server: PrivateRedis | None = None) -> None:
        self.url = services.require("redis") if server is None else server.url
        self.clock: Clock = time.perf_counter
        if server is not None:
            with Redis.from_url(server.url) as redis:
                self.clock = cpu_of_both(redis.info("server")["process_id"])
        self.namespace = f"b{uuid.uuid4().hex[:12]}"
        self.rounds = rounds
        self.permits = RedisPermits.from_url(self.url, namespace=self.namespace, timeout=5)

    def rows(self) -> Iterator[Row]:
        """All figures, one group after another."""
        try:
            for group in (self.redis, self.denied, self.memory, self.circuit, self.trip, self.leased, self.down):
                yield from group()
        finally:
            self.permits.close()
            services.delete_redis_keys(self.url, f"*{self.namespace}*")

    def redis(self) -> Iterator[Row]:
        """P1 and P10: one limit, and rate, circuit and slot with release, on one connection."""
        ask = Ask(rates=(RateAsk("alone", PLENTY),))
        with Redis.from_url(self.url) as redis, _line(self.url) as line:
            subjects: dict[str, Subject] = {
                "ping": redis.ping,
                "bare": lambda: (line.sendall(b"PING\r\n"), line.recv(64)),
                "ours": lambda: self.permits.admit(ask),
                "whole": self._whole(),
                "limits": rivals.fixed_window_of_limits(self.url, self.namespace),
                "throttled": rivals.gcra_of_throttled(self.url, self.namespace),
                "pyrate": rivals.gcra_of_pyrate(self.url, self.namespace),
                "stacked": rivals.stacked(self.url, self.namespace),
            }
            found = measure(subjects, rounds=self.rounds, slice_seconds=0.02, clock=self.clock)
        yield Row(
            "a PING without any client / redis-py PING: no script can take less", found.ratio("bare", "ping"), None, ""
        )
        yield Row("exact limiter in Redis / redis-py PING", found.ratio("ours", "ping"), 0.75, "0.65")
        yield Row("  limits fixed window / ours", found.ratio("limits", "ours"), 2.0, "2.3", least=True)
        yield Row("  throttled-py GCRA / ours", found.ratio("throttled", "ours"), 2.5, "3.1", least=True)
        yield Row("  pyrate-limiter GCRA / ours", found.ratio("pyrate", "ours"), 2.5, "3.6", least=True)
        yield Row("rate + circuit + slot, one trip / PING", found.ratio("whole", "ping"), 1.0, "0.84")
        yield Row("  limits + pybreaker + semaphore / ours", found.ratio("stacked", "whole"), 5.0, "8.6", least=True)

    def _whole(self) -> Subject:
        number, policy = itertools.count(), CircuitBreaker()
        rates, before = (RateAsk("whole", PLENTY),), [Slot("whole", "none")]

        def call() -> None:
            holder = f"{next(number)}"
            slot, circuit = SlotAsk("whole", 10, holder, 30.0), CircuitAsk("whole", policy, holder)
            answer = self.permits.admit(Ask(rates=rates, slot=slot, circuit=circuit, release=(before[0],)))
            assert isinstance(answer, Permit)
            before[0] = Slot("whole", holder)

        return call

    def denied(self) -> Iterator[Row]:
        """P3: while a refusal is remembered nobody is asked."""
        denials = Denials()
        denials.keep("bank", 1.0, 3600.0, asked_at=time.monotonic())
        ours: dict[str, Subject] = {"floor": rivals.lock_and_clock(), "ours": lambda: denials.left("bank", 1.0)}
        found = measure(ours, rounds=self.rounds)
        yield Row("remembered refusal / lock + clock", found.ratio("ours", "floor"), 1.5, "0.65")
        found = measure(
            {
                **ours,
                "limits": rivals.fixed_window_of_limits(self.url, self.namespace, refusing=True),
                "throttled": rivals.gcra_of_throttled(self.url, self.namespace, refusing=True),
                "pyrate": rivals.gcra_of_pyrate(self.url, self.namespace, refusing=True),
            },
            rounds=self.rounds,
            clock=time.perf_counter,
        )
        for name in ("limits", "throttled", "pyrate"):
            yield Row(f"  {name} refusing / ours", found.ratio(name, "ours"), 200.0, "300-500", least=True)

    def memory(self) -> Iterator[Row]:
        """P6: a rate of this process; and the permit store in memory, which answers with all that Redis answers."""
        permits, ask = MemoryPermits(), Ask(rates=(RateAsk("bank", PLENTY),))
        local = LocalRate(TokenBucket(rivals.MANY, burst=rivals.MANY))
        exact, keyed = local.acquire, local.acquire_for
        leased = Leased(permits, "leased", TokenBucket(rivals.MANY, burst=rivals.MANY), most=1000)
        subjects: dict[str, Subject] = {
            "floor": rivals.lock_and_clock(),
            "leased": leased.acquire,
            "exact": exact,
            "keyed": lambda: keyed("key", 2.0),
            "store": lambda: permits.admit(ask),
            "limits": rivals.memory_of_limits(),
            "throttled": rivals.gcra_of_throttled_in_memory(),
        }
        found = measure(subjects, rounds=self.rounds)
        yield Row("in memory, exact / lock + clock", found.ratio("exact", "floor"), 1.2, "0.89")
        yield Row("in memory, a key and a cost / lock + clock", found.ratio("keyed", "floor"), 2.0, "1.61")
        yield Row("  limits moving window / ours", found.ratio("limits", "keyed"), 5.0, "6.5", least=True)
        yield Row("  throttled-py GCRA / ours", found.ratio("throttled", "keyed"), 5.0, "9.5", least=True)
        yield Row("permit store in memory / lock + clock", found.ratio("store", "floor"), None, "-")
        yield Row("leased permit / lock + clock", found.ratio("leased", "floor"), 1.0, "0.33-0.9")

    def circuit(self) -> Iterator[Row]:
        """P7 and P8: a closed circuit around a call that does nothing."""
        ours = guarded_call()
        if ours is None:
            return
        subjects = {
            "bare": rivals.bare_wrapper(),
            "ours": ours,
            "circuitbreaker": rivals.circuit_of_circuitbreaker(),
            "pybreaker": rivals.circuit_of_pybreaker(),
        }
        found = measure(subjects, rounds=self.rounds)
        yield Row("closed circuit / bare try wrapper", found.ratio("ours", "bare"), 1.6, "1.42")
        yield Row("  circuitbreaker / ours", found.ratio("circuitbreaker", "ours"), 4.0, "4.8", least=True)
        yield Row("  pybreaker / ours", found.ratio("pybreaker", "ours"), 9.0, "11.7", least=True)

    def trip(self) -> Iterator[Row]:
        """P9: from one process's report to another's callback."""
        other = RedisPermits.from_url(self.url, namespace=self.namespace, timeout=5)
        policy, seen, ended = CircuitBreaker(minimum_calls=1), threading.Event(), threading.Event()
        at: list[float] = []

        def changed(view: CircuitView) -> None:
            at.append(time.perf_counter())
            seen.set()

        watcher = threading.Thread(
            target=other.watch_circuits, args=(changed,), kwargs={"stop": ended.is_set}, daemon=True
        )
        watcher.start()
        with Redis.from_url(self.url) as redis:
            channel = f"{{tg:{self.namespace}:0}}:permit:changes"
            while not redis.pubsub_numsub(channel)[0][1]:
                time.sleep(0.01)
        delays = []
        for number in range(3 * self.rounds):
            seen.clear()
            began = time.perf_counter()
            self.permits.report(f"trip {number}", policy, Outcomes(0, 1, 1, 0))
            assert seen.wait(10)
            delays.append((at[-1] - began) * 1000)
            time.sleep(0.01)
        ended.set()
        watcher.join()
        other.close()
        yield Row("trip seen elsewhere, median", median(delays), 5.0, "0.9-1.9", unit="ms")
        yield Row("trip seen elsewhere, worst", max(delays), 50.0, "3-10", unit="ms")

    def leased(self) -> Iterator[Row]:
        """P4: four processes at full speed on a limit of 10,000 a second."""
        seconds, policy = 2.0, TokenBucket(10_000, burst=2000)
        command = [sys.executable, "-m", "tests.benchmarks.limits", "--spend", self.url, self.namespace, str(seconds)]
        children = [
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.PIPE) for _ in range(4)
        ]
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        for child in children:
            assert child.stdin is not None
            child.stdin.write(b"go\n")
            child.stdin.flush()
        totals = [list(map(float, child.communicate()[0].split())) for child in children]
        spent, asked = (sum(each[field] for each in totals) for field in (0, 1))
        nominal = policy.most + policy.limit * seconds  # the children began together but for a few ms
        yield Row("leased at 10,000/s: trips an admitted call", asked / spent, 0.1, "0.048-0.081", unit="")
        yield Row("  admitted / nominal, at least", spent / nominal, 0.95, "0.97-0.98", least=True)
        yield Row("  admitted / nominal, never over", spent / nominal, 1.0, "0.98", tolerance=1.0)

    def down(self) -> Iterator[Row]:
        """P14: a store that takes connections and answers nobody."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
            shielded = Shielded(RedisPermits.from_url(url, namespace="n", timeout=0.05))
            ask = Ask(rates=(RateAsk("bank", PLENTY),))
            began = time.perf_counter()
            _refused(shielded, ask)
            once = time.perf_counter() - began
            shielded.outage._until = time.monotonic() + 3600
            found = measure({"refused": lambda: _refused(shielded, ask)}, rounds=self.rounds)
            shielded.close()
        yield Row("store down: the first call, of a timeout of 50 ms", once * 1000, 50.0, "-", unit="ms")
        yield Row("store down: each other call", found.median("refused") * 1e6, 2.0, "-", unit="us")


def _refused(shielded: Shielded, ask: Ask) -> None:
    try:
        shielded.admit(ask)
    except StoreUnavailable:
        return
    raise AssertionError("a store that is down has answered")


def guarded_call() -> Subject | None:
    """A call through a closed circuit of ours; None before there is one."""
    try:
        from taskguard.downstream.service import Downstream
    except ImportError:
        return None
    bank = Downstream("bank", circuit=CircuitBreaker(), store=MemoryPermits())
    decorated: Callable[[], object] = bank(lambda: None)
    return decorated


def spend(url: str, namespace: str, seconds: float) -> None:
    """One process of `Bench.leased`: prints how many permits it spent, and how often the store was asked."""
    permits = RedisPermits.from_url(url, namespace=namespace, timeout=5)
    leased = Leased(permits, "leased", TokenBucket(10_000, burst=2000))
    asked, lend = itertools.count(), leased._lend

    def counted(*args: object, **options: object) -> object:
        next(asked)
        return lend(*args, **options)  # type: ignore[arg-type]

    leased._lend = counted  # type: ignore[assignment]
    permits.now()
    print("ready", flush=True)
    sys.stdin.readline()
    spent, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        wait = leased.acquire()
        if wait:
            time.sleep(min(wait, 0.001))
        else:
            spent += 1
    print(spent, next(asked))


def table(rounds: int, server: PrivateRedis | None = None) -> tuple[Table, list[Row]]:
    """The table, and the rows that missed their goals."""
    rows = list(Bench(rounds, server).rows())
    shown = Table("downstream calls", "goal", "prototype", "measured", "")
    for row in rows:
        shown.add_row(*row.cells())
    return shown, [row for row in rows if row.missed]


@click.command()
@click.option("--rounds", default=31, show_default=True, help="Slices of each subject, interleaved.")
@click.option("--cpu", is_flag=True, help="CPU time of both sides, on a server of its own: for a busy machine.")
@click.option("--spend", "spender", nargs=3, hidden=True)
def main(rounds: int, cpu: bool, spender: tuple[str, str, str] | None) -> None:
    """Measure limits, circuits and leases beside redis-py's PING and other libraries."""
    if spender:
        spend(spender[0], spender[1], float(spender[2]))
        return
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    names = ("redis", "limits", "throttled-py", "pyrate-limiter", "pybreaker", "circuitbreaker")
    console.print(f"{os.cpu_count()} cores; " + ", ".join(f"{name} {version(name)}" for name in names))
    with ExitStack() as stack:
        server = None
        if cpu:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "redis"
            server = stack.enter_context(PrivateRedis(directory, "--appendonly", "no"))
        shown, missed = table(rounds, server)
    console.print(shown)
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
