"""What an HTTP request takes from a budget, and what it sends on.

Each of a request's own timeouts is kept, or shortened to what the downstream declares and to what is left. The next
service learns how long its answer is of use: milliseconds, as a duration and not as an instant, because clocks differ.
"""

from __future__ import annotations

from collections.abc import Mapping

from taskguard.clock import seconds
from taskguard.downstream import timeouts
from taskguard.headers import REMAINING
from taskguard.policies.calls import Timeout


def allowed(policy: Timeout | None) -> float | None:
    """Seconds that this request may take, all in all; None: nothing bounds it."""
    return timeouts.within(None if policy is None or policy.total is None else seconds(policy.total))


def bounded(own: float | None, policy: Timeout | None, name: str, left: float | None) -> float | None:
    """The least of a request's own timeout, the downstream's *name* ("connect", "read") and what is left."""
    declared = None if policy is None else getattr(policy, name, None)
    known = [value for value in (own, None if declared is None else seconds(declared), left) if value is not None]
    return max(0.001, min(known)) if known else None


def sent_on(left: float | None) -> Mapping[str, str]:
    """The header that tells the next service."""
    return {} if left is None else {REMAINING: str(int(left * 1000))}
