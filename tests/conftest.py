"""Fixtures for all tests. Every test has a namespace of its own, so that tests run beside each other under xdist."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import services
from tests.clocks import ManualClock
from workers.bank import Bank

# A busy machine is slow, and that is no finding.
settings.register_profile("taskguard", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("taskguard")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Hold a test marked ``service(name)`` until its server answers; skip or fail it otherwise."""
    for mark in item.iter_markers("service"):
        for name in mark.args:
            services.require(name)


class Teller:
    """Shows each failure when it happens: a run that is broken off, as by CI's time limit, prints no summary."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for each report, in the process that shows them."""
        if report.outcome not in ("passed", "skipped"):
            self._terminal.write_line("")
            self._terminal.write_line(f"{report.outcome.upper()} {report.nodeid} ({report.when})\n{report.longrepr}")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Show failures at once where several processes run the suite, which takes long."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and config.getoption("numprocesses", None):
        config.pluginmanager.register(Teller(terminal))


@pytest.fixture
def namespace() -> str:
    """A name that no other test has."""
    return f"t{uuid.uuid4().hex[:16]}"


@pytest.fixture
def clock() -> ManualClock:
    """A clock that moves only when the test says so."""
    return ManualClock()


@pytest.fixture
def redis_url(namespace: str) -> Iterator[str]:
    """A Redis that answers. Keys with this test's namespace in their name are deleted afterwards."""
    url = services.require("redis")
    yield url
    services.delete_redis_keys(url, f"*{namespace}*")


@pytest.fixture
def rabbitmq_url(namespace: str) -> Iterator[str]:
    """A RabbitMQ that answers: a virtual host for this test alone where `rabbitmqctl` can make one."""
    with services.rabbitmq_vhost(services.require("rabbitmq"), namespace) as url:
        yield url


@pytest.fixture
def postgresql_url(namespace: str) -> Iterator[str]:
    """A PostgreSQL that answers. Rows of this test's namespace are deleted afterwards."""
    url = services.require("postgresql")
    yield url
    services.delete_rows(url, namespace)


@pytest.fixture(scope="session")
def mariadb_database() -> Iterator[str]:
    """A database of this test process: InnoDB locks a neighbour's row for an instant, and ``SKIP LOCKED`` passes it."""
    with services.mysql_database(services.require("mariadb"), f"taskguard_{uuid.uuid4().hex[:12]}") as url:
        yield url


@pytest.fixture
def mariadb_url(mariadb_database: str, namespace: str) -> Iterator[str]:
    """A MariaDB or MySQL that answers. Rows of this test's namespace are deleted afterwards."""
    yield mariadb_database
    services.delete_rows(mariadb_database, namespace)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A SQLite file for this test alone."""
    return f"sqlite:///{tmp_path / 'taskguard.sqlite3'}"


@pytest.fixture
def queue_name(request: pytest.FixtureRequest, namespace: str) -> Callable[[str, str], str]:
    """Make queue names that no other test has: ``queue_name(url, "orders")``. The queues are deleted afterwards."""

    def make(url: str, word: str) -> str:
        name = f"{namespace}.{word}"
        request.node.addfinalizer(partial(services.delete_queue, url, name))  # before the virtual host goes
        return name

    return make


@pytest.fixture
def bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bank]:
    """A bank that serves on a free port and that the example workers know, without calls and charges."""
    with Bank(0, tmp_path / "books.sqlite") as bank:
        monkeypatch.setenv("BANK_URL", f"http://127.0.0.1:{bank.server_port}")
        serving = threading.Thread(target=bank.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        yield bank
        bank.shutdown()
        serving.join()
        bank.books.close()
