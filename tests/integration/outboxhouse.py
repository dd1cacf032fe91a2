"""A business database with an outbox, a broker, and relays as processes of their own, which tests kill.

Relays are forked from a process that has imported what they need: most of a relay's start is that.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from kombu.transport.virtual import Empty
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from taskguard.stores.sql import SQLStore
from tests.integration import outboxapp
from tests.integration.journal import Deadline

ROOT = Path(__file__).parents[2]
PATIENCE = 90.0
NURSERY = multiprocessing.get_context("forkserver")
NURSERY.set_forkserver_preload([outboxapp.__name__, "taskguard.cli.outbox", "taskguard.celery.worker"])
Sent = tuple[str, int]
"""An order's key and number."""


class OutboxHouse:
    """Producers, relays and what came out at the broker. Nothing consumes until `received` is asked."""

    def __init__(self, broker: str, store: str, namespace: str, directory: Path) -> None:
        self._environ = {"OUTBOX_BROKER": broker, "OUTBOX_STORE": store, "OUTBOX_NAMESPACE": namespace}
        self._directory = directory
        self.relays: list[BaseProcess] = []
        self.store = SQLStore.from_url(store, namespace=namespace)
        self.store.ping()
        self.app = outboxapp.make_app(self._environ)
        self.engine = create_engine(store)
        self._connection = self.app.connection_for_read()
        self._received: list[Sent] = []

    def write(self, orders: Sequence[Sent], *, rollback: bool = False) -> None:
        """One transaction that sends these orders."""
        with Session(self.engine) as session:
            for key, number in orders:
                self.app.tasks["order"].apply_async((key, number), session=session, ordering_key=key or None)
            if rollback:
                session.rollback()
            else:
                session.commit()

    def start_relay(self, *options: str, dies_at: str = "") -> BaseProcess:
        """Start ``taskguard outbox relay``."""
        log = self._directory / f"relay{len(self.relays) + 1}.log"
        process = NURSERY.Process(target=outboxapp.relay, args=(self._environ, options, log, dies_at), daemon=True)
        process.start()
        self.relays.append(process)
        return process

    def wait_end(self, relay: BaseProcess) -> int | None:
        """Wait until it has ended by itself. Returns its exit status, None where it has not."""
        relay.join(timeout=PATIENCE)
        return relay.exitcode

    def wait_dead(self, relay: BaseProcess) -> None:
        """Wait until it has killed itself."""
        assert self.wait_end(relay) == -signal.SIGKILL, self.logs()

    def wait_empty(self) -> None:
        """Wait until nothing is left in the outbox."""
        empty = Deadline.after(PATIENCE).reached(lambda: self.store.due_in() is None)
        assert empty, f"{self.store.outbox.status()}\n{self.logs()}"

    def logs(self) -> str:
        """What the relays said."""
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self._directory.glob("*.log")))

    def received(self) -> list[Sent]:
        """Everything that is in the queue, in its order; what was received before included."""
        with self._connection.channel() as channel:
            queue = self.app.amqp.queues[self.app.conf.task_default_queue](channel)
            queue.declare()
            while True:
                try:
                    message = queue.get(no_ack=True, accept=["json"])
                except Empty:
                    message = None
                if message is None:
                    return list(self._received)
                body = message.body
                (key, number), _, _ = json.loads(body.decode() if isinstance(body, bytes) else body)
                self._received.append((key, number))

    def close(self) -> None:
        """End what was started."""
        for relay in self.relays:
            relay.kill()
            relay.join(timeout=PATIENCE)
        self._connection.release()
        self.app.taskguard.store.close()
        self.app.close()
        self.engine.dispose()
        self.store.close()


def assert_in_order(received: Sequence[Sent]) -> None:
    """Of each key, every number came first after all smaller ones: a copy after a crash may come again."""
    seen: dict[str, int] = {}
    for key, number in received:
        if key and number > seen.get(key, -1):
            assert number == seen.get(key, -1) + 1, f"{key}: {number} came after {seen.get(key, -1)}"
            seen[key] = number


def house_of(request: pytest.FixtureRequest, broker: str, store: str, namespace: str, path: Path) -> Iterator[Any]:
    """A house on these servers, closed afterwards."""
    urls = [request.getfixturevalue(f"{name}_url") for name in (broker, store)]
    house = OutboxHouse(*urls, namespace, path)
    yield house
    house.close()
