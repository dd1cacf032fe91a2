"""Mistakes a newcomer makes: each is told in one line where it is made."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from click.testing import CliRunner

import taskguard
from taskguard import ConfigurationError, ReliableTask, open_store
from taskguard.cli import cli
from taskguard.settings import Settings


@pytest.fixture
def app() -> Celery:
    """An application with taskguard, and tasks of this test's own."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    taskguard.install(app, store="memory://")
    return app


def body(order_id: int) -> int:
    """A task's body."""
    return order_id


@pytest.mark.parametrize("option", ["idempotency_key", "deadline", "unique_for", "on_duplicate"])
def test_a_forgotten_base_is_told(app: Celery, option: str) -> None:
    """Options of a reliable task would be taken by a plain one, and do nothing."""
    with pytest.raises(ConfigurationError, match=f"{option}= has no effect on a plain task; add base=ReliableTask"):
        app.task(**{option: "5"})(body)


@pytest.mark.parametrize("retry", ["yes", {"max_retries": 0}, 3])
def test_a_retry_that_is_no_policy_is_refused(app: Celery, retry: Any) -> None:
    """Celery would keep it as an attribute that hides its own method."""
    with pytest.raises(ConfigurationError, match="is no Retry"):
        app.task(base=ReliableTask, retry=retry)(body)


def test_a_misspelt_option_is_warned_of(app: Celery) -> None:
    """Celery takes every option for an attribute of the task, so it cannot be refused."""
    with pytest.warns(UserWarning, match="'idempotency_kee' is not known; is 'idempotency_key' meant"):
        app.task(base=ReliableTask, idempotency_kee="x:{order_id}")(body)


def test_a_misspelt_setting_in_the_configuration_is_refused() -> None:
    """As one given to `install` is."""
    with pytest.raises(ConfigurationError, match="'leese' is not a taskguard setting; known are store"):
        Settings.read({}, {"taskguard_leese": "5s"}, {})


@pytest.mark.parametrize("path", ["abc", "0x1", "1/2"])
def test_a_redis_database_that_is_no_number_is_refused(path: str) -> None:
    """redis-py would take the default database, and custody would rest where nobody looks."""
    with pytest.raises(ConfigurationError, match="is no Redis URL"):
        open_store(f"redis://127.0.0.1:6379/{path}")


def test_an_export_never_overwrites(tmp_path: Path) -> None:
    """The file may be the only copy of letters purged since."""
    kept = tmp_path / "letters.jsonl"
    kept.write_text("the only copy")
    url = f"sqlite:///{tmp_path}/store.db"
    open_store(url).ping()
    done = CliRunner().invoke(cli, ["dlq", "export", str(kept), "--store", url])
    assert done.exit_code == 1
    assert "exists already" in done.stderr
    assert kept.read_text() == "the only copy"


LOOKING = (
    "status", "dlq list", "outbox status", "limits list", "limits explain --client a", "limits report",
    "limits history", "limits export", "circuits list", "circuits show bank", "circuits open bank",
    "queues list", "queues pause mail", "queues resume mail",
)  # fmt: skip
"""Commands that change nothing, or what no worker would look at: its tables would be there."""


@pytest.mark.parametrize("command", LOOKING)
def test_whoever_looks_into_a_database_that_nobody_has_used_leaves_nothing_there(tmp_path: Path, command: str) -> None:
    """A mistyped URL looked like a store in which all is well, and left a file or tables behind."""
    mistyped, empty = tmp_path / "mistyped.db", tmp_path / "empty.db"
    empty.touch()
    for path, said in ((mistyped, "there is no such file; check the URL"), (empty, "has used this database")):
        done = CliRunner().invoke(cli, [*command.split(), "--store", f"sqlite:///{path}"])
        assert done.exit_code == 1
        assert said in done.stderr
    assert not mistyped.exists()
    assert empty.stat().st_size == 0


def test_a_worker_that_cannot_start_says_why_in_one_line(run_worker: Callable[..., tuple[int, str]]) -> None:
    """No traceback for a mistake in the configuration."""
    status, said = run_worker(TASKGUARD_STORE="memory://")
    assert status == 1
    assert "taskguard: store memory:// is not shared by the processes of a prefork pool" in said
    assert "Traceback" not in said


@pytest.fixture
def run_worker() -> Callable[..., tuple[int, str]]:
    """Start the examples' worker, which is to refuse; returns its exit status and what it said."""

    def run(**environ: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "--pool", "prefork"]
        env = os.environ | {"TASKGUARD_BROKER": "memory://"} | environ
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


def test_a_schema_check_makes_no_database(tmp_path: Path) -> None:
    """It says that there is none, and the next command says so too."""
    path = tmp_path / "mistyped.db"
    done = CliRunner().invoke(cli, ["schema", "check", "--store", f"sqlite:///{path}"])
    assert done.exit_code == 1
    assert "there is no such file" in done.stdout
    assert not path.exists()


def test_an_app_that_its_module_has_not_is_told_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery says that there is no module of the whole name."""
    (tmp_path / "kiosk.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    done = CliRunner().invoke(cli, ["status", "-A", "kiosk:nope"])
    assert done.exit_code == 1
    assert "kiosk has no Celery app 'nope'" in done.stderr


def test_a_driver_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the database that the URL names."""
    monkeypatch.setitem(sys.modules, "pymysql", None)
    for command in (["status"], ["schema", "check"]):
        done = CliRunner().invoke(cli, [*command, "--store", "mysql+pymysql://root@127.0.0.1/x"])
        assert done.exit_code == 1
        assert "pymysql, which is not installed; pip install 'taskguard[mysql]'" in done.stderr
