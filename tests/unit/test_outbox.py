"""Sending inside a transaction: what is written, what survives, what is refused; on SQLite, with no broker in reach."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group
from sqlalchemy import Connection, create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from taskguard import ReliableTask
from taskguard.celery.effects import tell
from taskguard.celery.publishing import CapturingProducer
from taskguard.clock import wall_clock
from taskguard.envelope import Envelope, ready_item
from taskguard.errors import ConfigurationError, StoreError, UnserialisableArgument
from taskguard.headers import KEY, PREPARE
from taskguard.outbox import Outbox
from taskguard.record import Record
from tests.unit.sqlshop import SQLShop


class Shop(SQLShop):
    """An application, its outbox and a session in the business database."""

    def __init__(self, path: Path, **settings: Any) -> None:
        super().__init__(path, **settings)
        self.session = Session(self.engine)

        @self.app.task(name="charge", base=ReliableTask, shared=False, idempotency_key="order:{order_id}")
        def charge(order_id: int, card: object = None) -> None: ...

        @self.app.task(name="plain", shared=False)
        def plain(*args: object) -> None: ...

        @self.app.task(name="only", base=ReliableTask, shared=False, unique_for=60)
        def only() -> None: ...

        self.charge, self.plain, self.only = charge, plain, only

    def rows(self) -> list[Record]:
        return list(self.store.outbox.peek(1000))

    def sent(self) -> list[Envelope]:
        return [Envelope.from_wire(record.wire or b"") for record in self.rows()]

    def close(self) -> None:
        self.session.close()
        super().close()


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    """A shop with an outbox."""
    shop = Shop(tmp_path / "shop.sqlite3")
    shop.store.ping()
    yield shop
    shop.close()


def test_a_task_is_sent_if_the_transaction_commits(shop: Shop) -> None:
    """The result is Celery's own, with the id that the message has."""
    result = shop.charge.apply_async((1,), session=shop.session)
    shop.session.commit()
    [envelope] = shop.sent()
    assert (envelope.task_id, envelope.task, envelope.key) == (result.id, "charge", "order:1")
    assert isinstance(result, shop.app.AsyncResult)
    assert result.backend is shop.app.backend


def test_a_task_is_not_sent_if_it_rolls_back(shop: Shop) -> None:
    """Nothing of it is left, and the session goes on."""
    shop.charge.delay_with(shop.session, 1)
    shop.session.rollback()
    shop.charge.delay_with(shop.session, 2, card="visa")
    shop.session.commit()
    assert [envelope.key for envelope in shop.sent()] == ["order:2"]


def test_a_savepoint_that_rolls_back_takes_its_sends_along(shop: Shop) -> None:
    """And no others."""
    shop.charge.delay_with(shop.session, 1)
    with shop.session.begin_nested() as savepoint:
        shop.charge.delay_with(shop.session, 2)
        savepoint.rollback()
    shop.session.commit()
    assert [envelope.key for envelope in shop.sent()] == ["order:1"]


def test_connections_and_scoped_sessions_will_do(shop: Shop) -> None:
    """Whatever the transaction was made with."""
    with shop.engine.begin() as connection:
        shop.charge.delay_with(connection, 1)
    with shop.engine.connect() as connection:
        shop.charge.delay_with(connection, 2)
    scoped = scoped_session(sessionmaker(shop.engine))
    Outbox(scoped).send(shop.charge, (3,))
    scoped.commit()
    scoped.remove()
    assert [envelope.key for envelope in shop.sent()] == ["order:1", "order:3"]


