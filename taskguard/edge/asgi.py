"""Limits before an ASGI application: FastAPI, Starlette, Django and Quart, on asyncio. Imports none of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from taskguard.edge.entrance import Cost, Entrance, Exempt
from taskguard.edge.responses import fields, refusal
from taskguard.limiter.decision import Decision
from taskguard.limiter.identity import RequestIdentity, of_scope
from taskguard.limiter.limiter import Limiter

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TRY_AGAIN_LATER = 1013
"""How a websocket is closed that was refused, where the server cannot answer it in HTTP (RFC 6455 registry)."""


class ASGIRateLimit:
    """``app.add_middleware(ASGIRateLimit, limiter=open_limiter(...))``, or ``ASGIRateLimit(app, limiter=...)``.

    identity: whose a request is. cost: permits a request takes, or a function of the `Request`. exempt: a function of
    the `Request` that says which are not limited, such as health checks. max_wait: seconds a request over a limit that
    queues waits for its slot. fallback: the application that answers what a rule refuses whose ``over_limit`` is
    "fallback"; without one it is a 429. Every HTTP request and websocket handshake is one call; the event loop never
    waits for the store.
    """

    def __init__(
        self,
        app: App,
        *,
        limiter: Limiter,
        identity: RequestIdentity | None = None,
        cost: Cost = 1.0,
        exempt: Exempt | None = None,
        max_wait: float = 0.0,
        fallback: App | None = None,
    ) -> None:
        self.app = app
        self.limiter = limiter
        self.fallback = fallback
        self._entrance = Entrance("ASGIRateLimit", identity, cost=cost, exempt=exempt, max_wait=max_wait)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        asked = self._entrance.asked(of_scope(scope))
        if asked is None:
            await self.app(scope, receive, send)
            return
        identity, cost = asked
        decision = await self.limiter.aenter(identity, cost, max_wait=self._entrance.max_wait)
        if decision.allowed:
            await self.app(scope, receive, _with_fields(decision, send))
        elif self._serves_fallback(decision) and self.fallback is not None:
            await self.fallback(scope, receive, _with_fields(decision, send))
        elif scope["type"] == "http":
            await _answer("http.response", decision, send)
        else:
            await _refuse_websocket(scope, receive, decision, send)

    def _serves_fallback(self, decision: Decision) -> bool:
        return decision.refused_by is not None and decision.refused_by.over_limit == "fallback"


def _with_fields(decision: Decision, send: Send) -> Send:
    added = _encoded(fields(decision))

    async def sending(message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.accept") and added:
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await send(message)

    return sending


async def _answer(kind: str, decision: Decision, send: Send) -> None:
    status, about, body = refusal(decision)
    await send({"type": f"{kind}.start", "status": status, "headers": _encoded(about)})
    await send({"type": f"{kind}.body", "body": body})


async def _refuse_websocket(scope: Scope, receive: Receive, decision: Decision, send: Send) -> None:
    await receive()  # websocket.connect
    if "websocket.http.response" in (scope.get("extensions") or {}):
        await _answer("websocket.http.response", decision, send)
    else:
        await send({"type": "websocket.close", "code": TRY_AGAIN_LATER, "reason": "rate limited"})


def _encoded(about: list[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("ascii"), value.encode("ascii")) for name, value in about]
