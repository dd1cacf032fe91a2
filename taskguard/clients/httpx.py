"""Guarded transports for httpx: ``httpx.Client(transport=GuardedTransport(bank))``.

Each request is one call of the downstream: admitted, counted by its status (5xx and 429 are failures), bounded by the
budget. It holds its place until the response is read or closed. A Retry-After of a 429 or 503, or a RateLimit that is
used up, lets no call of the fleet through for so long. Requests are not retried here, because a transport cannot know
which may be: say ``bank.call(client.get, url)`` for that; the request inside is covered by the call round it.

Refused and DownstreamTimeout come out of the client as they are; httpx's own timeouts stay httpx's. A limit's key, and
a cost that is a function, are given ``method``, ``host``, ``path`` and ``url``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from time import monotonic
from types import TracebackType
from typing import Any, Self

import httpx

from taskguard.clients import budgets
from taskguard.clock import wall_clock
from taskguard.downstream.answers import read
from taskguard.downstream.blocks import PermitBlock
from taskguard.downstream.service import Downstream


class GuardedTransport(httpx.BaseTransport):
    """Guards what *transport* sends; None: httpx's own."""

    def __init__(self, downstream: Downstream, transport: httpx.BaseTransport | None = None) -> None:
        self._downstream = downstream
        self._transport = httpx.HTTPTransport() if transport is None else transport

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        block = _block(self._downstream, request)
        block.__enter__()
        try:
            until = _prepare(self._downstream, request)
            response = self._transport.handle_request(request)
            block.answered(read(response.status_code, response.headers, now=wall_clock()))
            stream = _Stream(response.stream, self._downstream, block, request, until)
        except BaseException as exc:
            self._downstream.tries.count(exc)
            block.__exit__(type(exc), exc, exc.__traceback__)
            raise
        return _with(response, stream)

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Self:
        self._transport.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self._transport.__exit__(exc_type, exc_value, traceback)


class AsyncGuardedTransport(httpx.AsyncBaseTransport):
    """The same for ``httpx.AsyncClient``."""

    def __init__(self, downstream: Downstream, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._downstream = downstream
        self._transport = httpx.AsyncHTTPTransport() if transport is None else transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        block = _block(self._downstream, request)
        await block.__aenter__()
        try:
            until = _prepare(self._downstream, request)
            response = await self._transport.handle_async_request(request)
            block.answered(read(response.status_code, response.headers, now=wall_clock()))
            stream = _AsyncStream(response.stream, self._downstream, block, request, until)
        except BaseException as exc:
            self._downstream.tries.count(exc)
            await block.__aexit__(type(exc), exc, exc.__traceback__)
            raise
        return _with(response, stream)

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self._transport.__aexit__(exc_type, exc_value, traceback)


def _block(downstream: Downstream, request: httpx.Request) -> PermitBlock:
    url = request.url
    known = {"method": request.method, "host": url.host, "path": url.path, "url": str(url)}
    return downstream.permit(kwargs=known, covers=False)


def _prepare(downstream: Downstream, request: httpx.Request) -> float | None:
    """Give the request its share of the budget. Returns the instant (monotonic) at which the budget is over."""
    policy = downstream.timeout
    left = budgets.allowed(policy)
    own: dict[str, Any] = dict(request.extensions.get("timeout") or {})
    bounds = {name: budgets.bounded(own.get(name), policy, name, left) for name in ("connect", "read")}
    bounds |= {name: budgets.bounded(own.get(name), None, name, left) for name in ("write", "pool")}
    request.extensions = {**request.extensions, "timeout": bounds}
    request.headers.update(budgets.sent_on(left))
    return None if left is None else monotonic() + left


def _with(response: httpx.Response, stream: Any) -> httpx.Response:
    return httpx.Response(
        status_code=response.status_code, headers=response.headers, stream=stream, extensions=response.extensions
    )


def _late(until: float | None, request: httpx.Request) -> None:
    if until is not None and monotonic() > until:
        raise httpx.ReadTimeout("the budget of this request is over before its body was read", request=request)


class _Stream(httpx.SyncByteStream):
    def __init__(
        self, stream: Any, downstream: Downstream, block: PermitBlock, request: httpx.Request, until: float | None
    ) -> None:
        self._stream, self._downstream, self._block = stream, downstream, block
        self._request, self._until = request, until

    def __iter__(self) -> Iterator[bytes]:
        try:
            for chunk in self._stream:
                _late(self._until, self._request)
                yield chunk
        except Exception as exc:
            self._downstream.tries.count(exc)
            self._block.failed()
            raise

    def close(self) -> None:
        try:
            self._stream.close()
        finally:
            self._block.__exit__(None, None, None)


class _AsyncStream(httpx.AsyncByteStream):
    def __init__(
        self, stream: Any, downstream: Downstream, block: PermitBlock, request: httpx.Request, until: float | None
    ) -> None:
        self._stream, self._downstream, self._block = stream, downstream, block
        self._request, self._until = request, until

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._stream:
                _late(self._until, self._request)
                yield chunk
        except Exception as exc:
            self._downstream.tries.count(exc)
            self._block.failed()
            raise

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            await self._block.__aexit__(None, None, None)
