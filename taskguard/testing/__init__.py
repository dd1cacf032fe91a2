"""A kit for the tests of your own tasks: no broker, no worker, no store and no waiting.

With pytest, take the fixture ``reliable``. Without, ``with Reliable(app) as reliable:`` is the same.
"""

from taskguard.testing.broker import Message
from taskguard.testing.clock import ManualClock
from taskguard.testing.idempotent import assert_idempotent
from taskguard.testing.process import Crash
from taskguard.testing.reliable import Reliable

__all__ = ["Crash", "ManualClock", "Message", "Reliable", "assert_idempotent"]
