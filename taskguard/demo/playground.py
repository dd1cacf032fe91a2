"""The folder the demo leaves behind: logs, data, and which processes were started from it, so that they can be ended.

A process is ended only while its command line still shows the mark it was started with: a process id alone may belong
to somebody else by then.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from taskguard.demo.apps import search_path

FOLDER = ".taskguard-demo"


class Playground:
    """State is kept in ``state.json`` and written at every change, so that it is true even after a crash."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._file = self.path / "state.json"
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._state: dict[str, Any] = {"processes": {}, "facts": {}}
        with suppress(OSError, ValueError):
            self._state = json.loads(self._file.read_text())

    @property
    def facts(self) -> dict[str, Any]:
        """What the last demo left: URLs, namespace, queue. Empty when nothing of it is left."""
        facts: dict[str, Any] = self._state["facts"]
        return facts

    def begin(self) -> None:
        """End and forget what an earlier demo left."""
        self.stop()
        self.path.mkdir(exist_ok=True)
        (self.path / ".gitignore").write_text("*\n")
        for old in self.path.glob("*.log"):
            old.unlink()
        self._state = {"processes": {}, "facts": {}}
        self._save()

    def remember(self, **facts: Any) -> None:
        """Keep facts for a later command."""
        self._state["facts"] |= facts
        self._save()

    def spawn(
        self, name: str, command: Sequence[str], *, mark: str, environ: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process in a group of its own, its output in ``<name>.log``. *mark* is a part of its command line.

        It works in the playground, and finds the demo's `workers` first: the directory of whoever tries the demo may
        have a package of the same name.
        """
        with (self.path / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                command,
                cwd=self.path,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": search_path(), **(environ or {})},
                start_new_session=True,
            )
        self._children[name] = child
        self._state["processes"][name] = {"pid": child.pid, "mark": mark}
        self._save()
        return child

    def log(self, name: str) -> str:
        """What the process has written so far."""
        with suppress(OSError):
            return (self.path / f"{name}.log").read_text(errors="replace")
        return ""

    def last_words(self, name: str) -> str:
        """The last line of its log, and where the rest is."""
        lines = self.log(name).strip().splitlines() or ["it wrote nothing"]
        return f"{lines[-1]} (all of it is in {self.path / name}.log)"

    def stop(self, *names: str, patience: float = 5.0) -> list[str]:
        """End these processes, or all: SIGTERM, and SIGKILL to the whole group after *patience* seconds."""
        if not names:
            self._state["facts"] = {}
        chosen = {name: self._state["processes"].pop(name, None) for name in names or list(self._state["processes"])}
        alive = {name: it["pid"] for name, it in chosen.items() if it and self._runs(name, it["pid"], it["mark"])}
        for pid in alive.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        until = time.monotonic() + patience
        for name, pid in alive.items():
            while self._runs(name, pid, chosen[name]["mark"]) and time.monotonic() < until:
                time.sleep(0.05)
            _kill_group(pid)
            self._reap(name)
        if self._file.exists():
            self._save()
        return list(alive)

    def kill(self, name: str) -> None:
        """SIGKILL the process and all of its children at once."""
        self._state["processes"].pop(name, None)
        _kill_group(self._children[name].pid)
        self._reap(name)
        self._save()

    def _reap(self, name: str) -> None:
        child = self._children.pop(name, None)
        if child is not None:
            child.wait()

    def _runs(self, name: str, pid: int, mark: str) -> bool:
        child = self._children.get(name)
        if child is not None:
            return child.poll() is None
        return mark in _command_line(pid)

    def _save(self) -> None:
        self._file.write_text(json.dumps(self._state, indent=2))


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # macOS says so of a group of zombies
        os.killpg(leader, signal.SIGKILL)


def _command_line(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    with suppress(OSError):
        return subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return ""
