"""Who calls what: from a call, a Celery task or an HTTP request to the `Identity` that rules speak of.

What a caller can write himself decides nothing: the address comes from a forwarded header only as far as the proxies
that wrote it are trusted, and from one header only, because a proxy that sets one passes the other through. An API key
is a secret and never becomes a name: its digest does. Text is cut to `LONGEST` and control characters are escaped, so
that whatever a client sends can be a counter, a row and a line on a terminal.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Literal

from taskguard.errors import ConfigurationError
from taskguard.globs import LONGEST
from taskguard.idempotency import KeyMaker, key_maker
from taskguard.policies.checks import one_of
from taskguard.rules import Identity

Address = IPv4Address | IPv6Address
Forwarded = Literal["x-forwarded-for", "forwarded"]
MOST_HOPS = 32
"""Elements of a forwarded header that are looked at, from the near end."""


def name(value: object) -> str:
    """*value* as a field of an identity: printable, and no longer than `LONGEST`. None is nothing."""
    text = "" if value is None else str(value).strip()
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    if len(text) > LONGEST:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        text = f"{text[: LONGEST - 17]}~{digest}"  # cut alone, two long names would be one
    return text


def secret(value: str) -> str:
    """A name for who shows this secret, from which it cannot be read: ``key:`` and half of its SHA-256."""
    return f"key:{hashlib.sha256(value.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"


def of_call(*, client: object = None, endpoint: object = None, task: object = None, tier: object = None) -> Identity:
    """The identity of a call, from whatever names it."""
    return Identity(client=name(client), endpoint=name(endpoint), task=name(task), tier=name(tier))


@dataclass(frozen=True, slots=True)
class TaskIdentity:
    """Tells who a Celery task works for. Each part is a template over the task's arguments (``"{order[customer]}"``), a
    function of them, or, written ``"header:x-tenant"``, a header of the message.

    Templates are those of idempotency keys. *signature* is the task's, without ``self``. Raises ConfigurationError for
    a template that names no argument, when it is made; the parts of a call that has none are empty.
    """

    task: str
    signature: inspect.Signature
    client: str | Callable[..., object] | None = None
    endpoint: str | Callable[..., object] | None = None
    tier: str | Callable[..., object] | None = None
    _makers: tuple[tuple[str, KeyMaker | None, str], ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        makers = tuple((part, *self._maker(part)) for part in ("client", "endpoint", "tier"))
        object.__setattr__(self, "_makers", makers)

    def _maker(self, part: str) -> tuple[KeyMaker | None, str]:
        declared = getattr(self, part)
        if isinstance(declared, str) and declared.startswith("header:"):
            return None, declared.removeprefix("header:").strip().lower()
        if callable(declared):
            return lambda args, kwargs: name(declared(*args, **kwargs)), ""
        try:
            return key_maker(declared, self.signature, task=self.task), ""
        except ConfigurationError as exc:
            raise ConfigurationError(str(exc).replace("idempotency_key", part)) from None

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any], headers: Mapping[str, Any] | None = None) -> Identity:
        """The identity of one run. Raises ConfigurationError for arguments that name nobody, such as None."""
        found: dict[str, str] = {}
        for part, maker, header in self._makers:
            if maker is not None:
                try:
                    found[part] = name(maker(args, kwargs))
                except ConfigurationError as exc:
                    raise ConfigurationError(str(exc).replace("idempotency key", part)) from None
            elif header:
                known = {str(key).lower(): value for key, value in (headers or {}).items()}
                found[part] = name(known.get(header))
        return Identity(task=name(self.task), **found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """An HTTP request, as ASGI and WSGI have it in common. ``headers``: by lower-case name, those of one name joined by
    ``", "``. ``peer``: the address of the connection, "" where the server tells none. ``raw``: the scope or environ."""

    method: str
    path: str
    headers: Mapping[str, str]
    peer: str
    raw: Mapping[str, Any] = field(repr=False)


def of_scope(scope: Mapping[str, Any]) -> Request:
    """The request of an ASGI scope."""
    headers: dict[str, str] = {}
    for key, value in scope.get("headers", ()):
        known, text = bytes(key).decode("latin-1").lower(), bytes(value).decode("latin-1")
        headers[known] = f"{headers[known]}, {text}" if known in headers else text
    client = scope.get("client")
    return Request(
        method=str(scope.get("method", "WEBSOCKET")).upper(),
        path=str(scope.get("path", "/")),
        headers=headers,
        peer=str(client[0]) if client else "",
        raw=scope,
    )


def of_environ(environ: Mapping[str, Any]) -> Request:
    """The request of a WSGI environ."""
    headers = {
        key.removeprefix("HTTP_").replace("_", "-").lower(): str(value)
        for key, value in environ.items()
        if key.startswith("HTTP_")
    }
    path = f"{environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}" or "/"
    return Request(
        method=str(environ.get("REQUEST_METHOD", "GET")).upper(),
        path=path.encode("latin-1", "replace").decode("utf-8", "replace"),
        headers=headers,
        peer=str(environ.get("REMOTE_ADDR", "")),
        raw=environ,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestIdentity:
    """Tells whose an HTTP request is.

    client: a function of the `Request` that returns a name, or None for "not known": then the API key's digest counts
        where *key_header* is declared and sent, else the address (``ip:203.0.113.7``, an IPv6 one by its /64).
    tier: a function of the request that returns the caller's tier or role; what it returns must be among *tiers*.
    endpoint: a function of the request; without one, ``"GET /orders/7"``. Return a route such as ``"GET /orders/{id}"``
        where paths hold ids.
    trusted: networks of the proxies in front, such as ``("10.0.0.0/8",)``; only they are believed about an address.
    forwarded: the one header that these proxies set, and overwrite or append to.
    """

    client: Callable[[Request], object] | None = None
    tier: Callable[[Request], object] | None = None
    endpoint: Callable[[Request], object] | None = None
    key_header: str | None = None
    trusted: Iterable[str] = ()
    forwarded: Forwarded = "x-forwarded-for"
    ipv6_prefix: int = 64
    _networks: tuple[Any, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        for part in ("client", "tier", "endpoint"):
            if (given := getattr(self, part)) is not None and not callable(given):
                raise ConfigurationError(
                    f"RequestIdentity.{part}: {given!r} cannot be called; give a function of Request"
                )
        one_of("RequestIdentity.forwarded", self.forwarded, ("x-forwarded-for", "forwarded"))
        if (
            isinstance(self.ipv6_prefix, bool)
            or not isinstance(self.ipv6_prefix, int)
            or not 1 <= self.ipv6_prefix <= 128
        ):
            raise ConfigurationError(f"RequestIdentity.ipv6_prefix: {self.ipv6_prefix!r} must be 1 to 128")
        if isinstance(self.trusted, str):
            raise ConfigurationError(f"RequestIdentity.trusted: {self.trusted!r} is one text; give a list of networks")
        try:
            trusted = tuple(self.trusted)
            networks = tuple(ip_network(each) for each in trusted)
        except ValueError as exc:
            raise ConfigurationError(
                f"RequestIdentity.trusted: {exc}; give networks such as '10.0.0.0/8' or addresses"
            ) from None
        object.__setattr__(self, "trusted", trusted)
        object.__setattr__(self, "_networks", networks)

    def of(self, request: Request) -> Identity:
        """The identity of this request."""
        client = self.client(request) if self.client is not None else None
        if client is None and self.key_header is not None and (key := request.headers.get(self.key_header.lower())):
            client = secret(key)
        if client is None:
            client = self.address(request)
        endpoint = self.endpoint(request) if self.endpoint is not None else None
        return of_call(
            client=client,
            endpoint=f"{request.method} {request.path}" if endpoint is None else endpoint,
            tier=self.tier(request) if self.tier is not None else None,
        )

    def address(self, request: Request) -> str:
        """The client's address as a name: the last one that no trusted proxy has; "" where the server tells none."""
        found = _address(request.peer)
        if found is None:
            return name(f"peer:{request.peer}") if request.peer else ""
        hops = _hops(self.forwarded, request.headers.get(self.forwarded, ""))
        for hop in hops:
            if not self._trusts(found):
                break
            further = _address(hop)
            if further is None:  # "unknown", or nonsense: beyond this proxy nothing is known
                break
            found = further
        if isinstance(found, IPv6Address) and self.ipv6_prefix < 128:
            return f"ip:{IPv6Network((found, self.ipv6_prefix), strict=False)}"
        return f"ip:{found}"

    def _trusts(self, address: Address) -> bool:
        return any(address.version == network.version and address in network for network in self._networks)


def _hops(header: Forwarded, value: str) -> list[str]:
    """Who each proxy says it was called by, the nearest first."""
    if not value:
        return []
    if header == "x-forwarded-for":
        return [hop.strip() for hop in value.rsplit(",", MOST_HOPS)[-MOST_HOPS:]][::-1]
    hops = []
    for element in value.rsplit(",", MOST_HOPS)[-MOST_HOPS:]:
        pairs = (pair.partition("=") for pair in element.split(";"))
        named = {key.strip().lower(): text.strip().strip('"') for key, _, text in pairs}
        hops.append(named.get("for", ""))
    return hops[::-1]


def _address(text: str) -> Address | None:
    """The address in *text*, which may carry a port, and brackets when it is IPv6."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return found.ipv4_mapped or found if isinstance(found, IPv6Address) else found
