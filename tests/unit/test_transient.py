"""What an error says about trying again, by the shapes that client libraries give their errors."""

from __future__ import annotations

import asyncio
import errno
import http.client
import smtplib
import socket
import ssl
import urllib.error
from datetime import UTC, datetime, timedelta
from email.message import Message
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import redis.exceptions
import sqlalchemy.exc
from hypothesis import given
from hypothesis import strategies as st

from taskguard.errors import StoreUnavailable
from taskguard.transient import is_transient, retry_after

NOW = 1_700_000_000.0
REQUEST = httpx.Request("GET", "http://bank.test/")


def from_httpx(status: int, **headers: str) -> httpx.HTTPStatusError:
    response = httpx.Response(status, headers=headers, request=REQUEST)
    return httpx.HTTPStatusError("answered", request=REQUEST, response=response)


def from_urllib(status: int, **headers: str) -> urllib.error.HTTPError:
    message = Message()
    for name, value in headers.items():
        message[name] = value
    return urllib.error.HTTPError("http://bank.test/", status, "answered", message, None)


def shaped(*names: str, bases: tuple[type[BaseException], ...] = (Exception,), **fields: Any) -> BaseException:
    """An error of a library that is not installed: its class names, the most derived last, and its attributes."""
    cls: type[BaseException] | None = None
    for name in names:
        cls = type(name, bases if cls is None else (cls,), {})
    assert cls is not None
    exc = cls("stand-in")
    for name, value in fields.items():
        setattr(exc, name, value)
    return exc


def from_requests(status: int) -> BaseException:
    answer = SimpleNamespace(status_code=status, headers={})
    return shaped("RequestException", "HTTPError", bases=(OSError,), response=answer)


def from_botocore(status: int, code: str = "Whatever") -> BaseException:
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": {}}}
    return shaped("ClientError", response=response)


def from_grpc(name: str) -> BaseException:
    return shaped("RpcError", code=lambda: SimpleNamespace(name=name, value=(14, "text")))


def from_sqlalchemy(cls: type[sqlalchemy.exc.DBAPIError], *, invalidated: bool = False) -> BaseException:
    return cls("SELECT 1", None, Exception("driver"), connection_invalidated=invalidated)


