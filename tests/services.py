"""The servers that tests talk to: where each is, and whether it answers.

``TASKGUARD_TEST_<NAME>`` says where; unset, it is the standard port of this machine. A server that does not answer
skips the test at home. With ``TASKGUARD_REQUIRE_SERVICES=1``, as in CI, it fails the test instead: a suite that skips
its hard half must not look green.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from urllib.parse import urlsplit, urlunsplit

import pytest

DEFAULTS = {
    "redis": "redis://127.0.0.1:6379/9",
    "rabbitmq": "amqp://guest:guest@127.0.0.1:5672//",
    "postgresql": "postgresql+psycopg://postgres@127.0.0.1:5432/test",
    "mariadb": "mysql+pymysql://root@127.0.0.1:3306/test",
}
PATIENCE = 3
"""Seconds a server has to answer."""


def variable(name: str) -> str:
    """The environment variable that says where the server *name* is."""
    return f"TASKGUARD_TEST_{name.upper()}"


def required() -> bool:
    """Whether a missing server is a failure."""
    return os.environ.get("TASKGUARD_REQUIRE_SERVICES", "").lower() not in {"", "0", "false", "no"}


def require(name: str) -> str:
    """The URL of the server *name*, which answers. Otherwise the test is skipped, or fails where they are required."""
    url = os.environ.get(variable(name), DEFAULTS[name])
    trouble = _trouble(name, url)
    if not trouble:
        return url
    message = f"{name} does not answer ({trouble}); start it, or set {variable(name)} to its URL"
    if required():
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


@cache
def _trouble(name: str, url: str) -> str:
    try:
        _PROBES[name](url)
    except Exception as exc:
        return f"{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else 'no reason given'}"
    return ""


def _probe_redis(url: str) -> None:
    from redis import Redis

    with Redis.from_url(url, socket_timeout=PATIENCE, socket_connect_timeout=PATIENCE) as client:
        client.ping()


def _probe_rabbitmq(url: str) -> None:
    from kombu.connection import Connection

    with Connection(url, connect_timeout=PATIENCE) as connection:
        connection.connect()


def _probe_sql(url: str) -> None:
    from sqlalchemy import create_engine, text

    engine = create_engine(url, connect_args={"connect_timeout": PATIENCE})
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
    finally:
        engine.dispose()


_PROBES: dict[str, Callable[[str], None]] = {
    "redis": _probe_redis,
    "rabbitmq": _probe_rabbitmq,
    "postgresql": _probe_sql,
    "mariadb": _probe_sql,
}


@contextmanager
def rabbitmq_vhost(url: str, name: str) -> Iterator[str]:
    """The URL of a virtual host that ends with the block; *url* itself where `rabbitmqctl` cannot make one."""
    parts = urlsplit(url)
    ctl = shutil.which("rabbitmqctl")
    if ctl is None or parts.hostname not in {"127.0.0.1", "localhost"} or not _ran(ctl, "add_vhost", name):
        yield url
        return
    try:
        _ran(ctl, "set_permissions", "-p", name, parts.username or "guest", ".*", ".*", ".*")
        yield urlunsplit(parts._replace(path=f"/{name}"))
    finally:
        _ran(ctl, "delete_vhost", name)


def _ran(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0


def delete_queue(url: str, name: str) -> None:
    """Delete this queue, and what is in it, from the broker at *url*."""
    from kombu.connection import Connection

    with Connection(url, connect_timeout=PATIENCE) as connection, connection.channel() as channel:
        channel.queue_delete(name)


def delete_redis_keys(url: str, pattern: str) -> None:
    """Delete the keys that match *pattern*."""
    from redis import Redis

    with Redis.from_url(url, socket_timeout=PATIENCE) as client:
        for key in client.scan_iter(match=pattern, count=1000):
            client.unlink(key)


@contextmanager
def mysql_database(url: str, name: str) -> Iterator[str]:
    """The URL of a new database beside that of *url*, dropped with the block."""
    from sqlalchemy import create_engine, make_url

    engine = create_engine(url, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": PATIENCE})
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        yield make_url(url).set(database=name).render_as_string(hide_password=False)
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name}")
    finally:
        engine.dispose()


def delete_rows(url: str, namespace: str) -> None:
    """Delete the rows of *namespace*, and of those whose names begin with it, from taskguard's tables."""
    from sqlalchemy import create_engine, delete, inspect

    from taskguard.stores.sql import metadata

    engine = create_engine(url, connect_args={"connect_timeout": PATIENCE})
    try:
        with engine.begin() as connection:
            there = set(inspect(connection).get_table_names())
            for table in metadata.sorted_tables:
                if table.name in there and "namespace" in table.c:
                    connection.execute(delete(table).where(table.c.namespace.startswith(namespace)))
    finally:
        engine.dispose()
