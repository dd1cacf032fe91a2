"""``make bench``: the table of figures. ``--pairs 9 --tasks 4000`` are what the promises are read from."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from statistics import median

import click
from rich.console import Console
from rich.table import Table

from tests.benchmarks import limits, outboxtable
from tests.benchmarks.app import STOCK, TASKGUARD
from tests.benchmarks.bench import Bench, Rest, Sample, Setting

SETTINGS = (
    Setting("Redis, Redis store"),
    Setting("Redis, Redis store, Redis results", backend=True, floor=1.0),
    Setting("Redis, SQLite store", store="sqlite"),
    Setting("Redis, PostgreSQL store", store="postgresql", floor=0.75),
    Setting("RabbitMQ, Redis store", broker="rabbitmq", floor=0.85),
    Setting("RabbitMQ, Redis store, Redis results", broker="rabbitmq", backend=True, floor=1.0),
)
WIDTH = 150
"""Columns of the tables in a file or a pipe, where rich would guess eighty and break the rows."""
CONTROL = Setting("stock against stock, Redis", floor=0.0)

MEMORY_MB, IDLE_RATIO, KEYS, BYTES = 15.0, 1.5, 2.0, 600.0
"""What a worker may cost more than stock's, and what a task in custody may cost beside its message."""


@click.command()
@click.option("--pairs", default=9, show_default=True, help="Runs of each side, interleaved.")
@click.option("--tasks", default=4000, show_default=True, help="Tasks of a run.")
@click.option("--idle", default=20.0, show_default=True, help="Seconds an idle worker is watched.")
@click.option("-k", "words", multiple=True, help="Only settings with this word in their name; may be repeated.")
def main(pairs: int, tasks: int, idle: float, words: Sequence[str]) -> None:
    """Measure no-op tasks with full custody beside the same worker with plain celery.Task, acks_late."""
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    console.print(
        f"Python {platform.python_version()}, Celery {version('celery')}, {os.cpu_count()} cores; "
        f"prefork 2, prefetch 1, {pairs} interleaved pairs of {tasks} no-ops; ratios of medians"
    )
    chosen = [each for each in (CONTROL, *SETTINGS) if not words or any(word in each.name for word in words)]
    below: list[str] = []
    console.print(_throughput(console, chosen, pairs, tasks, below))
    if not words:
        console.print(_cost(idle, below))
        calls, missed = limits.table(rounds=31)
        console.print(calls)
        below += [row.name.strip() for row in missed]
    if not words or "outbox" in words:
        outgoing, missed = outboxtable.measure(rounds=max(1, pairs // 2), idle=idle)
        console.print(outgoing)
        below += [row.name.strip() for row in missed]
    for name in below:
        console.print(f"[red]misses its goal: {name}[/red]")
    raise SystemExit(1 if below else 0)


def _throughput(console: Console, settings: Sequence[Setting], pairs: int, tasks: int, below: list[str]) -> Table:
    table = Table(
        "setting",
        "stock /s",
        "taskguard /s",
        "ratio",
        "min-max of pairs",
        "floor",
        "main ms",
        "children ms",
        "store trips",
    )
    for setting in settings:
        bench, other = Bench(setting), STOCK if setting is CONTROL else TASKGUARD
        samples: dict[int, list[Sample]] = {0: [], 1: []}
        for number in range(pairs):
            for side in (0, 1) if number % 2 else (1, 0):
                samples[side].append(bench.drain(other if side else STOCK, tasks))
            if console.is_terminal:
                console.print(f"[dim]{setting.name}: pair {number + 1} of {pairs}[/dim]", end="\r")
        ratios = [new.rate / old.rate for old, new in zip(samples[0], samples[1], strict=True)]
        rate, main, children, reads = (_medians(samples, field) for field in ("rate", "main", "children", "reads"))
        if rate[1] / rate[0] < setting.floor:
            below.append(setting.name)
        table.add_row(
            setting.name,
            f"{rate[0]:.0f}",
            f"{rate[1]:.0f}",
            f"{rate[1] / rate[0]:.2f}",
            f"{min(ratios):.2f}-{max(ratios):.2f}",
            f"{setting.floor:.2f}" if setting.floor else "",
            f"{main[0]:.3f} -> {main[1]:.3f}",
            f"{children[0]:.3f} -> {children[1]:.3f}",
            f"{reads[0]:.1f} -> {reads[1]:.1f}",
        )
    return table


def _medians(samples: dict[int, list[Sample]], field: str) -> tuple[float, float]:
    old, new = (median(getattr(sample, field) for sample in samples[side]) for side in (0, 1))
    return old, new


def _cost(idle: float, below: list[str]) -> Table:
    bench = Bench(SETTINGS[0])
    rests: dict[str, list[Rest]] = {STOCK: [], TASKGUARD: []}
    for _ in range(3):
        for side in rests:
            rests[side].append(bench.rest(side, idle))
    memory, cpu = (_of(rests, lambda rest: rest.memory), _of(rests, lambda rest: rest.cpu))
    keys, used = bench.custody()
    table = Table("cost", "stock", "taskguard", "bound")
    for name, stock, ours, bound, missed in (
        ("memory of a worker, MB", memory[0], memory[1], f"+{MEMORY_MB:.0f}", memory[1] > memory[0] + MEMORY_MB),
        ("CPU of an idle worker, %", cpu[0], cpu[1], f"x{IDLE_RATIO}", cpu[1] > cpu[0] * IDLE_RATIO),
        ("Redis keys of a running task", None, keys, f"{KEYS:.0f}", keys > KEYS),
        ("bytes beside its message", None, used, f"{BYTES:.0f}", used > BYTES),
    ):
        table.add_row(name, "" if stock is None else f"{stock:.2f}", f"{ours:.2f}", bound)
        below += [name] * missed
    return table


def _of(rests: dict[str, list[Rest]], field: Callable[[Rest], float]) -> tuple[float, float]:
    return median(map(field, rests[STOCK])), median(map(field, rests[TASKGUARD]))


if __name__ == "__main__":
    main()