TRANSIENT = [
    ConnectionError(),
    ConnectionRefusedError(),
    ConnectionResetError(),
    BrokenPipeError(),
    TimeoutError(),
    TimeoutError(),
    socket.gaierror(socket.EAI_AGAIN, "temporary failure in name resolution"),
    OSError(errno.EHOSTUNREACH, "no route"),
    OSError(errno.ENETUNREACH, "no network"),
    asyncio.IncompleteReadError(b"", 10),
    http.client.RemoteDisconnected(""),
    http.client.IncompleteRead(b""),
    ssl.SSLEOFError(8, "EOF"),
    smtplib.SMTPServerDisconnected("gone"),
    smtplib.SMTPResponseException(421, b"try later"),
    StoreUnavailable("no answer"),
    *(from_httpx(status) for status in (408, 425, 429, 500, 502, 503, 504)),
    *(from_requests(status) for status in (429, 503)),
    *(from_urllib(status) for status in (429, 500)),
    *(shaped("ClientResponseError", status=status) for status in (429, 502)),
    shaped("APIStatusError", status_code=529),
    shaped("StripeError", http_status=500),
    shaped("GoogleAPICallError", code=503),
    *(from_grpc(name) for name in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")),
    from_botocore(503),
    from_botocore(400, "ThrottlingException"),
    from_botocore(400, "ProvisionedThroughputExceededException"),
    from_botocore(400, "RequestLimitExceeded"),
    httpx.ConnectError("refused"),
    httpx.ReadTimeout("slow"),
    httpx.RemoteProtocolError("cut"),
    httpx.PoolTimeout("busy"),
    shaped("RequestException", "ConnectionError", bases=(OSError,)),
    shaped("RequestException", "Timeout", "ReadTimeout", bases=(OSError,), response=None),
    shaped("ClientError", "ClientConnectionError", "ServerDisconnectedError"),
    urllib.error.URLError(ConnectionRefusedError()),
    shaped("HTTPError", "MaxRetryError", reason=shaped("HTTPError", "NewConnectionError")),
    redis.exceptions.ConnectionError("refused"),
    redis.exceptions.TimeoutError("slow"),
    redis.exceptions.BusyLoadingError("loading"),
    redis.exceptions.ReadOnlyError("failing over"),
    from_sqlalchemy(sqlalchemy.exc.OperationalError),
    from_sqlalchemy(sqlalchemy.exc.InterfaceError, invalidated=True),
    sqlalchemy.exc.TimeoutError("pool"),
    shaped("SoftTimeLimitExceeded"),
    ExceptionGroup("both", [TimeoutError(), from_httpx(503)]),
]

PERMANENT = [
    ValueError("bad iban"),
    KeyError("x"),
    AssertionError(),
    FileNotFoundError(errno.ENOENT, "gone"),
    PermissionError(errno.EACCES, "no"),
    IsADirectoryError(),
    OSError("no errno"),
    OSError(errno.ENOSPC, "full"),
    ssl.SSLCertVerificationError("expired"),
    smtplib.SMTPResponseException(550, b"no such user"),
    *(from_httpx(status) for status in (400, 401, 403, 404, 409, 410, 422)),
    from_requests(404),
    from_urllib(403),
    shaped("ClientResponseError", status=404),
    shaped("TransportError", "NotFoundError", status_code=404),
    *(from_grpc(name) for name in ("INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED", "UNAUTHENTICATED")),
    from_botocore(400, "ValidationException"),
    from_botocore(403, "AccessDenied"),
    shaped("ClientError", response={"Error": {"Code": ["odd"]}}),
    httpx.UnsupportedProtocol("ftp"),
    httpx.InvalidURL("?"),
    httpx.TooManyRedirects("round"),
    shaped("RequestException", "InvalidURL", bases=(OSError, ValueError)),
    shaped("RequestException", "ConnectionError", "SSLError", bases=(OSError,)),
    urllib.error.URLError(ssl.SSLCertVerificationError("expired")),
    urllib.error.URLError("unknown url type"),
    redis.exceptions.AuthenticationError("wrong password"),
    redis.exceptions.ResponseError("WRONGTYPE"),
    from_sqlalchemy(sqlalchemy.exc.IntegrityError),
    from_sqlalchemy(sqlalchemy.exc.ProgrammingError),
    from_sqlalchemy(sqlalchemy.exc.InterfaceError),
    shaped("OddError", code=lambda: 1 / 0),
    shaped("OddError", code=lambda required: required),
    shaped("ChannelError", code=530, reply_code=530),
    SystemExit(1),
    ExceptionGroup("one of them", [TimeoutError(), ValueError()]),
]


def name_of(exc: BaseException) -> str:
    return f"{type(exc).__name__}-{str(exc)[:30]}"


@pytest.mark.parametrize("exc", TRANSIENT, ids=name_of)
def test_an_error_that_may_pass_is_transient(exc: BaseException) -> None:
    """Connections, timeouts, overload: the same call may succeed later."""
    assert is_transient(exc) is True


@pytest.mark.parametrize("exc", PERMANENT, ids=name_of)
def test_an_error_that_will_stay_is_permanent(exc: BaseException) -> None:
    """Everything that is not known to pass."""
    assert is_transient(exc) is False


def test_the_cause_of_an_error_does_not_count() -> None:
    """``raise InvalidOrder from timeout`` is its author's verdict."""
    exc = ValueError("no such order")
    exc.__cause__ = exc.__context__ = TimeoutError()
    assert not is_transient(exc)


def test_a_property_that_fails_is_no_answer() -> None:
    """Someone else's broken attribute neither raises nor decides."""

    class Odd(TimeoutError):
        @property
        def response(self) -> None:
            raise RuntimeError("not set")

        retry_after = response
        headers = response

    assert is_transient(Odd())
    assert retry_after(Odd(), NOW) is None


@pytest.mark.parametrize(
    ("asked", "wait"),
    [
        (30, 30.0),
        (1.5, 1.5),
        (timedelta(minutes=2), 120.0),
        ("45", 45.0),
        (b"45", 45.0),
        (-5, 0.0),
        ("-5", 0.0),
        ("soon", None),
        ("", None),
        ("9" * 400, None),
        (10**400, None),
        (float("nan"), None),
        (float("inf"), None),
        ("nan", None),
        (True, None),
        (None, None),
        (lambda: 5, None),
        ([5], None),
    ],
)
def test_an_attribute_says_how_long_to_wait(asked: object, wait: float | None) -> None:
    """Numbers, timedeltas and text; past is zero and garbage is nothing."""
    assert retry_after(shaped("RateLimited", retry_after=asked), NOW) == wait


def test_a_header_says_how_long_to_wait_in_seconds_or_as_a_date() -> None:
    """Both forms of RFC 9110."""
    in_a_minute = format_datetime(datetime.fromtimestamp(NOW + 60, UTC), usegmt=True)
    an_hour_ago = format_datetime(datetime.fromtimestamp(NOW - 3600, UTC), usegmt=True)
    assert retry_after(from_httpx(429, **{"Retry-After": "7"}), NOW) == 7
    assert retry_after(from_httpx(503, **{"retry-after": in_a_minute}), NOW) == 60
    assert retry_after(from_httpx(503, **{"Retry-After": an_hour_ago}), NOW) == 0
    assert retry_after(from_httpx(503, **{"Retry-After": "Tue, 99 Nov"}), NOW) is None
    assert retry_after(from_httpx(503), NOW) is None


def test_a_header_is_found_where_each_library_keeps_it() -> None:
    """On the response, on the exception, in botocore's dict, in any spelling of a plain dict."""
    in_botocore = {"ResponseMetadata": {"HTTPStatusCode": 503, "HTTPHeaders": {"retry-after": "3"}}}
    assert retry_after(from_urllib(503, **{"Retry-After": "5"}), NOW) == 5
    assert retry_after(shaped("ClientResponseError", headers={"Retry-After": "6"}), NOW) == 6
    assert retry_after(shaped("E", response=SimpleNamespace(headers={"retry-after": "4"})), NOW) == 4
    assert retry_after(shaped("ClientError", response=in_botocore), NOW) == 3
    assert retry_after(shaped("ClientError", response={"ResponseMetadata": None}), NOW) is None
    assert retry_after(shaped("E", headers=7), NOW) is None
    assert retry_after(ValueError(), NOW) is None


def test_a_date_without_a_zone_is_utc() -> None:
    """As RFC 9110 has it."""
    without = datetime.fromtimestamp(NOW + 60, UTC).strftime("%a, %d %b %Y %H:%M:%S -0000")
    assert retry_after(shaped("E", retry_after=without), NOW) == 60


@given(st.text() | st.binary() | st.floats() | st.integers() | st.timedeltas())
def test_whatever_is_sent_the_answer_is_a_wait_or_nothing(asked: object) -> None:
    """A header is input from outside: it never raises, and is never negative or endless."""
    wait = retry_after(shaped("E", retry_after=asked), NOW)
    assert wait is None or 0 <= wait < 1e11