def test_every_option_survives(shop: Shop) -> None:
    """Queue, priority, headers, key, deadline, id, links: in the message, as if it had been sent."""
    before = wall_clock()
    result = shop.charge.apply_async(
        (1,), {"card": "visa"}, session=shop.session, task_id="chosen", queue="fast", priority=7,
        headers={"trace": "t1"}, idempotency_key="mine", deadline=90, link=shop.plain.s(), countdown=60,
        serializer="json", time_limit=12,
    )  # fmt: skip
    shop.session.commit()
    [record], [envelope] = shop.rows(), shop.sent()
    assert result.id == envelope.task_id == envelope.headers["id"] == "chosen"
    assert (envelope.queue, envelope.routing_key, envelope.exchange) == ("fast", "fast", "")
    assert envelope.properties["priority"] == 7
    assert envelope.headers["trace"] == "t1"
    assert envelope.headers["timelimit"] == [12, None]
    assert (envelope.key, envelope.headers[KEY]["key"]) == ("mine", "mine")
    assert envelope.deadline_at == pytest.approx(before + 90, abs=30)
    assert record.due_at == pytest.approx(before + 60, abs=30)
    assert envelope.headers["eta"] is None, "the store waits, and not the worker"
    args, kwargs, embed = __import__("json").loads(envelope.body)
    assert (args, kwargs) == ([1], {"card": "visa"})
    assert embed["callbacks"][0]["task"] == "plain"


def test_a_delay_counts_from_the_send(shop: Shop) -> None:
    """And an eta is an instant; expires is the deadline."""
    eta = datetime.now(UTC) + timedelta(hours=2)
    shop.charge.apply_async((1,), session=shop.session, eta=eta)
    shop.charge.apply_async((2,), session=shop.session, expires=3600)
    shop.session.commit()
    now, later = shop.rows()
    assert later.due_at == pytest.approx(eta.timestamp(), abs=0.01)
    assert Envelope.from_wire(now.wire or b"").deadline_at == pytest.approx(wall_clock() + 3600, abs=30)


def test_plain_tasks_and_signatures_can_be_sent(shop: Shop) -> None:
    """With the options of the signature."""
    Outbox(shop.session).send(shop.plain.s(1).set(priority=3))
    Outbox(shop.session).send(shop.charge.si(4), countdown=5)
    shop.session.commit()
    assert [(each.task, each.properties.get("priority")) for each in shop.sent()] == [("plain", 3), ("charge", None)]


def test_a_chain_sends_its_first_step_with_the_others_inside(shop: Shop) -> None:
    """The result is that of the last step, its parent that of the first."""
    result = Outbox(shop.session).send(chain(shop.charge.s(1), shop.plain.si(2), shop.plain.si(3)))
    shop.session.commit()
    [envelope] = shop.sent()
    assert envelope.task_id == result.parent.parent.id
    steps = __import__("json").loads(envelope.body)[2]["chain"]
    assert {step["options"]["task_id"] for step in steps} == {result.id, result.parent.id}


def test_a_group_sends_its_members_together(shop: Shop) -> None:
    """In order; all of them or none."""
    result = Outbox(shop.session).send(group(shop.charge.s(n) for n in range(3)), ordering_key="orders")
    shop.session.commit()
    assert [envelope.task_id for envelope in shop.sent()] == [child.id for child in result.children]


def test_a_chord_tells_the_result_backend_nothing_before_its_first_message_goes_out(shop: Shop) -> None:
    """What the backend must know rests with that message; the backend, which is not there, was never asked."""
    result = Outbox(shop.session).send(chord([shop.charge.s(n) for n in range(3)], shop.plain.s()))
    shop.session.commit()
    envelopes = shop.sent()
    carried = [envelope.properties.get(PREPARE) for envelope in envelopes]
    group_id = envelopes[0].headers["group"]
    assert carried == [[["set_chord_size", {"value": group_id}, {"value": 3}]], None, None]
    assert {child.id for child in result.parent.children} == {envelope.task_id for envelope in envelopes}
    told: list[Any] = []
    shop.app.backend.set_chord_size = lambda *args: told.append(args)
    tell(shop.app, carried[0])
    assert told == [(group_id, 3)]


