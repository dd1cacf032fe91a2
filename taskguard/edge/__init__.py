"""The HTTP edge: limits before an application, for ASGI and WSGI, and as a decorator.

Answers carry ``RateLimit`` and ``RateLimit-Policy`` as in draft-ietf-httpapi-ratelimit-headers-10; a refusal is a 429
with ``Retry-After`` and a problem document (RFC 9457).
"""

from taskguard.edge.asgi import ASGIRateLimit
from taskguard.edge.decorators import rate_limit
from taskguard.edge.opening import open_limiter
from taskguard.edge.wsgi import WSGIRateLimit

__all__ = ["ASGIRateLimit", "WSGIRateLimit", "open_limiter", "rate_limit"]
