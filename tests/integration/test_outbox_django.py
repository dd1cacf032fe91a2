"""Sending inside Django's transactions, through Django's own cursor, on PostgreSQL and SQLite."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, group
from sqlalchemy import make_url

from taskguard import ReliableTask, install
from taskguard.envelope import Envelope
from taskguard.errors import ConfigurationError, StoreError
from taskguard.outbox import Outbox
from taskguard.stores.sql import SQLStore
from tests import services

NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture(scope="module")
def django_database(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Django, configured once in this process: the aliases and their URLs; the default one is SQLite."""
    from django.conf import settings

    path = tmp_path_factory.mktemp("django") / "business.sqlite3"
    url = make_url(services.require("postgresql"))
    served = {"ENGINE": "django.db.backends.postgresql", "NAME": url.database, "USER": url.username or ""}
    served |= {"HOST": url.host or "", "PORT": str(url.port or 5432), "PASSWORD": url.password or ""}
    file = {"ENGINE": "django.db.backends.sqlite3", "NAME": str(path)}
    settings.configure(DATABASES={"default": file, "served": served}, USE_TZ=True)
    import django

    django.setup()
    return {"default": f"sqlite:///{path}", "served": url.render_as_string(hide_password=False)}


@pytest.fixture(params=["default", "served"])
def shop(request: pytest.FixtureRequest, django_database: dict[str, str], namespace: str) -> Iterator[Any]:
    """An application, its outbox, Django's connection to it, and a task."""
    from django.db import connections

    url = django_database[request.param]
    app = Celery("shop", broker=NOWHERE, backend=NOWHERE, set_as_current=False)
    install(app, store=url, namespace=namespace)

    @app.task(name="charge", base=ReliableTask, shared=False)
    def charge(order_id: int, note: str = "") -> None: ...

    app.store = SQLStore.from_url(url, namespace=namespace)
    app.store.ping()
    app.connection = connections[request.param]
    yield app
    app.connection.close()
    app.store.close()
    app.taskguard.store.close()
    if request.param == "served":
        services.delete_rows(url, namespace)


def sent(app: Any) -> list[Envelope]:
    """What is in the outbox."""
    return [Envelope.from_wire(record.wire or b"") for record in app.store.outbox.peek(100)]


def test_a_task_is_sent_if_the_atomic_block_commits(shop: Any) -> None:
    """And not if it rolls back, or a savepoint in it does."""
    from django.db import transaction

    charge, connection = shop.tasks["charge"], shop.connection

    def rolled_back(number: int) -> None:
        with transaction.atomic(using=connection.alias):
            charge.delay_with(connection, number)
            raise RuntimeError("rolled back")

    with transaction.atomic(using=connection.alias):
        kept = charge.apply_async((1,), {"note": "50 %s \\ \x00 ü"}, session=connection, countdown=0)
        with pytest.raises(RuntimeError, match="rolled back"):
            rolled_back(2)
    with pytest.raises(RuntimeError, match="rolled back"):
        rolled_back(3)
    [envelope] = sent(shop)
    assert envelope.task_id == kept.id
    assert b"50 %s" in envelope.body


def test_a_group_and_a_delay_and_an_ordering_key(shop: Any) -> None:
    """What every other transaction can do."""
    from django.db import transaction

    charge, connection = shop.tasks["charge"], shop.connection
    with transaction.atomic(using=connection.alias):
        outbox = Outbox(connection)
        result = outbox.send(group(charge.s(n) for n in range(3)), ordering_key="k")
        outbox.send(charge.s(9), countdown=3600)
    assert [envelope.task_id for envelope in sent(shop)][:3] == [child.id for child in result.children]
    status = shop.store.outbox.status()
    assert (status.waiting, status.later, status.keys) == (3, 1, 1)


@pytest.mark.parametrize("shop", ["served"], indirect=True)
def test_postgresql_tells_the_relay(shop: Any) -> None:
    """With the same statement, when the block commits."""
    from django.db import transaction

    assert not shop.store.outbox.wait(0.01)
    with transaction.atomic(using=shop.connection.alias):
        shop.tasks["charge"].delay_with(shop.connection, 1)
        assert not shop.store.outbox.wait(0.05)
    assert shop.store.outbox.wait(10)


def test_outside_of_an_atomic_block_nothing_is_sent(shop: Any) -> None:
    """One line: how to."""
    with pytest.raises(ConfigurationError, match=r"transaction\.atomic"):
        shop.tasks["charge"].delay_with(shop.connection, 1)
    assert sent(shop) == []


def test_another_database_than_the_outbox_is_refused(shop: Any, django_database: dict[str, str]) -> None:
    """By the module ``django.db.transaction``, which means the default connection."""
    from django.db import connections, transaction

    if shop.connection.alias == "default":
        with transaction.atomic():
            shop.tasks["charge"].delay_with(transaction, 1)
        assert len(sent(shop)) == 1
        with (
            transaction.atomic(using="served"),
            pytest.raises(ConfigurationError, match="'served' is another database"),
        ):
            shop.tasks["charge"].delay_with(connections["served"], 1)
    else:
        with transaction.atomic(), pytest.raises(ConfigurationError, match="'default' is another database"):
            shop.tasks["charge"].delay_with(transaction, 1)


def test_a_missing_table_names_the_command(django_database: dict[str, str], tmp_path: Path, namespace: str) -> None:
    """Through Django's errors as well."""
    from django.db import connections, transaction

    path = tmp_path / "empty.sqlite3"
    connections.settings["empty"] = {**connections.settings["default"], "NAME": str(path)}
    app = Celery("shop", broker=NOWHERE, set_as_current=False)
    install(app, store=f"sqlite:///{path}", namespace=namespace)

    @app.task(name="charge", base=ReliableTask, shared=False)
    def charge(order_id: int) -> None: ...

    with pytest.raises(StoreError, match="taskguard schema create"), transaction.atomic(using="empty"):
        charge.delay_with(connections["empty"], 1)
    connections["empty"].close()


def test_django_is_imported_by_nobody_who_does_not_use_it() -> None:
    """The adapter is found when it is needed."""
    used = "{'django.db', 'taskguard.outbox.django'}"
    code = f"import sys, taskguard.outbox, taskguard.celery.worker; assert not {used} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
