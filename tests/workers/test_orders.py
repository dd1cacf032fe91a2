"""The order service: in this process with its crash points, and with a real worker."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

import taskguard
from taskguard.stores.sql import SQLStore
from tests.integration.journal import Deadline
from tests.integration.site import PATIENCE, ROOT
from workers import orders
from workers.orders import Order, Stock, Table, place, reserve


class Shop:
    """The shop's database, with some books in it."""

    def __init__(self, url: str, namespace: str = "orders") -> None:
        self.url = url
        self.engine = create_engine(url)
        self.store: Any = SQLStore.from_url(url, namespace=namespace)
        self.store.ping()
        Table.metadata.create_all(self.engine)
        with Session(self.engine) as session, session.begin():
            session.add(Stock(item="book", left=3))

    def place(self, quantity: int, *, commit: bool = True) -> int:
        with Session(self.engine) as session:
            number = place(session, "ann", "book", quantity).id
            if commit:
                session.commit()
        return number

    def books(self) -> int:
        with Session(self.engine) as session:
            return session.get_one(Stock, "book").left

    def states(self) -> list[str]:
        with Session(self.engine) as session:
            return list(session.scalars(select(Order.state).order_by(Order.id)))

    def sent(self) -> list[str]:
        return [record.task.rpartition(".")[2] for record in self.store.outbox.peek(100)]

    def close(self) -> None:
        self.engine.dispose()
        self.store.close()


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    """On SQLite."""
    shop = Shop(f"sqlite:///{tmp_path / 'shop.sqlite3'}")
    taskguard.install(orders.app, store=shop.url, namespace="orders")
    yield shop
    orders.app.taskguard.store.close()
    taskguard.install(orders.app, store=orders.DATABASE, namespace="orders")
    shop.close()


def test_an_order_and_its_task_are_committed_together(shop: Shop) -> None:
    """Or neither is."""
    shop.place(1, commit=False)
    assert (shop.states(), shop.sent()) == ([], [])
    shop.place(1)
    assert (shop.states(), shop.sent()) == (["new"], ["reserve"])


def test_a_reservation_takes_from_the_stock_once(shop: Shop) -> None:
    """However often it is delivered; and what there is not cannot be taken."""
    first, second = shop.place(2), shop.place(2)
    assert [reserve.apply((number,)).get() for number in (first, first, second)] == ["reserved", "reserved", "sold out"]
    assert (shop.states(), shop.books()) == (["reserved", "sold out"], 1)
    assert shop.sent() == ["reserve", "reserve", "notice", "notice"]


def test_a_reservation_that_fails_leaves_the_stock_alone(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its very end, when all has been written."""
    number = shop.place(2)
    monkeypatch.setattr(orders.notice, "delay", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reserve.apply((number,)).get()
    assert (shop.states(), shop.books(), shop.sent()) == (["new"], 3, ["reserve"])


def test_a_real_worker_does_what_was_placed(tmp_path: Path, rabbitmq_url: str) -> None:
    """Commands as in the module's first lines, on a database and a broker of the test's own."""
    shop = Shop(f"sqlite:///{tmp_path / 'shop.sqlite3'}")
    environ = {**os.environ, "ORDERS_DATABASE": shop.url, "CELERY_BROKER_URL": rabbitmq_url}
    placing = [sys.executable, "-m", "workers.orders", "ann", "book", "2"]
    done = subprocess.run(placing, env=environ, cwd=ROOT, check=True, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "order 1 of ann: 2 book\n"
    log = tmp_path / "worker.log"
    command = [sys.executable, "-m", "celery", "-A", "workers.orders", "worker", "--loglevel", "INFO", "-c", "1"]
    with log.open("wb") as sink:
        worker = subprocess.Popen(command, env=environ, cwd=ROOT, stdout=sink, stderr=sink, start_new_session=True)
    try:
        told = "to ann: order 1 is reserved"
        assert Deadline.after(PATIENCE).reached(lambda: told in log.read_text()), log.read_text()
        assert (shop.states(), shop.books()) == (["reserved"], 1)
    finally:
        worker.terminate()
        worker.wait(timeout=PATIENCE)
        shop.close()
    assert log.read_text().count(told) == 1
