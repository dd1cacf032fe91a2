"""``taskguard demo`` as a newcomer types it: real workers, a real broker, real kills, and the bank's own books."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import taskguard
from tests.integration.journal import Deadline

ROOT = Path(taskguard.__file__).parents[1]
TASKGUARD = [sys.executable, "-c", "from taskguard.cli import main; main()"]
ORDERS = "60"
PATIENCE = 90.0

Process = subprocess.Popen[str]
pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.timeout(240)]


def heed_interrupts() -> None:
    """As in a terminal, also where this suite runs in the background and passes on that it ignores them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Terminal:
    """A directory in which commands are typed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def type(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``taskguard …`` to its end."""
        process = self.start(*arguments)
        out, err = process.communicate()
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def start(self, *arguments: str) -> Process:
        """Begin ``taskguard …``."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("TASKGUARD_", "CELERY_"))}
        path = os.pathsep.join(filter(None, (str(ROOT), environ.get("PYTHONPATH"))))
        return subprocess.Popen(
            [*TASKGUARD, *arguments],
            cwd=self.path,
            env={**environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_interrupts,
        )

    @property
    def processes(self) -> list[psutil.Process]:
        """All processes that the demo has started here, by the folder they write to."""
        return [process for process in psutil.process_iter() if str(self.path) in _logs_of(process)]


def _logs_of(process: psutil.Process) -> str:
    try:
        return os.readlink(f"/proc/{process.pid}/fd/2")
    except OSError:
        return ""


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """A directory of its own; what a demo leaves there is ended."""
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.type("demo", "--stop")


def eventually(met: Callable[[], bool]) -> None:
    assert Deadline.after(PATIENCE).reached(met), "it has not come about in time"


def charged(books: Path, kind: str) -> list[str]:
    with sqlite3.connect(books) as db:
        return [row[0] for row in db.execute("SELECT order_id FROM charges WHERE order_id LIKE ? || '-%'", (kind,))]


def test_the_demo_loses_nothing_and_what_it_leaves_can_be_requeued(terminal: Terminal) -> None:
    """Every fault fires, every order has one end by the bank's books, and a letter whose cause is gone completes."""
    shown = terminal.type("demo", "--orders", ORDERS, "--json")
    assert shown.returncode == 0, shown.stderr
    down = ("the bank is down", "its circuit opens", "the bank is up again", "the circuit closes")
    for event in (*down, "is SIGKILLed", "a new worker"):
        assert event in shown.stderr
    table = json.loads(shown.stdout)
    column = table["taskguard"]
    assert (column["orders"], column["lost"], column["charged_twice"], column["contradictions"]) == (60, 0, 0, 0)
    assert column["held"] == column["rescued"] >= 1
    assert column["probes"] <= 8
    assert 0 < column["unavailable"] <= 28
    assert column["limited"] == 0
    assert column["repeated"] >= 1
    assert column["suppressed"] == column["duplicates"] == 6
    assert column["dead"].keys() == {"poison", "expired", "permanent_error", "undecodable", "unknown_task"}
    assert column["charges"] + sum(column["dead"].values()) + column["discarded"] == 60

    store = ["--store", table["store"], "--namespace", table["namespace"]]
    letters: list[dict[str, Any]] = json.loads(terminal.type("dlq", "list", "--json", *store).stdout)
    assert sorted(letter["reason"] for letter in letters) == sorted(
        reason for reason, count in column["dead"].items() for _ in range(count)
    )
    books = terminal.path / ".taskguard-demo" / "bank.sqlite"
    assert charged(books, "frozen") == []
    assert terminal.type("dlq", "requeue", "--reason", "permanent_error", "--yes", *store).returncode == 0
    worker = terminal.start("demo", "--worker")
    try:
        eventually(lambda: len(charged(books, "frozen")) == column["dead"]["permanent_error"])
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.communicate(timeout=PATIENCE)
    left = json.loads(terminal.type("dlq", "list", "--json", *store).stdout)
    assert {letter["reason"] for letter in left} == column["dead"].keys() - {"permanent_error"}

    assert "redis" in terminal.type("demo", "--stop").stdout
    assert terminal.processes == []


def test_plain_celery_loses_orders_and_charges_twice_where_taskguard_does_not(terminal: Terminal) -> None:
    """The same orders and faults, side by side, on a person's screen; the exit status speaks of taskguard alone."""
    shown = terminal.type("demo", "--orders", "40", "--stock", "--json")
    assert shown.returncode == 0, shown.stderr
    table = json.loads(shown.stdout)
    ours, stock = table["taskguard"], table["plain Celery"]
    assert (ours["lost"], ours["charged_twice"]) == (0, 0)
    assert ours["sent"] == stock["sent"]
    assert (ours["limited"], stock["probes"]) == (0, 0)
    assert stock["lost"] >= 2  # the undecodable and the misshapen order, whatever else
    assert stock["charged_twice"] >= 1  # a second click in the calm, which no trouble makes into one by luck
    assert stock["rescued"] < stock["held"] or stock["held"] == 0


def test_an_interrupted_demo_leaves_no_process(terminal: Terminal) -> None:
    """Ctrl-C in the middle ends workers, bank and Redis."""
    process = terminal.start("demo", "--orders", ORDERS, "--json")
    assert process.stderr is not None
    seen = ""
    while "orders come in" not in seen:
        line = process.stderr.readline()
        assert line, f"the demo ended early: {seen}"
        seen += line
    eventually(lambda: len(terminal.processes) >= 4)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    eventually(lambda: terminal.processes == [])


def test_a_worker_without_a_demo_is_told_to_run_one_first(terminal: Terminal) -> None:
    """One line, and no traceback."""
    shown = terminal.type("demo", "--worker")
    assert shown.returncode == 1
    assert "no demo has left anything in this directory" in shown.stderr
    assert "Traceback" not in shown.stderr
