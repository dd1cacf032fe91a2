"""The command line with a Celery application: ``-A``, ``celery -A app taskguard``, and the relay."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from celery.bin.celery import celery as celery_command
from click.testing import CliRunner, Result

from taskguard.cli import cli
from taskguard.cli.screen import PIPE_WIDTH, console
from taskguard.stores import open_store
from tests.unit.letters import bury, message

PLAIN = """
from celery import Celery
app = Celery("shop", broker="memory://")
app.conf.taskguard_store = {store!r}
app.conf.taskguard_namespace = {namespace!r}
"""
INSTALLED = """
from celery import Celery
from taskguard.celery.install import install
app = Celery("shop", broker={broker!r})
install(app, store={store!r}, namespace={namespace!r})
"""

WriteApp = Callable[..., str]


@pytest.fixture
def write_app(tmp_path: Path, namespace: str, monkeypatch: pytest.MonkeyPatch) -> WriteApp:
    """Write a module that holds an app; returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("TASKGUARD_STORE", "TASKGUARD_NAMESPACE"):
        monkeypatch.delenv(name, raising=False)

    def write(source: str, *, store: str, broker: str = "memory://") -> str:
        name = f"app_{namespace}"
        (tmp_path / f"{name}.py").write_text(source.format(store=store, namespace=namespace, broker=broker))
        return name

    return write


def run(*words: str) -> Result:
    """Type a ``taskguard`` command that must succeed."""
    result = CliRunner().invoke(cli, words, prog_name="taskguard")
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize("source", [PLAIN, INSTALLED], ids=["configured", "installed"])
def test_the_store_is_the_apps(write_app: WriteApp, sqlite_url: str, namespace: str, source: str) -> None:
    """From its configuration, or from what `taskguard.install` was told; on the root or on the command."""
    id = bury(open_store(sqlite_url, namespace=namespace), message())
    name = write_app(source, store=sqlite_url)
    assert id in run("-A", name, "dlq", "list").output
    assert id in run("dlq", "list", "-A", name).output
    assert id not in run("-A", name, "dlq", "list", "--namespace", "another").output


def test_the_option_nearest_to_the_command_wins(sqlite_url: str, namespace: str) -> None:
    """And a store that is named needs no app to be imported."""
    id = bury(open_store(sqlite_url, namespace=namespace), message())
    near = ("dlq", "list", "--store", sqlite_url, "--namespace", namespace)
    assert id in run("--store", "memory://", "--namespace", "other", *near).output


def test_celery_runs_it_too(write_app: WriteApp, sqlite_url: str, namespace: str) -> None:
    """``celery -A app taskguard dlq list`` takes the app from Celery, and complains in one line as well."""
    id = bury(open_store(sqlite_url, namespace=namespace), message())
    name = write_app(INSTALLED, store=sqlite_url)
    if "taskguard" not in celery_command.commands:
        celery_command.add_command(cli)
    listed = CliRunner().invoke(celery_command, ["-A", name, "taskguard", "dlq", "list"])
    assert id in listed.output
    wrong = CliRunner().invoke(celery_command, ["-A", name, "taskguard", "dlq", "show", "nope"])
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (1, 1)
    assert wrong.stderr.startswith("taskguard: no dead letter has the id 'nope'")


class TestRelay:
    def test_needs_an_app_that_taskguard_is_installed_on(self, write_app: WriteApp, sqlite_url: str) -> None:
        """The way out is named."""
        name = write_app(PLAIN, store=sqlite_url)
        result = CliRunner().invoke(cli, ["relay", "-A", name])
        assert result.exit_code == 1
        assert "call taskguard.install" in result.stderr

    @pytest.mark.parametrize("named", [False, True], ids=["the app's store", "another store"])
    def test_publishes_once_what_a_requeue_made_due(
        self, write_app: WriteApp, redis_url: str, sqlite_url: str, namespace: str, named: bool
    ) -> None:
        """A dead letter goes through the store to the broker, and rests no more."""
        from kombu import Connection

        store = open_store(sqlite_url, namespace=namespace)
        queue = f"{namespace}.orders"
        id = bury(store, message(queue=queue, routing_key=queue))
        name = write_app(INSTALLED, store="memory://" if named else sqlite_url, broker=redis_url)
        words = ("-A", name, *(("--store", sqlite_url) if named else ()))
        run(*words, "dlq", "requeue", id)
        assert "Published 1 message." in run(*words, "relay", "--once").output
        assert "Published 0 messages." in run(*words, "relay", "--once").output
        assert store.find(id) is None
        with Connection(redis_url) as connection:
            received = connection.SimpleQueue(queue).get(timeout=5)
            received.ack()
        assert received.headers["taskguard"]["seq"] == 4

    def test_ends_when_told_to(self, write_app: WriteApp, redis_url: str, sqlite_url: str) -> None:
        """SIGTERM is a clean end."""
        name = write_app(INSTALLED, store=sqlite_url, broker=redis_url)
        command = "import sys; sys.path.insert(0, '.'); from taskguard.cli import main; main()"
        root = str(Path(__file__).parents[2])
        with subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path.append({root!r}); {command}", "-A", name, "relay"],
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr is not None
            try:
                assert "Relaying for shop" in process.stderr.readline()
                process.send_signal(signal.SIGTERM)
                assert process.wait(timeout=30) == 0
            finally:
                process.kill()


def test_lines_in_a_pipe_are_not_broken_where_a_small_terminal_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks for a key with grep finds it whole; COLUMNS still says otherwise."""
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console().width == PIPE_WIDTH
    monkeypatch.setenv("COLUMNS", "90")
    assert console().width == 90
