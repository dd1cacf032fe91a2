"""What was asked of limits: accepted and refused, by client, endpoint and rule, in windows. Values only."""

from __future__ import annotations

from dataclasses import dataclass

WINDOW = 60.0
"""Seconds of one window. Windows begin at multiples of it."""
KEPT = 2 * 86400.0
"""Seconds for which a store keeps them."""
MOST = 2000
"""Rows of one window in a store; what comes after them is counted as `OTHER`."""
OTHER = "(other)"
"""Client, endpoint and rule of what was too much to be told apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Permits (calls times their cost) that were accepted and refused. ``rule``: the one that decided, "" for none."""

    client: str
    endpoint: str
    rule: str
    accepted: float = 0.0
    refused: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted(Asked):
    """The fleet's sum in the window that began at ``window_at``."""

    window_at: float
