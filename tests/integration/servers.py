"""Servers of a test's own, which may be frozen, killed and started again on what they had written."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, Self

import psutil
import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from tests import services
from tests.integration.journal import Deadline

START = 60.0
"""Seconds in which a server has started, or ended, on a busy machine."""


def missing(what: str) -> NoReturn:
    """End the test: skipped at home, failed where servers are required."""
    message = f"{what} to let a test kill a server of its own"
    pytest.fail(message, pytrace=False) if services.required() else pytest.skip(message)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class PrivateRedis:
    """Append-only, every write on disk before its reply, unless *options* for ``redis-server`` say otherwise."""

    def __init__(self, directory: Path, *options: str) -> None:
        program = shutil.which("redis-server") or missing("redis-server is not on the PATH; install Redis")
        directory.mkdir(parents=True)
        self._port = free_port()
        self._command = [program, "--port", str(self._port), "--bind", "127.0.0.1", "--dir", str(directory)]
        self._command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always", *options]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it is, now and after a restart."""
        return f"redis://127.0.0.1:{self._port}/0"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it and wait until it answers, as the process started here and no other."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert Deadline.after(START).reached(self._answers), f"redis-server on port {self._port} does not answer"

    def _answers(self) -> bool:
        assert self._process is not None
        try:
            with Redis(port=self._port, socket_timeout=1) as client:
                return bool(client.info("server")["process_id"] == self._process.pid)
        except RedisConnectionError:  # not yet, or still loading
            return False

    def kill(self) -> None:
        """SIGKILL it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(timeout=START)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It takes connections and answers nobody while the block lasts."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)


class PrivatePostgreSQL:
    """Every commit on disk before its reply. Its databases have no encoding, as where nobody chose a locale."""

    def __init__(self) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
        program = shutil.which("postgres") or (str(found[-1]) if found else None)
        self._bin = Path(program or missing("there is no postgres; install PostgreSQL")).parent
        self._port = free_port()
        self._home = Path(tempfile.mkdtemp(prefix="taskguard-postgresql-"))  # its user may not enter pytest's
        # It refuses to run as root.
        self._user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        if self._user:
            shutil.chown(self._home, "postgres", "postgres")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it is, now and after a restart."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{self._port}/postgres"

    def __enter__(self) -> Self:
        data = str(self._home / "data")
        made = [str(self._bin / "initdb"), "-D", data, "-U", "postgres", "-A", "trust", "--no-sync", "--locale", "C"]
        subprocess.run(made, check=True, capture_output=True, timeout=60, cwd=self._home, **self._user)
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)  # so that it frees the memory it shares
        self._process.wait(timeout=START)
        shutil.rmtree(self._home)

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [str(self._bin / "postgres"), "-D", str(self._home / "data"), "-p", str(self._port)]
        command += ["-k", str(self._home), "-c", "listen_addresses=127.0.0.1"]
        with (self._home / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._home, **self._user)
        assert Deadline.after(START).reached(self._answers), (self._home / "log").read_text()

    def _answers(self) -> bool:
        import psycopg

        try:
            with psycopg.connect(f"host=127.0.0.1 port={self._port} user=postgres dbname=postgres", connect_timeout=2):
                return True
        except psycopg.OperationalError:
            return False

    def kill(self) -> None:
        """SIGKILL it, and every process that serves a connection."""
        assert self._process is not None
        tree = [*psutil.Process(self._process.pid).children(recursive=True), self._process]
        for process in tree:
            with suppress(psutil.NoSuchProcess):  # a connection may have ended by itself meanwhile
                process.kill()
        self._process.wait(timeout=START)
        psutil.wait_procs(tree[:-1], timeout=START)