def test_outside_of_the_outbox_the_backend_is_told_as_ever(shop: Shop) -> None:
    """Recording ends with the send."""
    backend, told = shop.app.backend, []
    backend.set_chord_size = lambda *args: told.append(args)
    Outbox(shop.session).send(chord([shop.charge.s(1), shop.charge.s(2)], shop.plain.s()))
    assert told == []
    backend.set_chord_size("group", 2)
    assert told == [("group", 2)]


def test_a_message_rests_as_the_queue_item_that_redis_gets(shop: Shop) -> None:
    """The relay cuts it out; kombu reads it."""
    from kombu.transport.virtual import Message

    shop.charge.apply_async((1,), session=shop.session, priority=4)
    shop.session.commit()
    [record], [envelope] = shop.rows(), shop.sent()
    target, item = ready_item(record.wire or b"") or (b"", b"")
    json = __import__("json")
    assert json.loads(target) == {"v": 2, "queue": "celery", "priority": 4}
    channel = type("Channel", (), {"decode_body": lambda self, body, encoding: __import__("base64").b64decode(body)})()
    message = Message(json.loads(item), channel=channel)
    assert message.body == envelope.body
    assert message.headers == envelope.headers
    assert message.delivery_info == {"exchange": "", "routing_key": "celery"}


# -- async sessions ----------------------------------------------------------------------------------------------------


def test_an_async_session_is_awaited(shop: Shop) -> None:
    """`send_async`, or the sync side by ``run_sync``; a rollback takes both back."""

    async def run() -> None:
        engine = create_async_engine(shop.url.replace("sqlite:", "sqlite+aiosqlite:"))
        async with AsyncSession(engine) as session:
            result = await Outbox(session).send_async(shop.charge.s(1))
            assert result.id
            await session.run_sync(lambda sync: shop.charge.delay_with(sync, 2))
            await session.commit()
            await Outbox(session).send_async(shop.charge.s(3))
            await session.rollback()
        async with engine.begin() as connection:
            await Outbox(connection).send_async(group(shop.charge.s(4), shop.charge.s(5)))
        await engine.dispose()

    asyncio.run(run())
    assert sorted(envelope.key for envelope in shop.sent()) == ["order:1", "order:2", "order:4", "order:5"]


def test_an_async_session_that_is_not_awaited_is_told_how(shop: Shop) -> None:
    """One line with both ways."""
    session = AsyncSession(create_async_engine(shop.url.replace("sqlite:", "sqlite+aiosqlite:")))
    with pytest.raises(ConfigurationError, match="send_async"):
        shop.charge.delay_with(session, 1)
    with pytest.raises(ConfigurationError, match="use send"):
        asyncio.run(Outbox(shop.session).send_async(shop.charge.s(1)))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs", "named"), [((object(),), {}, "order_id"), ((1,), {"card": object()}, "card")]
)
def test_an_argument_that_cannot_be_sent_is_named_at_the_send(
    args: tuple[object, ...], kwargs: dict[str, object], named: str, shop: Shop
) -> None:
    """Inside the transaction, which goes on; nothing was written."""
    with pytest.raises(UnserialisableArgument, match=rf"charge: the argument {named} is a builtins.object"):
        shop.charge.apply_async(args, kwargs, session=shop.session, idempotency_key="k")
    shop.session.commit()
    assert shop.rows() == []


def test_a_session_of_another_database_is_refused(shop: Shop, tmp_path: Path) -> None:
    """By its name, or by its kind; nothing is written there."""
    other = create_engine(f"sqlite:///{tmp_path / 'other.sqlite3'}")
    with (
        other.connect() as connection,
        pytest.raises(ConfigurationError, match=r"other\.sqlite3.*outbox is .*shop"),
    ):
        shop.charge.delay_with(connection, 1)
    elsewhere = Shop(tmp_path / "x", outbox="postgresql://user:secret@db/orders")
    with pytest.raises(ConfigurationError, match="it is a sqlite database") as raised:
        elsewhere.charge.delay_with(elsewhere.session, 1)
    assert "secret" not in str(raised.value)
    elsewhere.close()
    other.dispose()


