"""The edge before a Redis that accepts and never answers, that refuses, and that comes back."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from taskguard import ASGIRateLimit, open_limiter
from taskguard.events import Event
from taskguard.rules import Identity

ANN = Identity(client="ann", endpoint="GET /x")


@pytest.fixture
def black_hole() -> Iterator[str]:
    """The URL of a server that accepts connections and says nothing."""
    listener = socket.create_server(("127.0.0.1", 0))
    taken: list[socket.socket] = []

    def accept() -> None:
        with suppress(OSError):
            while True:
                taken.append(listener.accept()[0])

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for connection in taken:
        connection.close()
    accepting.join(5)


@pytest.mark.parametrize(("declared", "allowed"), [("allow", True), ("refuse", False)])
@pytest.mark.parametrize("given", [{"limits": "5/second"}, {}], ids=["limits", "rules"])
def test_a_store_that_never_answers_costs_one_timeout(
    black_hole: str, declared: Any, allowed: bool, given: dict[str, Any]
) -> None:
    """A hundred milliseconds once, also where the rules themselves cannot be read; then nothing."""
    events: list[Event] = []
    limiter = open_limiter(black_hole, on_store_down=declared, notify=events.append, **given)
    began = time.monotonic()
    assert limiter.check(ANN).allowed is allowed
    assert time.monotonic() - began < 0.3
    began = time.monotonic()
    assert [limiter.check(ANN).allowed for _ in range(50)] == [allowed] * 50
    assert time.monotonic() - began < 0.3
    assert [event.name for event in events] == ["permits_down"]


def test_the_event_loop_does_not_stand_still_meanwhile(black_hole: str) -> None:
    """Requests are answered within the timeout, and others run beside them."""

    async def served(request: Any) -> PlainTextResponse:
        return PlainTextResponse("served")

    limiter = open_limiter(black_hole, limits="5/second", timeout=1.0)
    app = Starlette(routes=[Route("/", served)], middleware=[Middleware(ASGIRateLimit, limiter=limiter)])
    longest = 0.0

    async def run() -> list[int]:
        nonlocal longest
        done = False

        async def beat() -> None:
            nonlocal longest
            last = time.monotonic()
            while not done:
                await asyncio.sleep(0.005)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()

        beating = asyncio.create_task(beat())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
            began = time.monotonic()
            answers = await asyncio.gather(*(client.get("/") for _ in range(20)))
            assert time.monotonic() - began < 3.0
        done = True
        await beating
        return [answer.status_code for answer in answers]

    assert asyncio.run(run()) == [200] * 20
    assert longest < 0.5  # a busy machine's hiccup, but not the store's second


def test_limits_hold_again_when_the_store_is_back(redis_url: str, namespace: str) -> None:
    """The outage ends by itself; nobody restarts anything."""
    events: list[Event] = []
    limiter = open_limiter(redis_url, namespace=namespace, limits="2/hour", timeout=1, notify=events.append)
    store: Any = limiter.permits.store
    right = store.connections._options["port"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = taken.getsockname()[1]
    store.connections._options["port"] = closed
    assert all(limiter.check(ANN).store_down for _ in range(20))
    store.connections._options["port"] = right
    until = time.monotonic() + 10
    while limiter.check(ANN).store_down:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert [limiter.check(ANN).allowed for _ in range(3)] == [True, False, False]
    names = [event.name for event in events]
    assert names[:2] == ["permits_down", "permits_back"]
