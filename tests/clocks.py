"""A clock that moves only when a test says so."""

from __future__ import annotations


class ManualClock:
    """Epoch seconds that stand still until `advance`. Starts at a whole second, so that milliseconds are exact."""

    def __init__(self, at: float = 1_750_000_000.0) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at

    def advance(self, seconds: float) -> float:
        """Move on by *seconds*. Returns the new instant."""
        self.at += seconds
        return self.at
