"""Every error taskguard raises, as one tree.

::

    TaskguardError
    ├── ConfigurationError      a policy or setting that cannot work; raised when it is made (also a ValueError)
    ├── StoreError              the store answered with something that is not an answer
    │   └── StoreUnavailable    the store did not answer in time (also a ConnectionError)
    ├── MessageError            bytes that are not a message taskguard can read (also a ValueError)
    ├── UnserialisableArgument  an argument of a task that its serializer cannot write (also a TypeError)
    ├── UnknownRecord           no record has this id (also a LookupError)
    ├── Refused                 a call to a downstream was not made; says when to come back (``retry_after``)
    │   ├── RateLimitedError    a rate is used up
    │   ├── CircuitOpenError    its circuit is open
    │   └── BulkheadFullError   as many calls as may be are under way
    ├── DownstreamTimeout       a call took longer than its budget (also a TimeoutError)
    └── TaskOutcome             how a task ended without running to its end; what its result backend shows
        ├── DeadlineExceeded    its deadline passed
        ├── PoisonedTask        it took its worker down too often
        ├── KeyReused           its idempotency key belongs to other arguments
        ├── DuplicateTask       the same key is already running or queued, and the task said ``on_duplicate="raise"``
        ├── CustodyLost         its lease ended and another run may hold the key
        ├── RetriesExhausted    it was retried as often as its policy or budget allows
        └── DeadLetter          it was dead-lettered before; this is the failure kept in its record

Messages say what, the value, and the way out. Constructors take one string, because result backends rebuild an
exception from its ``args``.
"""

from __future__ import annotations


class TaskguardError(Exception):
    """Base of all errors raised by taskguard."""


class ConfigurationError(TaskguardError, ValueError):
    """A policy, setting or declaration that cannot work."""


class StoreError(TaskguardError):
    """The store failed in a way that waiting will not mend."""


class StoreUnavailable(StoreError, ConnectionError):
    """The store did not answer in time; the same call may succeed later."""


class MessageError(TaskguardError, ValueError):
    """These bytes are not a message taskguard can read."""


class UnserialisableArgument(TaskguardError, TypeError):
    """An argument of a task cannot be sent."""


class UnknownRecord(TaskguardError, LookupError):
    """No record has this id."""


class Refused(TaskguardError):
    """A call was not made. Nothing of it happened, so it may be made later without harm.

    retry_after: seconds until it would be let through if nobody else came; None: not by waiting.
    slot_at: epoch seconds of the slot booked for it; None: none was booked.
    downstream: its name. limit: the name of the limit, bulkhead or circuit that refused.
    """

    def __init__(
        self,
        message: str = "",
        *,
        retry_after: float | None = None,
        slot_at: float | None = None,
        downstream: str = "",
        limit: str = "",
    ) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.slot_at = slot_at
        self.downstream = downstream
        self.limit = limit


class RateLimitedError(Refused):
    """A rate is used up."""


class CircuitOpenError(Refused):
    """The circuit is open: the downstream failed too often a moment ago, or an operator stopped it."""


class BulkheadFullError(Refused):
    """As many calls as may be at once are under way."""


class DownstreamTimeout(TaskguardError, TimeoutError):
    """A call took longer than its budget, or its budget was over before it began. ``downstream``: its name."""

    def __init__(self, message: str = "", *, downstream: str = "") -> None:
        super().__init__(message)
        self.downstream = downstream


class TaskOutcome(TaskguardError):
    """A task ended without running to its end."""


class DeadlineExceeded(TaskOutcome):
    """The deadline passed before the work could be done."""


class PoisonedTask(TaskOutcome):
    """The task took its worker process down ``max_crashes`` times."""


class KeyReused(TaskOutcome):
    """An idempotency key came back with other arguments."""


class DuplicateTask(TaskOutcome):
    """Another message with this key is queued or running."""


class CustodyLost(TaskOutcome):
    """The lease ended while the task ran; its outcome no longer counts."""


class RetriesExhausted(TaskOutcome):
    """No retry is left, by count or by budget."""


class DeadLetter(TaskOutcome):
    """The message was dead-lettered by an earlier delivery of the same attempt."""
