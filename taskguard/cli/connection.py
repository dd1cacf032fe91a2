"""Which store a command talks to: ``--store``, the app given with ``-A``, or ``TASKGUARD_STORE``.

The options are taken on the root and on every command; the one nearest to the command wins. Run as ``celery -A app
taskguard …``, the app is Celery's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar

import click

from taskguard.cli.complaints import Complaint
from taskguard.ports import DemandStore, MessageStore, PermitStore, RuleStore
from taskguard.settings import Settings
from taskguard.stores import SCHEMES, open_demand, open_permits, open_rules, open_store

Command = Callable[..., Any]
Beside = TypeVar("Beside", PermitStore, RuleStore, DemandStore)
_META = "taskguard.cli."


def _remember(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.meta[f"{_META}{param.name}"] = value


def connection_options(command: Command) -> Command:
    """Add ``--store``, ``--namespace`` and ``--app``, once."""
    if any(parameter.name == "store" for parameter in getattr(command, "__click_params__", ())):
        return command
    for names, metavar, text in (
        (("-A", "--app", "app"), "MODULE", "Celery application whose settings to use."),
        (("--namespace",), "NAME", "Namespace in the store."),
        (("--store",), "URL", "Message store; or set TASKGUARD_STORE."),
    ):
        command = click.option(*names, metavar=metavar, help=text, expose_value=False, callback=_remember)(command)
    return command


def with_store(command: Command, *, creates: bool = False) -> Command:
    """Add the connection options, and hand the command an open ``store`` that answers.

    Who only looks, and mistypes the URL, is not to leave tables in somebody's database, or an empty file.
    """

    @wraps(command)
    def opened(*args: Any, **kwargs: Any) -> Any:
        ctx = click.get_current_context()
        return command(*args, store=_open(ctx, creates), **kwargs)

    return connection_options(opened)


def with_new_store(command: Command) -> Command:
    """As `with_store`; a database gets the tables that it lacks."""
    return with_store(command, creates=True)


def with_permits(command: Command) -> Command:
    """Add the connection options, and hand the command open ``permits`` that answer.

    A database without the tables gets none, not even by who forces a circuit: no worker has ever looked there.
    """

    @wraps(command)
    def opened(*args: Any, **kwargs: Any) -> Any:
        permits = _open_beside(click.get_current_context(), open_permits, False)
        permits.now()
        return command(*args, permits=permits, **kwargs)

    return connection_options(opened)


def with_rules(command: Command, *, creates: bool = False) -> Command:
    """Add the connection options, and hand the command open ``rules`` that answer. *creates*: as `with_store`."""

    @wraps(command)
    def opened(*args: Any, **kwargs: Any) -> Any:
        store = _open_beside(click.get_current_context(), open_rules, creates)
        store.version()
        return command(*args, rules=store, **kwargs)

    return connection_options(opened)


def with_new_rules(command: Command) -> Command:
    """As `with_rules`; a database gets the tables that it lacks."""
    return with_rules(command, creates=True)


def with_demand(command: Command) -> Command:
    """Add the connection options, and hand the command the open ``demand``."""

    @wraps(command)
    def opened(*args: Any, **kwargs: Any) -> Any:
        store = _open_beside(click.get_current_context(), open_demand, False)
        store.now()
        return command(*args, demand=store, **kwargs)

    return connection_options(opened)


def named_settings(ctx: click.Context) -> dict[str, str]:
    """The settings given as options: ``store``, ``namespace``."""
    return {name: ctx.meta[_META + name] for name in ("store", "namespace") if _META + name in ctx.meta}


def celery_app(ctx: click.Context) -> Any:
    """The Celery application meant, None where none is."""
    name = ctx.meta.get(f"{_META}app")
    return _load(name) if name else getattr(ctx.obj, "app", None)


def _settings(ctx: click.Context) -> tuple[Settings, Any]:
    """The settings meant, and what the application carries of taskguard, None where no application is named."""
    given = named_settings(ctx)
    # An app is not imported for a store that was named: the operator's machine may lack what the app needs.
    named = ctx.meta.get(f"{_META}app") is None and "store" in given
    app = None if named else celery_app(ctx)
    runtime = getattr(app, "taskguard", None)
    if runtime is None:
        settings = Settings.read(given, app.conf if app is not None else {}, os.environ)
    else:
        settings = replace(runtime.settings, **given)
    if settings.store is None:
        raise Complaint(
            f"no store is named; give --store URL ({SCHEMES}), set TASKGUARD_STORE, or name the app with -A"
        )
    return settings, runtime


def _open(ctx: click.Context, creates: bool) -> MessageStore:
    settings, _ = _settings(ctx)
    assert settings.store is not None
    store = open_store(settings.store, namespace=settings.namespace, timeout=settings.store_timeout, creates=creates)
    ctx.meta[_META + "looked_in"] = settings.namespace
    ctx.call_on_close(store.close)
    store.ping()
    return store


def looked_in() -> str:
    """The namespace in which the command looked: a wrong one looks like all being well."""
    return str(click.get_current_context().meta[_META + "looked_in"])


def _open_beside(ctx: click.Context, open: Callable[..., Beside], creates: bool) -> Beside:
    """What is kept where the permits are, opened by *open*."""
    settings, _ = _settings(ctx)
    # A store named here is meant; what the application says of its permits belongs to its own.
    url = settings.store if "store" in named_settings(ctx) else settings.permits or settings.store
    assert url is not None
    timeout = max(settings.store_timeout, settings.permits_timeout)  # an operator can wait
    store = open(url, namespace=settings.namespace, timeout=timeout, creates=creates)
    ctx.call_on_close(store.close)
    return store


def _load(name: str) -> Any:
    from celery.app.utils import find_app

    module, _, attribute = name.partition(":")
    try:
        return find_app(name)
    except Exception as exc:  # importing somebody's module may raise anything
        if attribute and isinstance(exc, ModuleNotFoundError) and exc.name == name:
            # Celery has tried all of it as a module, because the module has no such name.
            raise Complaint(f"-A {name}: {module} has no Celery app {attribute!r}; name one that it has") from exc
        raise Complaint(
            f"-A {name}: cannot be loaded ({type(exc).__name__}: {exc}); "
            "name a module that holds a Celery app, such as workers.app"
        ) from exc
