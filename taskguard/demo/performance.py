"""The whole evening: servers, one play or two, the report, and what stays up afterwards."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console

from taskguard.clock import wall_clock
from taskguard.demo.apps import search_path
from taskguard.demo.contestants import LEASE, RETENTION, Contestant, Guarded, Stock
from taskguard.demo.crew import worker_command
from taskguard.demo.ledger import Reckoning
from taskguard.demo.orders import make_orders
from taskguard.demo.play import Cast, Play
from taskguard.demo.playground import Playground
from taskguard.demo.report import as_json, print_closing, print_report
from taskguard.demo.screen import make_screen
from taskguard.demo.servers import BankLine, administer, start_redis
from taskguard.errors import ConfigurationError
from taskguard.stores import open_permits, open_store

REDIS = ("redis://", "rediss://")


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where everything is, as URLs."""

    broker: str
    store: str
    results: str
    stock_broker: str
    stock_results: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Performance:
    """The demo with its options. *broker* and *store* are URLs of real servers, None for the demo's own Redis."""

    ground: Playground
    orders: int
    seed: int
    stock: bool
    broker: str | None
    store: str | None
    json: bool

    def run(self) -> bool:
        """Perform and report. True when nothing was lost and nothing charged twice; ends all it started on an error."""
        self.ground.begin()
        try:
            return self._run()
        except BaseException:
            self.ground.stop()
            raise

    def _run(self) -> bool:
        run = f"demo-{uuid.uuid4().hex[:6]}"
        namespace = "demo" if self.store is None else run
        places = self._places()
        bank = BankLine(self.ground)
        environ = {
            "CELERY_BROKER_URL": places.broker,
            "CELERY_RESULT_BACKEND": places.results,
            "TASKGUARD_STORE": places.store,
            "TASKGUARD_NAMESPACE": namespace,
            "TASKGUARD_LEASE": str(LEASE),
            "TASKGUARD_RETENTION": str(RETENTION),
            "BANK_URL": bank.url,
        }
        self.ground.remember(environ=environ, queue=run, bank=bank.url)
        os.environ.update(environ)
        store = open_store(places.store, namespace=namespace)
        store.ping()
        permits = open_permits(places.store, namespace=namespace, timeout=5.0)
        columns = {"taskguard": self._play(Guarded(store, permits), bank, queue=run, environ=environ)}
        bank.administer(frozen=[], slow={}, delay=0)
        if self.store is not None:
            _forget_ended(places.store, namespace)
        if self.stock:
            environ |= {"CELERY_BROKER_URL": places.stock_broker, "CELERY_RESULT_BACKEND": places.stock_results}
            os.environ.update(environ)
            columns["plain Celery"] = self._play_stock(queue=f"{run}-stock", environ=environ)
        self._report(columns, store=places.store, namespace=namespace)
        return columns["taskguard"].good

    def _places(self) -> Places:
        given = [url for url in (self.store, self.broker) if url is not None]
        results = next((url for url in given if url.startswith(REDIS)), None)
        own = start_redis(self.ground) if len(given) < 2 or results is None else ""
        return Places(
            broker=self.broker or f"{own}/0",
            store=self.store or f"{own}/0",
            results=f"{own}/1" if own else str(results),
            stock_broker=self.broker or f"{own}/2",
            stock_results=f"{own}/3" if own else str(results),
        )

    def _play_stock(self, *, queue: str, environ: Mapping[str, str]) -> Reckoning:
        bank = BankLine(self.ground, "bank-stock")
        try:
            return self._play(Stock(), bank, queue=queue, environ={**environ, "BANK_URL": bank.url})
        finally:
            self.ground.stop("bank-stock")

    def _play(self, contestant: Contestant, bank: BankLine, *, queue: str, environ: Mapping[str, str]) -> Reckoning:
        cast = Cast(
            contestant=contestant,
            ground=self.ground,
            bank=bank,
            queue=queue,
            orders=make_orders(self.orders, seed=self.seed),
            environ=environ,
        )
        title = f"taskguard demo: {self.orders} orders through {contestant.title}"
        with make_screen(Console(stderr=self.json), title) as screen:
            play = Play(cast, screen)
            try:
                return play.run()
            finally:
                if self.broker is not None:
                    play.clear()

    def _report(self, columns: Mapping[str, Reckoning], *, store: str, namespace: str) -> None:
        if self.json:
            click.echo(as_json(columns, orders=self.orders, seed=self.seed, store=store, namespace=namespace))
            return
        console = Console()
        print_report(console, columns)
        print_closing(console, dead=columns["taskguard"].dead, store=store, namespace=namespace)


def _forget_ended(url: str, namespace: str) -> None:
    """Remove the kept results from a store that is not ours, as if their retention were over; dead letters stay."""
    later = open_store(url, namespace=namespace, clock=lambda: wall_clock() + RETENTION)
    while later.expire(limit=1000):
        pass
    later.close()


def become_worker(facts: Mapping[str, Any], directory: Path) -> NoReturn:
    """Turn this process into a worker for what the last demo left. Raises ConfigurationError when there is nothing."""
    if not facts:
        raise ConfigurationError("no demo has left anything in this directory; `taskguard demo` runs one")
    os.environ.update(facts["environ"])
    administer(facts["bank"], frozen=[])
    command = worker_command("workers.app", facts["queue"], f"worker-3@{facts['queue']}", "-l", "INFO")
    sys.stdout.flush()
    os.environ["PYTHONPATH"] = search_path()
    os.chdir(directory)  # both as for all processes of the demo, see `Playground.spawn`
    os.execv(sys.executable, command)
