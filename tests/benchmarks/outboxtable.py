"""The table of the outbox: its figures beside their goals. ``python -m tests.benchmarks.outboxtable 3`` prints it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from statistics import median, quantiles

from rich.table import Table

from tests import services
from tests.benchmarks.limits import Row
from tests.benchmarks.outbox import OutboxBench, database
from tests.benchmarks.outboxturns import Spent

MANY_ROWS = 200_000


def measure(
    rounds: int, *, rows: int = 20_000, sends: int = 600, starts: int = 150, idle: float = 20.0
) -> tuple[Table, list[Row]]:
    """The table, and the rows that missed their goals."""
    with database() as url:
        redis, rabbit = (OutboxBench(url, services.require(name)) for name in ("redis", "rabbitmq"))
        try:
            redis.rival("migrate", 0)
            found = [
                *_sends(redis, rounds, sends),
                *_relays(redis, rabbit, rounds, rows),
                *_processes(redis, sends, starts, idle),
            ]
        finally:
            for bench in (redis, rabbit):
                bench.close()
    table = Table("outbox, PostgreSQL", "goal", "prototype", "measured", "")
    for row in found:
        table.add_row(*row.cells())
    return table, [row for row in found if row.missed]


def _row(name: str, measured: float, goal: float, prototype: str = "", *, least: bool = False, unit: str = "x") -> Row:
    return Row(name, measured, goal, prototype, least=least, unit=unit, tolerance=1.0)


def _sends(bench: OutboxBench, rounds: int, sends: int) -> Iterator[Row]:
    added: dict[str, list[Spent]] = {"ours": [], "direct": [], "rival": []}
    for _ in range(rounds):
        spent, rival = bench.sends(sends), bench.rival("insert", sends)
        added["ours"].append(spent["outbox"] - spent["bare"])
        added["direct"].append(spent["after"] - spent["bare"])
        added["rival"].append(Spent(*rival["sent"]) - Spent(*rival["bare"]))
        bench.store.outbox.purge()
        bench.purge()
    for what in ("CPU", "time"):
        us = {side: [getattr(each, what.lower()) * 1e6 for each in found] for side, found in added.items()}
        for side, name, goal, was in (
            ("direct", "apply_async after the commit", 0.45, "0.41"),
            ("rival", "django-celery-outbox", 0.25, "0.20"),
        ):
            ratio = median(mine / its for mine, its in zip(us["ours"], us[side], strict=True))
            shown = f"{what} a send adds, +{median(us['ours']):.0f} us / {name}, +{median(us[side]):.0f} us"
            yield _row(shown, ratio, goal, was)


def _relays(redis: OutboxBench, rabbit: OutboxBench, rounds: int, rows: int) -> Iterator[Row]:
    found: dict[str, list[float]] = {name: [] for name in ("ours", "floor", "two", "rival", "amqp", "amqp rival")}
    twice = 0
    for _ in range(rounds):
        found["rival"].append(redis.rival("relay", 1500)["rate"])
        found["ours"].append(redis.relay(rows))
        found["floor"].append(redis.floor(rows))
        rate, doubled = redis.two_relays(2 * rows)
        found["two"].append(rate)
        twice += doubled
        redis.purge()
        found["amqp rival"].append(rabbit.rival("relay", 1000)["rate"])
        found["amqp"].append(rabbit.relay(rows // 2))
        rabbit.purge()

    def row(name: str, mine: str, other: str, beside: str, goal: float, was: str) -> Row:
        ratio = median(a / b for a, b in zip(found[mine], found[other], strict=True))
        shown = f"{name}, {median(found[mine]):,.0f}/s / {beside}, {median(found[other]):,.0f}/s"
        return _row(shown, ratio, goal, was, least=True)

    yield row("relay, Redis", "ours", "rival", "django-celery-outbox", 50, "65")
    yield row("relay, Redis", "ours", "floor", "raw floor", 0.8, "0.97")
    yield row("two relays, Redis", "two", "ours", "one", 1.5, "1.69")
    yield _row("  messages that came twice", twice, 0, "0", unit="")
    yield row("relay, RabbitMQ, confirmed", "amqp", "amqp rival", "django-celery-outbox", 14, "16.5")


def _processes(bench: OutboxBench, sends: int, starts: int, idle: float) -> Iterator[Row]:
    found = bench.latency(starts)
    for name, at, goal, was in (("median", 49, 1.0, "0.87"), ("99th percentile", 98, 1.2, "0.94")):
        mine, direct = (quantiles(found[how], n=100)[at] for how in ("outbox", "direct"))
        yield _row(f"commit to start, {name}, {mine:.1f} ms / direct, {direct:.1f} ms", mine / direct, goal, was)
    alone, beside = bench.writers(3 * sends)
    name = f"a writer while a relay drains, {beside:,.0f}/s / alone, {alone:,.0f}/s"
    yield _row(name, beside / alone, 0.95, "0.95", least=True)
    yield _row("an idle relay's CPU", bench.idle(idle), 0.5, "-", unit="%")
    first, last = bench.memory(MANY_ROWS)
    name = f"a relay's memory at the end of {MANY_ROWS:,} rows, {last:.1f} MB / at their begin, {first:.1f} MB"
    yield _row(name, last / first, 1.1)


if __name__ == "__main__":
    from rich.console import Console

    Console(width=150).print(measure(int(sys.argv[1]) if sys.argv[1:] else 3)[0])
