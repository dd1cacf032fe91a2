"""Every operation of a store over a network that fails in the middle of it.

`faultscenes` names every method of the port, found by introspection: a new method fails here until it has a scene.
Each is tried with the connection cut before each of its requests has arrived and after the server has answered each,
then with a network that swallows from any of these places on. The right answer is written by hand.
"""

from __future__ import annotations

import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import pytest

from taskguard.errors import StoreUnavailable
from taskguard.stores import open_store
from tests import services
from tests.contracts.faultscenes import SCENES, methods
from tests.integration.proxy import Fault, Proxy

NETWORKED = ("redis", "postgresql", "mariadb")
PATIENT, HASTY = 5.0, 0.4
"""Timeouts of stores, in seconds: where every answer comes or the connection ends, and where answers never come."""
MARGIN = 10.0
"""Seconds by which a call may miss its timeout: PostgreSQL's least connect timeout is two, and machines are busy."""
MOST_TURNS = 30


def test_every_operation_has_a_scene() -> None:
    """A new one cannot be forgotten."""
    assert methods() == set(SCENES)


class Line:
    """A store with *timeout* by way of a proxy, and the same store reached directly."""

    def __init__(self, stack: ExitStack, url: str, namespace: str, timeout: float) -> None:
        self.proxy = stack.enter_context(Proxy(url))
        self.timeout = timeout
        self.store = stack.enter_context(closing(open_store(self.proxy.url, namespace=namespace, timeout=timeout)))
        self.direct = stack.enter_context(closing(open_store(url, namespace=namespace, timeout=PATIENT)))

    def tried(self, name: str, fault: Fault) -> bool:
        """One call of the method *name* under *fault*, and its repeat on a network that is whole again.

        Returns whether the fault fired: the operation may have fewer turns.
        """
        call, check = SCENES[name](self.direct, uuid.uuid4().hex)
        patiently(self.store.ping)
        self.proxy.arm(fault)
        started = time.monotonic()
        try:
            check(call(self.store), self.direct)
        except StoreUnavailable:
            assert self.proxy.fired, "nothing was wrong with the network"
            assert fault.times > 1 or fault.how == "swallow", "one lost connection is no reason to give up"
        took = time.monotonic() - started
        assert took < self.timeout + MARGIN, f"took {took:.1f} s"
        fired = self.proxy.fired > 0
        self.proxy.heal()
        check(patiently(lambda: call(self.store)), self.direct)
        return fired

    def troubles(self, name: str, fault: Fault) -> str:
        """What went wrong with the method *name*, with *fault* at each of its turns in turn."""
        try:
            for number in range(1, MOST_TURNS):
                if not self.tried(name, replace(fault, number=number)):
                    return ""
        except Exception:
            return f"{name}, {fault.how} at {fault.turn} {number}:\n{traceback.format_exc()}"
        finally:
            self.store.close()  # servers have few connections, and other tests want some
            self.direct.close()
        return f"{name} has more than {MOST_TURNS} turns"


def patiently(call: Callable[[], Any], within: float = 20.0) -> Any:
    """The answer of a store behind a network that is whole: on a busy machine it may come late the first times."""
    deadline = time.monotonic() + within
    while True:
        try:
            return call()
        except StoreUnavailable:
            if time.monotonic() > deadline:
                raise


@pytest.fixture(scope="module")
def line() -> Iterator[Callable[[str, str, float], Line]]:
    """Open the line to a backend for one method and timeout, or find it open."""
    lines: dict[tuple[str, str, float], Line] = {}
    prefix = f"t{uuid.uuid4().hex[:16]}"
    with ExitStack() as stack:

        def find(backend: str, name: str, timeout: float) -> Line:
            where = (backend, name, timeout)
            if where not in lines:
                url = services.require(backend)
                lines[where] = Line(stack, url, f"{prefix}-{name}-{timeout:g}", timeout)
            return lines[where]

        yield find
        for backend in {backend for backend, _, _ in lines}:
            url = services.require(backend)
            if backend == "redis":
                services.delete_redis_keys(url, f"*{prefix}*")
            else:
                services.delete_rows(url, prefix)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault("request"), id="request-lost"),
        pytest.param(Fault("request", after=9), id="request-torn"),
        pytest.param(Fault("reply"), id="reply-lost"),
        pytest.param(Fault("reply", times=1000), id="every-reply-lost"),
        pytest.param(Fault("request", how="swallow"), id="request-swallowed"),
        pytest.param(Fault("reply", how="swallow"), id="reply-swallowed"),
    ],
)
@pytest.mark.parametrize("backend", [pytest.param(b, marks=pytest.mark.xdist_group(f"faults-{b}")) for b in NETWORKED])
def test_every_operation_outlasts_the_network(
    line: Callable[[str, str, float], Line], backend: str, fault: Fault
) -> None:
    """Whichever request or reply is lost: the right answer or StoreUnavailable, in time, and nothing is made twice.

    One lost connection is made good without an error. When the network is back the same store works, and a repeat of
    what may have been done or not gives the right answer.
    """
    services.require(backend)
    timeout = HASTY if fault.how == "swallow" else PATIENT
    lines = {name: line(backend, name, timeout) for name in sorted(SCENES)}
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda name: lines[name].troubles(name, fault), lines)
        problems = [trouble for trouble in found if trouble]
    assert not problems, "\n\n".join(problems)
