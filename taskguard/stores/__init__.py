"""All stores, chosen by URL."""

from __future__ import annotations

from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from taskguard.clock import Clock
from taskguard.downstream.desk import opens_urls
from taskguard.errors import ConfigurationError
from taskguard.ports import DemandStore, MessageStore, PermitStore, RuleStore

SCHEMES = "redis://, rediss://, postgresql+psycopg://, mysql+pymysql://, sqlite:///, memory://"
ROOMS = {
    "memory": "Memory",
    **dict.fromkeys(("redis", "rediss", "unix"), "Redis"),
    **dict.fromkeys(("postgresql", "postgres", "mysql", "mariadb", "sqlite"), "SQL"),
}


def open_store(
    url: str, *, namespace: str = "default", timeout: float = 5.0, clock: Clock | None = None, creates: bool = True
) -> MessageStore:
    """The store behind *url*. Nothing is connected yet; `ping` says whether it answers.

    timeout: seconds every call is bounded by.
    clock: sent as the instant of every operation; without one a store uses its server's clock.
    creates: whether a database gets the tables that it lacks; if not, what needs them raises StoreError.
    Raises ConfigurationError for an unknown scheme or an extra that is not installed.
    """
    store: MessageStore = _opened(url, "messages", "Store", namespace, timeout, clock, creates)
    return store


def open_permits(
    url: str, *, namespace: str = "default", timeout: float = 0.1, clock: Clock | None = None, creates: bool = True
) -> PermitStore:
    """The permits beside the message store behind *url*; as `open_store`, and every call ends within *timeout*."""
    store: PermitStore = _opened(url, "permits", "Permits", namespace, timeout, clock, creates)
    return store


def open_rules(
    url: str, *, namespace: str = "default", timeout: float = 5.0, clock: Clock | None = None, creates: bool = True
) -> RuleStore:
    """The rules beside the message store behind *url*; as `open_store`."""
    store: RuleStore = _opened(url, "rules", "Rules", namespace, timeout, clock, creates)
    return store


def open_demand(
    url: str, *, namespace: str = "default", timeout: float = 5.0, clock: Clock | None = None, creates: bool = True
) -> DemandStore:
    """The demand beside the message store behind *url*; as `open_store`."""
    store: DemandStore = _opened(url, "demand", "Demand", namespace, timeout, clock, creates)
    return store


def room_of(url: str) -> str:
    """Which of `ROOMS` the scheme names. Raises ConfigurationError for an unknown scheme."""
    room = ROOMS.get(urlsplit(url).scheme.split("+")[0])
    if room is None:
        raise ConfigurationError(f"store: {url!r} is not a store URL; use one of {SCHEMES}")
    return room


def _opened(
    url: str, module: str, kind: str, namespace: str, timeout: float, clock: Clock | None, creates: bool
) -> Any:
    """What is of this kind in the room that the scheme names: all rooms have the same file and class names."""
    scheme, room = urlsplit(url).scheme, room_of(url)
    try:
        found = getattr(import_module(f"{__name__}.{room.lower()}.{module}"), f"{room}{kind}")
        if room == "Memory":
            return found.shared(namespace, clock=clock)
        more = {} if room != "SQL" else {"creates": creates}
        return found.from_url(url, namespace=namespace, timeout=timeout, clock=clock, **more)
    except ModuleNotFoundError as exc:
        extra = {"Redis": "redis", "SQL": "sql"}.get(room, "all")
        if scheme.startswith(("mysql", "mariadb")):
            extra = "mysql"
        raise ConfigurationError(
            f"store {scheme}:// needs {exc.name}, which is not installed; pip install 'taskguard[{extra}]'"
        ) from exc


opens_urls(open_permits)
