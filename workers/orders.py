"""Orders: ``celery -A workers.orders worker``. Placed in a database and done in it, each once, whatever dies.

The order and the task that will reserve it are committed by the shop's own transaction. The task takes from the stock,
marks the order and sends the customer's notice in one transaction with its own completion: a crash at any point leaves
all of that or nothing. Only the notice itself, which leaves the database, may be given twice.

The database is in ``ORDERS_DATABASE``, the broker in ``CELERY_BROKER_URL``. ``python -m workers.orders ann book 2``
places an order.
"""

from __future__ import annotations

import logging
import os
import sys

from celery import Celery
from sqlalchemy import String, create_engine, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import taskguard
from taskguard import ReliableTask

DATABASE = os.environ.get("ORDERS_DATABASE") or "sqlite:///orders.sqlite3"
BROKER = os.environ.get("CELERY_BROKER_URL") or "redis://localhost:6379/0"

log = logging.getLogger(__name__)
engine = create_engine(DATABASE)
app = Celery("orders", broker=BROKER)
app.conf.task_ignore_result = True
taskguard.install(app, store=DATABASE, namespace="orders")


class Table(DeclarativeBase):
    """The shop's own tables, beside those of ``taskguard schema create``."""


class Stock(Table):
    """How many there are."""

    __tablename__ = "stock"
    item: Mapped[str] = mapped_column(String(100), primary_key=True)
    left: Mapped[int] = mapped_column("items_left")


class Order(Table):
    """``state``: new, reserved or sold out."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str] = mapped_column(String(100))
    item: Mapped[str] = mapped_column(String(100))
    quantity: Mapped[int]
    state: Mapped[str] = mapped_column(String(20), default="new")


def place(session: Session, customer: str, item: str, quantity: int) -> Order:
    """Place an order in the caller's transaction. A customer's orders are sent in the order in which he placed them."""
    order = Order(customer=customer, item=item, quantity=quantity)
    session.add(order)
    session.flush()
    reserve.apply_async((order.id,), session=session, ordering_key=customer)
    return order


@app.task(bind=True, base=ReliableTask, shared=False, transactional=True, idempotency_key="reserve:{order_id}")
def reserve(self: ReliableTask, order_id: int) -> str:
    """Take an order's items from the stock, if there are as many."""
    order = self.session.get_one(Order, order_id)
    enough = update(Stock).where(Stock.item == order.item, Stock.left >= order.quantity)
    taken = self.session.execute(enough.values(left=Stock.left - order.quantity)).rowcount
    order.state = "reserved" if taken else "sold out"
    notice.delay(order_id, order.customer, order.state)  # joins the transaction
    return str(order.state)


@app.task(base=ReliableTask, shared=False, idempotency_key="notice:{order_id}", deadline=3600)
def notice(order_id: int, customer: str, state: str) -> None:
    """Tell the customer. A process that dies between this and its completion tells him twice."""
    log.info("to %s: order %s is %s", customer, order_id, state)


def main(customer: str, item: str, quantity: str) -> None:
    """Place one order."""
    Table.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        order = place(session, customer, item, int(quantity))
        print(f"order {order.id} of {customer}: {quantity} {item}")  # noqa: T201


if __name__ == "__main__":
    from workers.orders import main as place_one

    place_one(*sys.argv[1:])