def test_the_outbox_may_be_another_database_than_the_store(tmp_path: Path) -> None:
    """The business database has it, whatever the store is."""
    url = f"sqlite:///{tmp_path / 'business.sqlite3'}"
    shop = Shop(tmp_path / "business.sqlite3", store="redis://127.0.0.1:1/0", outbox=url)
    shop.store.ping()
    shop.charge.delay_with(shop.session, 1)
    shop.session.commit()
    assert len(shop.rows()) == 1
    shop.close()


def test_without_a_sql_database_there_is_no_outbox(tmp_path: Path) -> None:
    """One line: which setting."""
    shop = Shop(tmp_path / "x", store="redis://127.0.0.1:1/0")
    with pytest.raises(ConfigurationError, match=r"the store is redis://.*taskguard_outbox"):
        shop.charge.delay_with(shop.session, 1)
    shop.close()


def test_a_missing_table_names_the_command_that_creates_it(tmp_path: Path) -> None:
    """One line, in the caller's transaction."""
    shop = Shop(tmp_path / "empty.sqlite3")
    with pytest.raises(StoreError, match="create it: taskguard schema create --store sqlite"):
        shop.charge.delay_with(shop.session, 1)
    shop.close()


def test_an_older_table_does_so_too(tmp_path: Path) -> None:
    """One that lacks the outbox's columns."""
    shop = Shop(tmp_path / "old.sqlite3")
    with shop.engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE taskguard_messages (namespace TEXT, id TEXT, task TEXT)")
    with pytest.raises(StoreError, match="taskguard schema create"):
        shop.charge.delay_with(shop.session, 1)
    shop.close()


def test_what_is_no_transaction_is_refused(shop: Shop) -> None:
    """An engine, a string, a connection that commits by itself."""
    with pytest.raises(ConfigurationError, match="is no transaction"):
        shop.charge.delay_with("orders", 1)
    autocommit = shop.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    with autocommit, pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
        shop.charge.delay_with(autocommit, 1)
    assert isinstance(autocommit, Connection)


def test_an_engine_that_commits_by_itself_is_refused(shop: Shop) -> None:
    """However that was asked for; what is asked of a connection of its counts more."""
    engine = create_engine(shop.url, isolation_level="AUTOCOMMIT")
    for each in (engine, shop.engine.execution_options(isolation_level="AUTOCOMMIT")):
        with each.connect() as connection, pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
            shop.charge.delay_with(connection, 1)
        with Session(each) as session, pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
            shop.charge.delay_with(session, 1)
    with engine.connect().execution_options(isolation_level="SERIALIZABLE") as connection:
        shop.charge.delay_with(connection, 2)
        connection.rollback()
        shop.charge.delay_with(connection, 3)
        connection.commit()
    engine.dispose()
    assert [envelope.key for envelope in shop.sent()] == ["order:3"]


def test_a_unique_task_is_refused(shop: Shop) -> None:
    """Its name would be held though the transaction rolled back."""
    with pytest.raises(ConfigurationError, match="unique_for"):
        shop.only.delay_with(shop.session)


def test_what_is_no_signature_is_refused(shop: Shop) -> None:
    """With what to give instead."""
    broken = type("Broken", (), {"app": shop.app})()
    for each in (broken, "charge", dict(shop.charge.s(1)), None):
        with pytest.raises(ConfigurationError, match="no task or signature"):
            Outbox(shop.session).send(each)
        with pytest.raises(ConfigurationError, match="no task or signature"):
            asyncio.run(Outbox(shop.session).send_async(each))


def test_an_ordering_key_without_a_session_changes_nothing(shop: Shop) -> None:
    """A later step of a canvas may bring it along; the broker is not told of it."""
    producer = CapturingProducer()
    shop.charge.apply_async((1,), ordering_key="k", ignore_result=True, producer=producer)
    assert producer.published["routing_key"] == "celery"
    assert "ordering_key" not in producer.published
