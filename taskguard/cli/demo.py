"""``taskguard demo``: see `taskguard.demo`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from taskguard.demo.orders import FEWEST


@click.command()
@click.option(
    "--orders", default=500, show_default=True, type=click.IntRange(min=FEWEST), help="How many orders to place."
)
@click.option("--seed", default=7, show_default=True, help="The same seed places the same orders.")
@click.option("--stock", is_flag=True, help="Put the same orders and faults through plain Celery too.")
@click.option("--broker", metavar="URL", help="A broker to use instead of a Redis of the demo's own.")
@click.option("--store", metavar="URL", help="A message store to use instead of the demo's Redis.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON, and the progress on stderr.")
@click.option("--worker", is_flag=True, help="Start a worker for what the last demo left, in the foreground.")
@click.option("--stop", is_flag=True, help="End the servers the last demo left.")
def demo(
    orders: int,
    seed: int,
    stock: bool,
    broker: str | None,
    store: str | None,
    as_json: bool,
    worker: bool,
    stop: bool,
) -> None:
    """Crash real workers over real orders, and count what was lost.

    Starts a Redis, a flaky bank and two workers, places orders with duplicated, stale, poisonous and malformed ones
    among them, has the bank fail and kills a worker in the middle. Ends with a table that is checked against the bank's
    own books; the exit status is 1 if an order was lost or charged twice. Redis and the bank keep running afterwards,
    so that the dead letters can be looked at and requeued.
    """
    try:
        from taskguard.demo.performance import Performance, become_worker
        from taskguard.demo.playground import FOLDER, Playground
    except ModuleNotFoundError as exc:
        raise click.ClickException(f"the demo needs {exc.name}; pip install 'taskguard[demo]'") from exc
    ground = Playground(Path.cwd() / FOLDER)
    if stop:
        ended = ground.stop()
        click.echo(f"ended: {', '.join(ended)}" if ended else "nothing of a demo runs here")
    elif worker:
        become_worker(ground.facts, ground.path)
    else:
        performance = Performance(
            ground=ground, orders=orders, seed=seed, stock=stock, broker=broker, store=store, json=as_json
        )
        with _terminated_as_interrupted():
            good = performance.run()
        sys.exit(0 if good else 1)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM and a closed terminal unwind the stack as Ctrl-C does, so that no process is left behind."""

    def unwind(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, unwind) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
