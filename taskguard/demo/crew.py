"""The demo's workers: real prefork Celery workers, each a process tree of its own that can be killed whole."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping

from taskguard.demo.playground import Playground
from taskguard.errors import TaskguardError

READY_WITHIN = 45.0
PROCESSES = 2
MOST_RESTARTS = 4


class Crew:
    """Two workers. One that dies by itself is started again, as any supervisor would, a few times.

    Used as a context manager: whatever happens, none is left when the block ends.
    """

    def __init__(self, ground: Playground, app: str, *, queue: str, environ: Mapping[str, str]) -> None:
        self._ground = ground
        self._app = app
        self._queue = queue
        self._environ = environ
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._died: dict[str, int] = {}

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        if self._processes:
            self._ground.stop(*self._processes, patience=8.0)

    @property
    def up(self) -> dict[str, bool]:
        """Which workers there are, and whether each runs."""
        return {name: process.poll() is None for name, process in self._processes.items()}

    @property
    def gone(self) -> bool:
        """Whether all died so often that nobody starts them any more."""
        return not any(self.up.values()) and all(self._died.get(name, 0) > MOST_RESTARTS for name in self._processes)

    def start(self, name: str) -> None:
        """Start a worker; `wait` says when it is ready."""
        node = f"{name}@{self._queue}"
        command = worker_command(self._app, self._queue, node, "-I", "workers.chaos", "-l", "INFO")
        self._processes[name] = self._ground.spawn(name, command, mark=node, environ=self._environ)

    def wait(self) -> None:
        """Until all are ready. Raises TaskguardError with the last line of the log of one that is not."""
        until = time.monotonic() + READY_WITHIN
        for name, process in self._processes.items():
            while " ready." not in self._ground.log(name):
                if process.poll() is not None or time.monotonic() > until:
                    raise TaskguardError(f"{name} does not start: {self._ground.last_words(name)}")
                time.sleep(0.05)

    def kill(self, name: str) -> None:
        """SIGKILL its whole process tree."""
        self._ground.kill(name)

    def supervise(self, *, absent: str = "") -> list[str]:
        """Start those again that died, but for *absent*. Returns what to tell about it."""
        news = []
        for name in [name for name, up in self.up.items() if not up and name != absent]:
            died = self._died[name] = self._died.get(name, 0) + 1
            if died == 1:
                news.append(f"{name} died by itself; it is started again, {MOST_RESTARTS} times at most")
            if died <= MOST_RESTARTS:
                self.start(name)
            elif died == MOST_RESTARTS + 1:
                news.append(f"{name} died {died} times: nobody starts it any more")
        return news


def worker_command(app: str, queue: str, node: str, *more: str) -> list[str]:
    """The command line of a worker."""
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    options = ["-n", node, "-Q", queue, "-c", str(PROCESSES), *quiet, *more]
    return [sys.executable, "-m", "celery", "-A", app, "worker", *options]
