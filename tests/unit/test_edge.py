"""The HTTP edge before real applications: Starlette over ASGI, Flask over WSGI."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import flask
import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request as StarletteRequest
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from taskguard.edge import ASGIRateLimit, WSGIRateLimit, open_limiter
from taskguard.edge.responses import fields, refusal
from taskguard.errors import ConfigurationError, StoreUnavailable
from taskguard.limiter.identity import Request, RequestIdentity
from taskguard.limiter.limiter import Limiter
from taskguard.limiter.rulebook import FixedRules
from taskguard.permits import Answer, Ask
from taskguard.rules import Identity, Rule
from taskguard.stores.memory import MemoryPermits
from tests.clocks import ManualClock

Ask_ = Callable[..., httpx.Response]


class Away(MemoryPermits):
    """Permits that are away."""

    in_process = False

    def admit(self, ask: Ask) -> Answer:
        raise StoreUnavailable("store does not answer; wait")


class Slow(MemoryPermits):
    """Permits of a store that hangs until its timeout."""

    in_process = False

    def admit(self, ask: Ask) -> Answer:
        time.sleep(0.1)
        raise StoreUnavailable("store did not answer within 0.1 s; wait")


def limiter(*rules: Rule, permits: MemoryPermits | None = None, **options: Any) -> Limiter:
    """A limiter by a clock that stands still."""
    return Limiter(FixedRules(*rules), MemoryPermits(ManualClock()) if permits is None else permits, **options)


def rule(id: str = "each", limits: Any = "3/minute", **given: Any) -> Rule:
    """A rule for each client."""
    return Rule(id=id, limits=limits, **({"client": "*"} | given))


def starlette(made: Limiter, **options: Any) -> Ask_:
    """Ask a Starlette application that is behind the middleware."""

    async def orders(request: StarletteRequest) -> PlainTextResponse:
        return PlainTextResponse("served", headers={"X-App": "1"})

    routes = [Route("/orders", orders, methods=["GET", "POST"]), Route("/health", orders)]
    app = Starlette(routes=routes, middleware=[Middleware(ASGIRateLimit, limiter=made, **options)])

    def ask(method: str = "GET", path: str = "/orders", **headers: str) -> httpx.Response:
        async def asking() -> httpx.Response:
            transport = httpx.ASGITransport(app, client=(headers.pop("peer", "203.0.113.7"), 5))
            async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
                return await client.request(method, path, headers=_named(headers))

        return asyncio.run(asking())

    return ask


def flasky(made: Limiter, **options: Any) -> Ask_:
    """Ask a Flask application that is behind the middleware."""
    app = flask.Flask(__name__)

    @app.route("/orders", methods=["GET", "POST"])
    @app.route("/health")
    def orders() -> Any:
        return "served", {"X-App": "1"}

    app.wsgi_app = WSGIRateLimit(app.wsgi_app, limiter=made, **options)  # type: ignore[method-assign]

    def ask(method: str = "GET", path: str = "/orders", **headers: str) -> httpx.Response:
        transport = httpx.WSGITransport(app, remote_addr=headers.pop("peer", "203.0.113.7"))
        with httpx.Client(transport=transport, base_url="http://shop") as client:
            return client.request(method, path, headers=_named(headers))

    return ask


def _named(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


both = pytest.mark.parametrize("serve", [starlette, flasky], ids=["starlette", "flask"])


@both
class TestMiddleware:
    def test_answers_carry_what_is_left(self, serve: Callable[..., Ask_]) -> None:
        """In the fields of the draft; the application's own answer is untouched."""
        answer = serve(limiter(rule()))()
        assert (answer.status_code, answer.text, answer.headers["x-app"]) == (200, "served", "1")
        assert answer.headers["ratelimit-policy"] == '"each";q=3;w=60'
        assert answer.headers["ratelimit"] == '"each";r=2;t=20'
        assert "retry-after" not in answer.headers

    def test_a_call_over_the_limit_is_refused_with_when_to_come_back(self, serve: Callable[..., Ask_]) -> None:
        """429, Retry-After, and a problem document."""
        ask = serve(limiter(rule()))
        assert [ask().status_code for _ in range(4)] == [200, 200, 200, 429]
        answer = ask()
        assert answer.headers["retry-after"] == "20"
        assert answer.headers["ratelimit"] == '"each";r=0;t=20'
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.json() == {
            "type": "https://iana.org/assignments/http-problem-types#quota-exceeded",
            "title": "Too many requests",
            "status": 429,
            "detail": "The limit is used up; come again after Retry-After.",
            "violated-policies": ["each"],
        }
        assert "x-app" not in answer.headers

    def test_clients_are_told_apart_and_no_header_makes_a_new_one(self, serve: Callable[..., Ask_]) -> None:
        """Who forges X-Forwarded-For stays who he is; behind a trusted proxy each client is one."""
        ask = serve(limiter(rule(limits="1/minute")), identity=RequestIdentity(trusted=("10.0.0.0/8",)))
        assert [ask(x_forwarded_for=f"198.51.100.{n}").status_code for n in range(3)] == [200, 429, 429]
        behind = [ask(peer="10.0.0.1", x_forwarded_for=f"6.6.6.{n}, 198.51.100.9").status_code for n in range(2)]
        assert behind == [200, 429]
        assert ask(peer="10.0.0.1", x_forwarded_for="198.51.100.10").status_code == 200

    def test_tiers_have_limits_of_their_own(self, serve: Callable[..., Ask_]) -> None:
        """By API key and by what the application knows of it."""
        tiers = {"k1": "premium"}
        identity = RequestIdentity(
            key_header="X-Api-Key", tier=lambda request: tiers.get(request.headers.get("x-api-key", ""), "free")
        )
        ask = serve(limiter(rule("free", "1/minute", tier="free"), rule("premium", "3/minute", tier="premium")),
                    identity=identity)  # fmt: skip
        assert [ask(x_api_key="k1").status_code for _ in range(4)] == [200, 200, 200, 429]
        assert [ask(x_api_key="k2").status_code for _ in range(2)] == [200, 429]

    def test_endpoints_have_limits_of_their_own(self, serve: Callable[..., Ask_]) -> None:
        """Method and path."""
        ask = serve(limiter(rule("orders", "1/minute", endpoint="POST /orders"), rule("all", "9/minute")))
        assert [ask("POST").status_code for _ in range(2)] == [200, 429]
        answer = ask("GET")
        assert (answer.status_code, answer.headers["ratelimit-policy"]) == (200, '"all";q=9;w=60')

    def test_what_is_exempt_is_not_counted(self, serve: Callable[..., Ask_]) -> None:
        """Health checks must not spend a client's calls."""
        ask = serve(limiter(rule(limits="1/minute")), exempt=lambda request: request.path == "/health")
        answers = [ask(path="/health") for _ in range(3)]
        assert all(answer.status_code == 200 and "ratelimit" not in answer.headers for answer in answers)
        assert ask().status_code == 200

    def test_a_request_may_cost_more(self, serve: Callable[..., Ask_]) -> None:
        """And one that costs more than can ever be admitted is not told to come back."""
        ask = serve(limiter(rule()), cost=lambda request: float(request.headers.get("x-cost", 1)))
        assert ask(x_cost="3").headers["ratelimit"] == '"each";r=0;t=60'
        answer = ask(x_cost="4")
        assert (answer.status_code, answer.headers.get("retry-after")) == (429, None)
        assert "more than its limit can ever admit" in answer.json()["detail"]

    @pytest.mark.parametrize(("declared", "status"), [("allow", 200), ("refuse", 503)])
    def test_a_store_that_is_down_decides_as_declared(
        self, serve: Callable[..., Ask_], declared: Any, status: int
    ) -> None:
        """Serve, or refuse with a 503 that says when to try again."""
        answer = serve(limiter(rule(), permits=Away(), on_store_down=declared))()
        assert answer.status_code == status
        if status == 503:
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["type"].endswith("#temporary-reduced-capacity")

    def test_a_store_that_hangs_delays_nobody_longer_than_its_timeout(self, serve: Callable[..., Ask_]) -> None:
        """A hundred milliseconds once; those who come after do not wait."""
        made = limiter(rule(), permits=Slow(), timeout=0.1)
        ask = serve(made)
        assert ask().status_code == 200
        began = time.monotonic()
        identity = Identity(client="ip:203.0.113.7")
        assert all(made.check(identity).store_down for _ in range(20))
        assert time.monotonic() - began < 0.3

    def test_a_rule_may_queue(self, serve: Callable[..., Ask_]) -> None:
        """The request waits for its slot, if that is near enough."""
        made = limiter(rule(limits="10/second burst=1", over_limit="queue"), permits=MemoryPermits(), timeout=1)
        ask = serve(made, max_wait=2.0)
        began = time.monotonic()
        assert [ask().status_code for _ in range(4)] == [200] * 4
        assert time.monotonic() - began > 0.25
        impatient = serve(limiter(rule(limits="1/minute", over_limit="queue"), timeout=1), max_wait=0.1)
        assert impatient().status_code == 200
        refused = impatient()
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "60")

    def test_wrong_declarations_fail_when_they_are_made(self, serve: Callable[..., Ask_]) -> None:
        """Not on the first request."""
        for options in ({"cost": -1}, {"max_wait": -1}, {"exempt": 7}, {"identity": "me"}):
            with pytest.raises(ConfigurationError):
                serve(limiter(rule()), **options)()


