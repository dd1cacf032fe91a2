"""A shop on SQLite, whose effects are rows beside the store's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from taskguard import ReliableTask
from taskguard.envelope import record_id
from taskguard.record import Record
from tests.unit.sqlshop import SQLShop


class Shop(SQLShop):
    """A shop whose effects are rows of ``effects``, beside the store's."""

    def __init__(self, path: Path, **settings: Any) -> None:
        super().__init__(path, **settings)
        self.store.ping()
        with self.engine.begin() as connection:
            connection.execute(text("CREATE TABLE effects (id INTEGER PRIMARY KEY, what TEXT UNIQUE)"))

        @self.app.task(name="mail", base=ReliableTask, shared=False)
        def mail(what: str = "") -> None: ...

        self.mail = mail

    def task(self, body: Callable[..., Any], **options: Any) -> Any:
        options = {"name": "work", "bind": True, "transactional": True, "throws": (), **options}
        return self.app.task(base=ReliableTask, shared=False, **options)(body)

    def run(self, body: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return self.task(body, **options).apply(args, task_id="t1")

    def effects(self) -> list[str]:
        with self.engine.connect() as connection:
            return list(connection.execute(text("SELECT what FROM effects ORDER BY id")).scalars())

    def sent(self) -> list[str]:
        return [record.task for record in self.store.outbox.peek(100)]

    def record(self) -> Record:
        found = self.store.find(record_id("work", "t1"))
        assert found is not None
        return found  # type: ignore[no-any-return]


def write(session: Session, what: str) -> None:
    session.execute(text("INSERT INTO effects (what) VALUES (:what)"), {"what": what})


class Rows(DeclarativeBase):
    """What is mapped here."""


class Effect(Rows):
    """A row of ``effects`` that is written when its session is flushed, and not before."""

    __tablename__ = "effects"
    id: Mapped[int] = mapped_column(primary_key=True)
    what: Mapped[str]
