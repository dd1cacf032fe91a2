"""``taskguard outbox relay --once``: its status and its one line say what is left, and why."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from sqlalchemy.orm import Session

from tests.integration.outboxhouse import PATIENCE, ROOT, OutboxHouse


@pytest.fixture
def house(redis_url: str, sqlite_url: str, namespace: str, tmp_path: Path) -> Iterator[OutboxHouse]:
    """An outbox in a file, before Redis."""
    house = OutboxHouse(redis_url, sqlite_url, namespace, tmp_path)
    yield house
    house.close()


def once(broker: str, store: str, namespace: str) -> tuple[int, str, str]:
    """Its status, and what it said on stdout and stderr."""
    environ = {"OUTBOX_BROKER": broker, "OUTBOX_STORE": store, "OUTBOX_NAMESPACE": namespace}
    command = [sys.executable, "-m", "taskguard", "-A", "tests.integration.outboxapp", "outbox", "relay", "--once"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environ}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=PATIENCE, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_all_of_it_is_status_0(house: OutboxHouse, redis_url: str, sqlite_url: str, namespace: str) -> None:
    """With how many went out."""
    house.write([("a", 0), ("a", 1), ("", 0)])
    assert once(redis_url, sqlite_url, namespace) == (0, "Published 3 messages.\n", "")
    assert len(house.received()) == 3


def test_a_broker_that_is_away_is_one_line(house: OutboxHouse, sqlite_url: str, namespace: str) -> None:
    """No traceback, status 1, and how many wait."""
    house.write([("a", 0), ("", 1)])
    status, said, complaint = once("redis://127.0.0.1:1/0", sqlite_url, namespace)
    assert (status, said) == (1, "")
    assert complaint.startswith("taskguard: the broker is away, 2 still due, published 0 messages; ")
    assert complaint.count("\n") == 1


def test_refused_messages_are_not_counted_as_published(
    house: OutboxHouse, redis_url: str, sqlite_url: str, namespace: str
) -> None:
    """Nor the ones that wait behind them; status 1."""
    with Redis.from_url(redis_url) as client:
        client.set(f"{namespace}.bad", "no list")
    with Session(house.engine) as session:
        order = house.app.tasks["order"]
        order.apply_async(("x", 0), session=session, queue=f"{namespace}.bad", ordering_key="x")
        order.apply_async(("y", 1), session=session)
        session.commit()
    status, said, complaint = once(redis_url, sqlite_url, namespace)
    assert (status, said) == (1, "")
    assert "1 refused or held back, published 1 message; " in complaint
    assert "Traceback" not in complaint
    assert house.received() == [("y", 1)]