def test_an_asgi_fallback_answers_in_the_applications_place() -> None:
    """A cheaper answer for who is over, with the fields that say so."""

    async def cheaper(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("cached")(scope, receive, send)

    ask = starlette(limiter(rule(limits="1/minute", over_limit="fallback")), fallback=cheaper)
    assert [ask().text for _ in range(2)] == ["served", "cached"]
    assert ask().headers["retry-after"] == "60"
    assert starlette(limiter(rule(limits="1/minute", over_limit="fallback")))().status_code == 200


def test_a_wsgi_fallback_answers_in_the_applications_place() -> None:
    """The same for WSGI."""

    def cheaper(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"cached"]

    ask = flasky(limiter(rule(limits="1/minute", over_limit="fallback")), fallback=cheaper)
    assert [ask().text for _ in range(2)] == ["served", "cached"]


def test_a_refused_head_request_has_no_body() -> None:
    """As HTTP has it."""
    ask = flasky(limiter(rule(limits="1/minute")))
    ask("HEAD")
    answer = ask("HEAD")
    assert (answer.status_code, answer.content) == (429, b"")


class TestOtherScopes:
    def run(self, scope: dict[str, Any], made: Limiter) -> list[dict[str, Any]]:
        """What is sent for this scope."""
        sent: list[dict[str, Any]] = []

        async def app(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
            await send({"type": f"{scope['type']}.accept"})

        async def receive() -> dict[str, Any]:
            return {"type": f"{scope['type']}.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(ASGIRateLimit(app, limiter=made)(scope, receive, send))
        return sent

    def test_the_lifespan_passes(self) -> None:
        """It is no call."""
        made = limiter(rule(limits="1/minute"))
        for _ in range(3):
            assert self.run({"type": "lifespan"}, made) == [{"type": "lifespan.accept"}]

    def test_a_websocket_is_one_call(self) -> None:
        """Its handshake is refused: in HTTP where the server can, else by closing."""
        made = limiter(rule(limits="1/minute"))
        scope: dict[str, Any] = {"type": "websocket", "path": "/feed", "headers": [], "client": ("203.0.113.7", 5)}
        assert self.run(scope, made)[0]["type"] == "websocket.accept"
        assert self.run(scope, made) == [{"type": "websocket.close", "code": 1013, "reason": "rate limited"}]
        start, body = self.run({**scope, "extensions": {"websocket.http.response": {}}}, made)
        assert (start["type"], start["status"]) == ("websocket.http.response.start", 429)
        assert json.loads(body["body"])["status"] == 429


class TestFields:
    ITEM = re.compile(r'"(?:[^"\\]|\\.)*"(;[a-z][a-z0-9-]*=\d{1,15})+')

    @pytest.mark.parametrize(
        ("limits", "policy"),
        [
            ("100/second", '"each";q=100;w=1'),
            ("100/second burst=300", '"each";q=100;w=1;taskguard-burst=300'),
            ("5/500ms", '"each";q=10;w=1;taskguard-burst=5'),
            ("0.5/second algorithm=leaky_bucket", '"each";q=1;w=2'),
            ("10/90seconds algorithm=sliding_log", '"each";q=10;w=90'),
            ("10/second; 1000/day", '"each-1";q=10;w=1, "each-2";q=1000;w=86400'),
        ],
    )
    def test_every_limit_is_told_in_whole_numbers(self, limits: str, policy: str) -> None:
        """As structured fields have them."""
        if limits.startswith("5/500ms"):
            policy = '"each";q=10;w=1'
        found = dict(fields(limiter(rule(limits=limits)).check(Identity(client="ann"))))
        assert found["RateLimit-Policy"] == policy
        for value in found.values():
            assert all(self.ITEM.fullmatch(item) for item in value.split(", ")), value

    def test_a_refusal_names_the_policy_as_the_fields_do(self) -> None:
        """So that a client knows which of several it violated, also when the refusal is one from memory."""
        made = limiter(rule(limits="9/second; 1/day"))
        assert made.check(Identity(client="ann")).allowed
        for _ in range(2):
            _, about, body = refusal(made.check(Identity(client="ann")))
            assert json.loads(body)["violated-policies"] == ["each-2"]
            assert '"each-2";r=0;t=86400' in dict(about)["RateLimit"]

    def test_a_call_that_no_rule_speaks_of_has_no_fields(self) -> None:
        """Nothing is promised where nothing is limited."""
        assert fields(limiter(rule(endpoint="x")).check(Identity(client="ann"))) == []

    def test_the_wait_is_rounded_up_and_never_zero(self) -> None:
        """Who comes when told is let in."""
        made = limiter(rule(limits="1000/second burst=1"))
        assert made.check(Identity(client="ann")).allowed
        status, about, body = refusal(made.check(Identity(client="ann")))
        assert status == 429
        assert dict(about)["Retry-After"] == "1"
        assert dict(about)["Content-Length"] == str(len(body))


class TestOpening:
    def test_a_limiter_on_a_store_counts_demand_and_follows_its_rules(self, sqlite_url: str) -> None:
        """One call wires rules, permits and demand."""
        from taskguard.stores import open_demand, open_rules

        open_rules(sqlite_url).put([rule(limits="2/minute")], who="ann", why="")
        made = open_limiter(sqlite_url, timeout=10)
        ask = starlette(made)
        assert [ask().status_code for _ in range(3)] == [200, 200, 429]
        assert made.demand is not None
        made.demand.flush()
        [row] = open_demand(sqlite_url).read(since=0)
        assert (row.client, row.endpoint, row.rule) == ("ip:203.0.113.7", "GET /orders", "each")
        assert (row.accepted, row.refused) == (2, 1)

    def test_limits_may_be_given_in_code(self, namespace: str) -> None:
        """For each client, without a rule in any store."""
        made = open_limiter("memory://", namespace=namespace, limits="1/minute")
        assert [made.check(Identity(client=c)).allowed for c in ("ann", "ann", "bob")] == [True, False, True]
        made = open_limiter("memory://", namespace=namespace, rules=[rule("r", "1/hour")])
        assert [made.check(Identity(client="ann")).allowed for _ in range(2)] == [True, False]

    def test_requests_are_values(self) -> None:
        """What the functions of a declaration are given."""
        request = Request(method="GET", path="/", headers={}, peer="", raw={})
        assert RequestIdentity().of(request) == Identity(endpoint="GET /")
