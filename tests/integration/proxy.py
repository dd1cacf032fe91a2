"""A TCP proxy in the test's own process, which does to a connection what networks do.

It cuts connections now, or at a chosen place: before a request has arrived, or when the server has answered and the
answer is lost. It swallows what is sent, stalls it (and delivers it late, as TCP does when a network is back), delays
it, turns new connections away, and counts. Requests and replies are told apart by turns: what one side sends until the
other side speaks is one turn, which is right for every protocol of questions and answers.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

T = TypeVar("T")
Turn = Literal["request", "reply"]
PORTS = {"redis": 6379, "amqp": 5672, "postgresql": 5432, "mysql": 3306}
CHUNK = 65536


@dataclass
class Fault:
    """From the turn *number* on, counted from 1 when the fault is armed, let *after* bytes pass; then do it.

    cut: close the connection. swallow: from now on everything, on every connection, is lost until `heal`.
    times: how many connections are cut.
    """

    turn: Turn
    number: int = 1
    after: int = 0
    how: Literal["cut", "swallow"] = "cut"
    times: int = 1


class _Link:
    """One connection through the proxy."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self.writers = list(writers)
        self.turn: Turn | None = None

    def abort(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


class Proxy:
    """Forwards to the server behind *url*; ``proxy.url`` is the same URL by way of the proxy."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname or "127.0.0.1", parts.port or PORTS[parts.scheme.partition("+")[0]])
        self._parts = parts
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._links: set[_Link] = set()
        self._fault: Fault | None = None
        self._turns: Counter[Turn] = Counter()
        self._passed = 0
        self._mute = self._away = False
        self.delay = 0.0
        """Seconds each turn's bytes are held up."""
        self.fired = 0
        """How often the armed fault has struck since it was armed."""
        self.connections = 0
        """Connections taken so far."""
        self.bytes: Counter[Turn] = Counter()
        """Bytes forwarded so far."""

    @property
    def url(self) -> str:
        """Where clients find the server."""
        port = self._server.sockets[0].getsockname()[1]
        user, at, _ = self._parts.netloc.rpartition("@")
        return urlunsplit(self._parts._replace(netloc=f"{user}{at}127.0.0.1:{port}"))

    def __enter__(self) -> Self:
        self._thread.start()
        self._flow = self._do(self._open)
        return self

    def __exit__(self, *exc: object) -> None:
        self._do(self._close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=60)
        self._loop.close()

    # -- what tests do to it ----------------------------------------------------------------------------------------

    def cut(self) -> int:
        """Close every connection at once. Returns how many there were."""
        return self._do(self._cut)

    def arm(self, fault: Fault) -> None:
        """Wait for the moment of *fault*, counted from now."""

        async def arm() -> None:
            self._fault, self.fired, self._passed = fault, 0, 0
            self._turns.clear()
            for link in self._links:
                link.turn = None

        self._do(arm)

    def heal(self) -> None:
        """Forget the fault. Connections whose bytes were swallowed are cut."""

        async def heal() -> None:
            was_mute, self._mute, self._fault = self._mute, False, None
            if was_mute:
                await self._cut()

        self._do(heal)

    @contextmanager
    def swallowing(self) -> Iterator[None]:
        """A black hole: connections stay and are taken, and nothing comes through or back."""
        self._mute = True
        try:
            yield
        finally:
            self.heal()

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Nothing comes through while the block lasts; all of it comes through afterwards."""
        self._do(self._hold)
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self._flow.set)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Every connection is cut, and new ones are turned away."""
        self._away = True
        try:
            self.cut()
            yield
        finally:
            self._away = False

    # -- in the proxy's thread --------------------------------------------------------------------------------------

    def _do(self, what: Callable[[], Awaitable[T]]) -> T:
        async def done() -> T:
            return await what()

        return asyncio.run_coroutine_threadsafe(done(), self._loop).result(timeout=60)

    async def _open(self) -> asyncio.Event:
        flow = asyncio.Event()
        flow.set()
        self._server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        return flow

    async def _close(self) -> None:
        self._server.close()
        self._flow.set()
        await self._cut()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _cut(self) -> int:
        for link in self._links:
            link.abort()
        return len(self._links)

    async def _hold(self) -> None:
        self._flow.clear()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        link = _Link(writer)
        self._links.add(link)
        try:
            if self._away:
                return
            if self._mute:  # the server never hears of it
                while await reader.read(CHUNK):
                    pass
                return
            with suppress(OSError):
                there, server = await asyncio.open_connection(*self._target)
                link.writers.append(server)
                pumps = [self._pump(reader, server, link, "request"), self._pump(there, writer, link, "reply")]
                tasks = [asyncio.ensure_future(pump) for pump in pumps]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        except asyncio.CancelledError:
            pass  # the proxy closes; asyncio would log it
        finally:
            link.abort()
            self._links.discard(link)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: _Link, turn: Turn) -> None:
        with suppress(OSError):
            while data := await reader.read(CHUNK):
                if self.delay:
                    await asyncio.sleep(self.delay)
                await self._flow.wait()
                if link.turn != turn:
                    link.turn = turn
                    self._turns[turn] += 1
                struck = self._strikes(turn, len(data))
                passing = data if struck is None else data[:struck]
                if passing and not self._mute:
                    self.bytes[turn] += len(passing)
                    writer.write(passing)
                    await writer.drain()
                if struck is not None and self._fault is not None:
                    self.fired += 1
                    if self._fault.how == "cut":
                        return
                    self._mute = True

    def _strikes(self, turn: Turn, size: int) -> int | None:
        """How many of these bytes still pass, when the armed fault strikes among them."""
        fault = self._fault
        if fault is None or self._mute or turn != fault.turn or self.fired >= fault.times:
            return None
        if self._turns[turn] < fault.number:
            return None
        self._passed += size
        if self._passed <= fault.after:
            return None
        return max(0, fault.after - (self._passed - size))
