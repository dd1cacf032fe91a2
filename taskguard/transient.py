"""What an error says about trying again: whether the same call may succeed later, and how long it was asked to wait.

Errors are recognised by shape (a status code, a gRPC code, the name of a class in the MRO), so that no client library
is imported. ``__cause__`` and ``__context__`` are not followed: ``raise InvalidOrder from timeout`` is its author
saying that the error is another one now, and an error that is merely handled next to a timeout is not a timeout.
Unknown errors are permanent: repeating a bug costs load and mends nothing, and a dead letter can be requeued.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from datetime import UTC, timedelta
from email.utils import parsedate_to_datetime

_RETRYABLE_STATUS = frozenset({408, 425, 429})
_RETRYABLE_GRPC = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"})
_RETRYABLE_ERRNO = frozenset(
    {errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOBUFS}
)
# How AWS says "slow down" with status 400, as its own SDK lists it.
_AWS_THROTTLING = """
    Throttling ThrottlingException ThrottledException RequestThrottledException TooManyRequestsException
    ProvisionedThroughputExceededException TransactionInProgressException RequestLimitExceeded BandwidthLimitExceeded
    LimitExceededException RequestThrottled SlowDown PriorRequestNotComplete EC2ThrottledException
    RequestTimeout RequestTimeoutException
"""
_AWS_CODES = frozenset(_AWS_THROTTLING.split())
_NUMBER = re.compile(r"\s*[+-]?\d+(\.\d*)?\s*", re.ASCII)
_LONGEST = 1e11

_TRANSIENT = """
    ConnectionError TimeoutError gaierror IncompleteReadError IncompleteRead SSLEOFError SSLZeroReturnError
    error_temp SMTPServerDisconnected SMTPConnectError
    TransportError Timeout ChunkedEncodingError ProtocolError NewConnectionError ReadTimeoutError ConnectTimeoutError
    ConnectionClosedError ConnectionTimeout ClientConnectionError ClientPayloadError
    OperationalError ReadOnlyError ClusterDownError MasterDownError TryAgainError ConnectionFailure
    RecoverableConnectionError RecoverableChannelError
    SoftTimeLimitExceeded TimeLimitExceeded WorkerLostError
"""
_PERMANENT = """
    SSLError SSLCertVerificationError ClientConnectorSSLError ClientConnectorCertificateError
    AuthenticationError AuthorizationError UnsupportedProtocol LocalProtocolError
    IrrecoverableConnectionError IrrecoverableChannelError
"""
# The most specific class named here decides: an AuthenticationError that is a ConnectionError (redis) does not go away
# by waiting, nor does a refused certificate. The names come from: builtins, asyncio, http.client, ssl, ftplib and
# smtplib; httpx, requests, urllib3, botocore, elastic and aiohttp; SQL drivers, redis, pymongo and amqp; billiard,
# whose runs that were cut short are tried again, like those whose process died.
_BY_NAME = {**dict.fromkeys(_TRANSIENT.split(), True), **dict.fromkeys(_PERMANENT.split(), False)}


def is_transient(exc: BaseException) -> bool:
    """Whether the same call may succeed later: connections, timeouts, HTTP 408, 425, 429 and 5xx, gRPC unavailability.

    An answer of the other side outweighs the class of the error. A group is transient when all of its errors are.
    """
    if isinstance(exc, BaseExceptionGroup):
        return all(is_transient(inner) for inner in exc.exceptions)
    verdict = _by_answer(exc)
    if verdict is not None:
        return verdict
    if _peek(exc, "connection_invalidated") is True:
        return True
    for cls in type(exc).__mro__:
        verdict = _BY_NAME.get(cls.__name__)
        if verdict is not None:
            return verdict
        if cls.__name__ in ("URLError", "MaxRetryError"):
            # These two are wrappers: the reason is the error itself, not what led to it.
            reason = _peek(exc, "reason")
            return isinstance(reason, BaseException) and is_transient(reason)
    return isinstance(exc, OSError) and exc.errno in _RETRYABLE_ERRNO


def _by_answer(exc: BaseException) -> bool | None:
    """The verdict of the other side's answer, None where there was none."""
    response = _peek(exc, "response")
    if isinstance(response, Mapping):  # botocore
        if str(_in(response, "Error", "Code")) in _AWS_CODES:
            return True
        status = _in(response, "ResponseMetadata", "HTTPStatusCode")
        return _retryable_status(status) if _is_status(status) else None
    code = _peek(exc, "code")
    if callable(code):  # grpc
        try:
            name = _peek(code(), "name")
        except Exception:  # noqa: BLE001 - someone else's method, called on a guess
            return None
        return name in _RETRYABLE_GRPC if isinstance(name, str) else None
    reply = _peek(exc, "smtp_code")
    if isinstance(reply, int) and reply >= 400:
        return reply < 500
    if _peek(exc, "reply_code") is not None:  # amqp: codes of its own that look like HTTP's
        return None
    candidates = (
        _peek(response, "status_code"),
        _peek(response, "status"),
        _peek(exc, "status_code"),
        _peek(exc, "status"),
        _peek(exc, "http_status"),
        code,
    )
    for status in candidates:
        if _is_status(status):
            return _retryable_status(status)
    return None


def _is_status(value: object) -> bool:
    return isinstance(value, int) and 400 <= value <= 599


def _retryable_status(value: object) -> bool:
    return isinstance(value, int) and (value >= 500 or value in _RETRYABLE_STATUS)


def retry_after(exc: BaseException, now: float) -> float | None:
    """The seconds the other side asked to wait, 0 or more; None where it did not ask, or not legibly.

    Read from a ``retry_after`` attribute or a ``Retry-After`` header of the response or the exception, in seconds or
    as an HTTP date (RFC 9110, 10.2.3).
    """
    response = _peek(exc, "response")
    if isinstance(response, Mapping):
        headers = [_in(response, "ResponseMetadata", "HTTPHeaders")]
    else:
        headers = [_peek(response, "headers"), _peek(exc, "headers")]
    asked = [_peek(exc, "retry_after"), *(_header(each, "Retry-After") for each in headers)]
    return next((wait for wait in (_wait(value, now) for value in asked) if wait is not None), None)


def _wait(value: object, now: float) -> float | None:
    if isinstance(value, timedelta):
        wait = value.total_seconds()
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        wait = min(value, _LONGEST) + 0.0
    elif isinstance(value, (str, bytes)):
        text = value if isinstance(value, str) else value.decode("latin-1")
        try:
            wait = float(text) if _NUMBER.fullmatch(text) else _until(text, now)
        except (ValueError, TypeError, OverflowError, IndexError):
            return None
    else:
        return None
    return max(0.0, wait) if wait < _LONGEST else None


def _until(date: str, now: float) -> float:
    at = parsedate_to_datetime(date)
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - now


def _header(headers: object, name: str) -> object:
    if headers is None:
        return None
    for spelling in (name, name.lower()):
        try:
            return headers[spelling]  # type: ignore[index]
        except (KeyError, TypeError, IndexError):
            continue
    return None


def _in(mapping: object, *path: str) -> object:
    for name in path:
        mapping = mapping.get(name) if isinstance(mapping, Mapping) else None
    return mapping


def _peek(value: object, name: str) -> object:
    """An attribute of someone else's object, None where it has none or its property fails (httpx has such)."""
    try:
        return getattr(value, name, None)
    except Exception:  # noqa: BLE001 - a property may raise anything; no answer is the answer
        return None
