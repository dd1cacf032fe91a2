"""Who calls: from calls, Celery tasks and HTTP requests; and who is not believed."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskguard.errors import ConfigurationError
from taskguard.globs import LONGEST
from taskguard.limiter.identity import (
    Request,
    RequestIdentity,
    TaskIdentity,
    name,
    of_call,
    of_environ,
    of_scope,
    secret,
)
from taskguard.rules import Identity


def request(peer: str = "203.0.113.7", **headers: str) -> Request:
    """A request from *peer*."""
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return Request(method="GET", path="/orders/7", headers=named, peer=peer, raw={})


def address(peer: str, forwarded: str, *, header: Any = "x-forwarded-for", trusted: Any = ("10.0.0.0/8",)) -> str:
    """The address that is believed."""
    made = RequestIdentity(trusted=trusted, forwarded=header)
    return made.of(request(peer, **{header.replace("-", "_"): forwarded})).client


class TestAddress:
    @pytest.mark.parametrize(
        ("peer", "forwarded", "expected"),
        [
            ("203.0.113.7", "", "ip:203.0.113.7"),
            ("203.0.113.7", "198.51.100.1", "ip:203.0.113.7"),
            ("10.0.0.1", "198.51.100.1", "ip:198.51.100.1"),
            ("10.0.0.1", "1.2.3.4, 198.51.100.1", "ip:198.51.100.1"),
            ("10.0.0.1", "1.2.3.4, 198.51.100.1, 10.0.0.2", "ip:198.51.100.1"),
            ("10.0.0.1", "10.0.0.3, 10.0.0.2", "ip:10.0.0.3"),
            ("10.0.0.1", "", "ip:10.0.0.1"),
            ("10.0.0.1", "198.51.100.1:4711", "ip:198.51.100.1"),
            ("10.0.0.1", "[2001:db8:1:2:3::9]:4711", "ip:2001:db8:1:2::/64"),
            ("10.0.0.1", "2001:db8:1:2:3::9", "ip:2001:db8:1:2::/64"),
            ("10.0.0.1", "::ffff:198.51.100.1", "ip:198.51.100.1"),
            ("::ffff:10.0.0.1", "198.51.100.1", "ip:198.51.100.1"),
            ("10.0.0.1", "1.2.3.4, nonsense", "ip:10.0.0.1"),
            ("10.0.0.1", "1.2.3.4,,", "ip:10.0.0.1"),
            ("unix:", "1.2.3.4", "peer:unix:"),
            ("", "1.2.3.4", ""),
        ],
    )
    def test_x_forwarded_for_is_believed_as_far_as_proxies_are_trusted(
        self, peer: str, forwarded: str, expected: str
    ) -> None:
        """Read from the near end: what stands further left was written by who is not trusted."""
        assert address(peer, forwarded) == expected

    @pytest.mark.parametrize(
        ("forwarded", "expected"),
        [
            ("for=198.51.100.1", "ip:198.51.100.1"),
            ('For="[2001:db8:1:2::9]:4711";proto=https;by=10.0.0.1', "ip:2001:db8:1:2::/64"),
            ("for=1.2.3.4, for=198.51.100.1;by=10.0.0.2, For=10.0.0.2", "ip:198.51.100.1"),
            ("for=unknown", "ip:10.0.0.1"),
            ("for=_hidden, for=10.0.0.5", "ip:10.0.0.5"),
            ("proto=https", "ip:10.0.0.1"),
        ],
    )
    def test_forwarded_is_read_by_rfc_7239(self, forwarded: str, expected: str) -> None:
        """Quotes, brackets, ports and names that hide an address."""
        assert address("10.0.0.1", forwarded, header="forwarded") == expected

    def test_only_the_declared_header_is_believed(self) -> None:
        """A proxy that sets one passes the other through, as the client wrote it."""
        made = RequestIdentity(trusted=("10.0.0.0/8",))
        both = request("10.0.0.1", forwarded="for=1.2.3.4", x_forwarded_for="198.51.100.1")
        assert made.of(both).client == "ip:198.51.100.1"

    @given(st.text(max_size=300))
    def test_no_header_makes_an_untrusted_peer_somebody_else(self, forwarded: str) -> None:
        """Whatever a client sends."""
        assert address("203.0.113.7", forwarded) == "ip:203.0.113.7"

    @given(st.text(max_size=300))
    def test_no_beginning_of_a_header_hides_who_a_trusted_proxy_saw(self, forged: str) -> None:
        """The client's part stands left of the proxy's."""
        assert address("10.0.0.1", f"{forged}, 198.51.100.1") == "ip:198.51.100.1"
        assert address("10.0.0.1", f"{forged}, for=198.51.100.1", header="forwarded") == "ip:198.51.100.1"


class TestRequests:
    def test_the_client_is_the_declared_function_then_the_key_then_the_address(self) -> None:
        """In this order."""
        made = RequestIdentity(client=lambda request: request.headers.get("x-user"), key_header="X-Api-Key")
        assert made.of(request(x_user="ann", x_api_key="s3cret")).client == "ann"
        assert made.of(request(x_api_key="s3cret")).client == secret("s3cret")
        assert made.of(request()).client == "ip:203.0.113.7"

    def test_a_key_is_a_secret_and_stays_one(self) -> None:
        """It is in no counter, no report, no log."""
        assert "s3cret" not in secret("s3cret")
        assert secret("s3cret") != secret("s3cret2")

    def test_the_endpoint_is_method_and_path_or_what_the_function_says(self) -> None:
        """A route bounds what paths do not."""
        assert RequestIdentity().of(request()).endpoint == "GET /orders/7"
        route = RequestIdentity(endpoint=lambda request: "GET /orders/{id}", tier=lambda request: "basic")
        assert route.of(request()) == Identity(client="ip:203.0.113.7", endpoint="GET /orders/{id}", tier="basic")

    def test_a_scope_and_an_environ_say_the_same(self) -> None:
        """ASGI and WSGI."""
        scope = {
            "type": "http", "method": "GET", "path": "/ä", "client": ("10.0.0.1", 5), "headers": [
                (b"X-Forwarded-For", b"1.2.3.4"), (b"x-forwarded-for", b"198.51.100.1"), (b"x-user", b"ann")],
        }  # fmt: skip
        environ = {
            "REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": "/ä".encode().decode("latin-1"),
            "REMOTE_ADDR": "10.0.0.1", "HTTP_X_FORWARDED_FOR": "1.2.3.4, 198.51.100.1", "HTTP_X_USER": "ann",
        }  # fmt: skip
        one, two = of_scope(scope), of_environ(environ)
        assert (one.method, one.path, one.headers, one.peer) == (two.method, two.path, two.headers, two.peer)
        assert one.path == "/ä"

    @pytest.mark.parametrize(
        ("fields", "complaint"),
        [
            ({"trusted": ("10.0.0.0/99",)}, "give networks such as '10.0.0.0/8'"),
            ({"trusted": ("10.0.0.1/8",)}, "host bits set"),
            ({"trusted": "10.0.0.0/8"}, "give a list of networks"),
            ({"forwarded": "x-real-ip"}, "'x-real-ip' is not known"),
            ({"client": "ann"}, "'ann' cannot be called"),
            ({"ipv6_prefix": 0}, "must be 1 to 128"),
        ],
    )
    def test_what_cannot_work_fails_where_it_is_declared(self, fields: dict[str, Any], complaint: str) -> None:
        """Not on the first request."""
        with pytest.raises(ConfigurationError) as failure:
            RequestIdentity(**fields)
        assert complaint in str(failure.value)


def body(order: dict[str, Any], tenant: str = "none") -> None: ...


SIGNATURE = inspect.signature(body)


class TestTasks:
    def test_templates_functions_and_headers_name_the_caller(self) -> None:
        """By argument, by what the team decides, by who sent it."""
        made = TaskIdentity(
            "shop.charge",
            SIGNATURE,
            client="customer:{order[customer]}",
            endpoint=lambda order, tenant="none": f"bank-{tenant}",
            tier="header:X-Tier",
        )
        found = made.of(({"customer": 7},), {"tenant": "eu"}, {"x-tier": "premium"})
        assert found == Identity(client="customer:7", endpoint="bank-eu", task="shop.charge", tier="premium")
        assert made.of(({"customer": 7},), {}).tier == ""

    def test_a_template_that_names_no_argument_fails_where_it_is_declared(self) -> None:
        """With the name of the part."""
        with pytest.raises(ConfigurationError, match=r"client 'x:\{nobody\}' names 'nobody'"):
            TaskIdentity("shop.charge", SIGNATURE, client="x:{nobody}")

    def test_a_call_that_names_nobody_is_told(self) -> None:
        """None would unite all callers."""
        made = TaskIdentity("shop.charge", SIGNATURE, client="customer:{order[customer]}")
        with pytest.raises(ConfigurationError, match="client"):
            made.of(({"customer": None},), {})


class TestNames:
    @given(st.text())
    def test_whatever_it_is_given_a_name_can_be_shown_and_kept(self, text: str) -> None:
        """Printable and bounded."""
        made = name(text)
        assert made.isprintable()
        assert len(made) <= LONGEST
        assert made == made.strip()

    def test_two_long_names_stay_two(self) -> None:
        """Cutting alone would unite them."""
        assert name("x" * 300 + "1") != name("x" * 300 + "2")

    def test_a_call_names_what_it_knows(self) -> None:
        """Numbers are names too; None is none."""
        assert of_call(client=7, tier=None, task="t") == Identity(client="7", task="t")
