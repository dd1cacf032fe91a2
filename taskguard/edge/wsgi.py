"""Limits before a WSGI application: Flask, Django, and every other. Imports none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

from taskguard.edge.entrance import Cost, Entrance, Exempt
from taskguard.edge.responses import fields, refusal
from taskguard.limiter.decision import Decision
from taskguard.limiter.identity import RequestIdentity, of_environ
from taskguard.limiter.limiter import Limiter

Environ = dict[str, Any]
StartResponse = Callable[..., Callable[[bytes], object]]
App = Callable[[Environ, StartResponse], Iterable[bytes]]


class WSGIRateLimit:
    """``app.wsgi_app = WSGIRateLimit(app.wsgi_app, limiter=open_limiter(...))`` (Flask), or round ``application``.

    Options as those of `ASGIRateLimit`. A request that waits for its slot (*max_wait*) holds its thread.
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
        self._entrance = Entrance("WSGIRateLimit", identity, cost=cost, exempt=exempt, max_wait=max_wait)

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """The WSGI application."""
        asked = self._entrance.asked(of_environ(environ))
        if asked is None:
            return self.app(environ, start_response)
        identity, cost = asked
        decision = self.limiter.enter(identity, cost, max_wait=self._entrance.max_wait)
        if decision.allowed:
            return self.app(environ, _with_fields(decision, start_response))
        rule = decision.refused_by
        if self.fallback is not None and rule is not None and rule.over_limit == "fallback":
            return self.fallback(environ, _with_fields(decision, start_response))
        status, about, body = refusal(decision)
        start_response(f"{status} {HTTPStatus(status).phrase}", about)
        return [] if environ.get("REQUEST_METHOD") == "HEAD" else [body]


def _with_fields(decision: Decision, start_response: StartResponse) -> StartResponse:
    added = fields(decision)

    def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Callable[[bytes], object]:
        return start_response(status, [*headers, *added], *exc_info)

    return start
