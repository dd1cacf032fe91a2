"""The hook: an application's connections to ``redis://`` and ``rediss://`` use our transport.

The transport's *name* stays ``redis``, so that URLs shown or handed on (the banner, Flower) stay what they were. It is
not a transport alias of kombu's, which would change every application in the process.
"""

from __future__ import annotations

from typing import Any

from kombu.connection import Connection as _Connection

StockConnection: Any = _Connection
SCHEMES = frozenset({"redis", "rediss"})


class Connection(StockConnection):  # type: ignore[misc]
    """kombu's connection, with another class behind the transport's name."""

    def get_transport_cls(self) -> Any:
        """Our transport where kombu's own for Redis would be used."""
        if self.transport_cls in SCHEMES:
            from taskguard.celery.redis_broker.transport import Transport

            return Transport
        return super().get_transport_cls()


class ConnectingMixin:
    """For an application's ``amqp``: which connections it makes, unless the user has set a ``broker_transport``."""

    app: Any

    @property
    def Connection(self) -> type:
        """The class of connections."""
        own = super().Connection  # type: ignore[misc]
        if own is not StockConnection or self.app.conf.broker_transport:
            return own  # type: ignore[no-any-return]
        return Connection
