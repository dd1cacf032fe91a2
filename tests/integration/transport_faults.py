"""A consumer that is killed at a chosen instant: ``python -m tests.integration.transport_faults <point>``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from kombu.transport.redis import QoS as StockQoS

from taskguard.celery.redis_broker.line import Line
from taskguard.celery.redis_broker.taker import Taker
from taskguard.celery.redis_broker.unacked import QoS
from tests.integration.tasks import make_app

KILLED = -signal.SIGKILL
POINTS = ("sent", "answered", "read", "noted")


def die(*_: Any, **__: Any) -> None:
    """SIGKILL ourselves."""
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: type, name: str, fault: Callable[..., None]) -> None:
    """Have *fault* called in the place of a method."""
    setattr(owner, name, fault)


def main(point: str) -> None:
    """Consume the application's queue until the fault."""
    app = make_app(os.environ)
    app.conf.broker_transport_options = {**app.conf.broker_transport_options, "owner_lease": 1.0}
    match point:
        case "sent":
            send = Line.send

            def sent(line: Line, command: Any) -> None:
                send(line, command)
                die()

            before(Line, "send", sent)
        case "answered":
            before(Line, "read", die)
        case "read":
            before(Taker, "_receive", die)
        case "noted":
            before(QoS, "append", die)
        case "stock":
            app.conf.broker_transport = "redis"
            before(StockQoS, "append", die)
    with app.connection_for_read() as connection, app.amqp.TaskConsumer(connection):
        connection.drain_events(timeout=20)


if __name__ == "__main__":
    main(sys.argv[1])
