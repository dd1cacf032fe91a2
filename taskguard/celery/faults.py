"""Whose fault a failed request is: the server's, which is waited out, or the message's, which ends as a dead letter."""

from __future__ import annotations

import re
from typing import Any

from taskguard.celery.redis_broker.stock import redis as stock

REFUSED = re.compile(r"(^|caused error: )WRONGTYPE ")
"""How Redis, alone or in a pipeline, says that the key is at fault, and so the message. redis-py takes other codes off
the text (OOM, READONLY, NOPERM, CLUSTERDOWN) and makes types of them, more with each version: what is not here is
the server's."""


def is_servers(exc: Exception) -> bool:
    """Whether a Redis that answers so is full, read-only, without its cluster or the like: no message is at fault."""
    errors: Any = getattr(stock, "exceptions", None)
    if errors is None or isinstance(exc, errors.DataError):  # DataError: the driver could not encode the message
        return False
    kinds = (errors.RedisError, getattr(errors, "RedisClusterException", errors.RedisError))
    return isinstance(exc, kinds) and not REFUSED.search(str(exc))


def is_backends(exc: Exception, backend: Any) -> bool:
    """Whether a result *backend* that raises this is away, as far as Celery and its driver can tell."""
    known = getattr(backend, "connection_errors", ())
    if isinstance(exc, (*known, ConnectionError, TimeoutError)) or is_servers(exc):
        return True
    safe = getattr(backend, "exception_safe_to_retry", None)
    return bool(safe and safe(exc))
