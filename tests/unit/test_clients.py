"""Guarded HTTP clients, against a server that answers as it is told."""

from __future__ import annotations

import asyncio
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
import requests

from taskguard.clients.httpx import AsyncGuardedTransport, GuardedTransport
from taskguard.clients.requests import GuardedAdapter
from taskguard.downstream import timeouts
from taskguard.downstream.service import Downstream
from taskguard.errors import BulkheadFullError, CircuitOpenError, DownstreamTimeout, RateLimitedError
from taskguard.policies import CircuitBreaker, FixedWindow, Limit, Retry, Timeout, TokenBucket
from tests.unit.permithouse import PATIENCE, PermitHouse


class Site:
    """A server on this host: ``/<status>`` answers with it, ``/hang`` waits, ``/trickle`` sends bytes now and then."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.headers: dict[str, str] = {}
        self.goes_on = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.seen.append(self.headers)
                word = self.path.strip("/")
                if word == "hang":
                    site.goes_on.wait(PATIENCE)
                    word = "200"
                body = b"x" * (5 if word == "trickle" else 2)
                self.send_response(200 if word == "trickle" else int(word))
                for name, value in site.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                for index in range(len(body)):
                    if word == "trickle":
                        if site.goes_on.wait(0.05):
                            break
                        self.wfile.flush()
                    self.wfile.write(body[index : index + 1])

            def log_message(self, *_: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.goes_on.set()
    site.server.shutdown()
    site.server.server_close()


@pytest.fixture
def permits() -> PermitHouse:
    return PermitHouse()


class Client:
    """One of the three clients, used alike."""

    def __init__(self, kind: str, bank: Downstream) -> None:
        self.kind = kind
        self.bank = bank
        self.late: tuple[type[Exception], ...] = (httpx.TimeoutException, requests.exceptions.Timeout)

    def get(self, url: str) -> int:
        match self.kind:
            case "httpx":
                with httpx.Client(transport=GuardedTransport(self.bank)) as client:
                    return client.get(url).status_code
            case "requests":
                with requests.Session() as session:
                    session.mount("http://", GuardedAdapter(self.bank))
                    return session.get(url).status_code
            case _:
                return asyncio.run(self.aget(url))

    async def aget(self, url: str) -> int:
        async with httpx.AsyncClient(transport=AsyncGuardedTransport(self.bank)) as client:
            return (await client.get(url)).status_code


@pytest.fixture(params=["httpx", "async", "requests"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_an_answer_is_judged_by_its_status(permits: PermitHouse, site: Site, kind: str) -> None:
    """5xx and 429 are failures though nothing is raised; 404 is an answer. The circuit then refuses."""
    bank = permits.downstream(circuit=CircuitBreaker(minimum_calls=4, failure_rate_threshold=0.5))
    client = Client(kind, bank)
    assert [client.get(f"{site.url}/{status}") for status in (200, 404, 500, 429)] == [200, 404, 500, 429]
    stats = bank.stats()
    assert (stats.circuit_breaker_success_total, stats.circuit_breaker_failures_total) == (2, 2)
    with pytest.raises(CircuitOpenError):
        client.get(f"{site.url}/200")
    assert len(site.seen) == 4


def test_a_retry_after_holds_the_fleet(permits: PermitHouse, site: Site, kind: str) -> None:
    """No process calls before the downstream wants it."""
    site.headers = {"Retry-After": "20"}
    bank = permits.downstream(rate=TokenBucket(100))
    assert Client(kind, bank).get(f"{site.url}/429") == 429
    other = permits.downstream(desk=permits.another_desk(), rate=TokenBucket(100))
    with pytest.raises(RateLimitedError) as caught:
        Client(kind, other).get(f"{site.url}/200")
    assert caught.value.retry_after == pytest.approx(20, abs=0.1)
    permits.clock.advance(20.001)
    assert Client(kind, bank).get(f"{site.url}/200") == 200


def test_the_budget_is_the_requests_timeout_and_is_sent_on(permits: PermitHouse, site: Site, kind: str) -> None:
    """A server that hangs is left after what is left; the next service learns how long that is."""
    bank = permits.downstream(timeout=Timeout(connect=5, read=5, total=8), circuit=CircuitBreaker())
    client = Client(kind, bank)
    with timeouts.budget(1.5), pytest.raises(client.late):
        client.get(f"{site.url}/hang")
    assert 0 < int(site.seen[0]["X-Request-Deadline-Ms"]) <= 1500
    stats = bank.stats()
    assert (stats.request_timeout_total, stats.circuit_breaker_failures_total) == (1, 1)
    site.goes_on.set()
    assert client.get(f"{site.url}/200") == 200
    assert 5000 < int(site.seen[1]["X-Request-Deadline-Ms"]) <= 8000


def test_a_request_without_time_is_not_sent(permits: PermitHouse, site: Site, kind: str) -> None:
    """The budget is over before it begins."""
    token = timeouts.deadline_at.set(1.0)
    try:
        with pytest.raises(DownstreamTimeout):
            Client(kind, permits.downstream(timeout=5)).get(f"{site.url}/200")
    finally:
        timeouts.deadline_at.reset(token)
    assert site.seen == []


def test_a_server_that_trickles_is_left_too(permits: PermitHouse, site: Site, kind: str) -> None:
    """Each byte is in time, all of them are not."""
    bank = permits.downstream(timeout=Timeout(total=0.2), concurrency=1)
    client = Client(kind, bank)
    with pytest.raises(client.late):
        client.get(f"{site.url}/trickle")
    assert bank.stats().request_timeout_total == 1
    assert bank.stats().bulkhead_active == 0


def test_a_place_is_held_until_the_answer_is_read(permits: PermitHouse, site: Site) -> None:
    """httpx streams: headers alone are not the end of the call."""
    bank = permits.downstream(concurrency=1)
    with httpx.Client(transport=GuardedTransport(bank)) as client:
        with client.stream("GET", f"{site.url}/200") as response:
            assert bank.stats().bulkhead_active == 1
            with pytest.raises(BulkheadFullError):
                client.get(f"{site.url}/200")
            response.read()
        assert bank.stats().bulkhead_active == 0
        assert client.get(f"{site.url}/200").text == "xx"


def test_a_request_inside_a_call_is_covered_and_each_try_pays(permits: PermitHouse, site: Site, kind: str) -> None:
    """bank.call(client.get, ...) is one call; its retry is a second one."""
    bank = permits.downstream(
        rate=FixedWindow(3, per=60),
        concurrency=1,
        retry=Retry(max_retries=1, first_delay=0.001, max_delay=0.001, retry_on=(http.client.HTTPException,)),
    )
    client = Client(kind if kind != "async" else "httpx", bank)
    statuses = iter(["500", "200", "200", "200"])

    def charge() -> int:
        status = client.get(f"{site.url}/{next(statuses)}")
        if status == 500:
            raise http.client.HTTPException
        return status

    assert bank.call(charge) == 200
    assert bank.call(charge) == 200
    with pytest.raises(RateLimitedError):
        bank.call(charge)
    assert len(site.seen) == 3


def test_a_key_may_be_made_of_the_request(permits: PermitHouse, site: Site, kind: str) -> None:
    """By method, host, path and url."""
    bank = permits.downstream(rate=Limit(FixedWindow(1, per=60), key="{method} {path}"))
    client = Client(kind, bank)
    assert client.get(f"{site.url}/200") == 200
    assert client.get(f"{site.url}/201") == 201
    with pytest.raises(RateLimitedError, match="GET%20%2F200"):
        client.get(f"{site.url}/200")
