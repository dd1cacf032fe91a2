"""A RabbitMQ server of a row's own, told things that one would not tell a shared one."""

from __future__ import annotations

import glob
import os
import shutil
import signal
import subprocess
import uuid
from pathlib import Path
from typing import Self

from kombu.connection import Connection

from tests.integration.journal import Deadline
from tests.integration.servers import free_port, missing

PROGRAMS = ("/usr/lib/rabbitmq/bin/rabbitmq-server", "/usr/lib/rabbitmq/lib/*/sbin/rabbitmq-server")
"""The program itself: what distributions put on the PATH insists on a user of its own."""


class PrivateRabbitMQ:
    """A node with an empty disk. *settings* are of its application ``rabbit``, such as ``consumer_timeout=3000``."""

    def __init__(self, directory: Path, **settings: int) -> None:
        found = [path for pattern in PROGRAMS for path in glob.glob(pattern)]
        program = found[0] if found else shutil.which("rabbitmq-server") or missing("install rabbitmq-server")
        directory.mkdir(parents=True)
        self._program = program
        self._directory = directory
        self._port, distribution = free_port(), free_port()
        (directory / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{self._port}\n")
        terms = ", ".join(f"{{{name}, {value}}}" for name, value in settings.items())
        (directory / "advanced.config").write_text(f"[{{rabbit, [{terms}]}}].\n")
        (directory / "enabled_plugins").write_text("[].\n")
        self._environ = {
            "HOME": str(directory),
            "RABBITMQ_NODENAME": f"proof{uuid.uuid4().hex[:12]}@localhost",
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(directory / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            "RABBITMQ_PID_FILE": str(directory / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1",
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it is."""
        return f"amqp://guest:guest@127.0.0.1:{self._port}//"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it and wait until it answers."""
        with (self._directory / "out.txt").open("ab") as out:
            self._process = subprocess.Popen(
                [self._program], env={**os.environ, **self._environ}, stdout=out, stderr=out, start_new_session=True,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        if not Deadline.after(60).reached(self._answers):
            said = (self._directory / "out.txt").read_text(errors="replace")
            raise AssertionError(f"rabbitmq-server on port {self._port} does not answer:\n{said[-2000:]}")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "rabbitmq-server has ended"
        try:
            with Connection(self.url, connect_timeout=2) as connection:
                connection.connect()
        except (OSError, *Connection(self.url).connection_errors):
            return False
        return True

    def kill(self) -> None:
        """SIGKILL it."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=15)
