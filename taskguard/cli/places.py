"""Which databases the commands of the outbox and of the schema are about."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

import click

from taskguard.cli.complaints import Complaint
from taskguard.cli.connection import celery_app, named_settings
from taskguard.settings import Settings
from taskguard.stores import open_store, room_of

SQL = ("postgresql", "postgres", "mysql", "mariadb", "sqlite")


def is_sql(url: str | None) -> bool:
    """Whether *url* names a SQL database."""
    return url is not None and url.partition("://")[0].partition("+")[0] in SQL


def settings_of(ctx: click.Context) -> Settings:
    """The settings meant: of the options, the application, the environment."""
    given: dict[str, Any] = dict(named_settings(ctx))
    if "store" in given:
        given["outbox"] = given["store"]
    app = None if "store" in given else celery_app(ctx)
    runtime = getattr(app, "taskguard", None)
    if runtime is not None and not given:
        settings: Settings = runtime.settings
        return settings
    if runtime is not None:
        given = {"store": runtime.settings.store, "outbox": runtime.settings.outbox, **given}
    return Settings.read(given, {}, os.environ)


def databases(ctx: click.Context) -> list[str]:
    """The SQL databases that the settings name: the outbox's, and the message store's."""
    settings = settings_of(ctx)
    found = list(dict.fromkeys(url for url in (settings.outbox, settings.store) if url is not None and is_sql(url)))
    named = settings.outbox or settings.store
    if not found and named is not None:
        room_of(named)  # a scheme that is none is told as everywhere
        raise Complaint(
            f"{urlsplit(named).scheme}:// is no SQL database, and the outbox and its tables are in one; "
            "give --store with its URL, or set TASKGUARD_OUTBOX"
        )
    if not found:
        raise Complaint(
            "no SQL database is named; give --store URL, set TASKGUARD_OUTBOX or TASKGUARD_STORE, or give -A"
        )
    return found


def outbox_store(ctx: click.Context, *, creates: bool = False) -> Any:
    """The store in the outbox's database, which answers. Its ``outbox`` is what the commands work on."""
    settings = settings_of(ctx)
    url, timeout = databases(ctx)[0], settings.store_timeout
    store = open_store(url, namespace=settings.namespace, timeout=timeout, creates=creates)
    ctx.call_on_close(store.close)
    store.ping()
    return store
