"""What became of the tasks of one row."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Counted from the journal, the results and what is kept; never from what a worker claims of itself.

    sent: tasks sent. starts: runs of their bodies. completed: tasks whose work was done. twice: tasks whose body
    reached its end more than once. kept: dead letters. waiting: tasks not ended whose message the broker still has.
    lost: tasks neither completed, nor kept, nor waiting. seen: tasks whose end the result backend shows, or needs not.
    """

    sent: int
    starts: int
    completed: int
    twice: int
    kept: int
    waiting: int
    lost: int
    seen: int
    note: str = ""

    def shown(self) -> str:
        """One line for the table: what is expected is left out."""
        parts = [f"{self.completed} of {self.sent} completed", f"{self.starts} starts"]
        for word in ("twice", "kept", "waiting", "lost"):
            if value := getattr(self, word):
                parts.append(f"{value} {word}")
        if unseen := self.sent - self.seen:
            parts.append(f"{unseen} without a visible end")
        return ", ".join(parts) + (f"; {self.note}" if self.note else "")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
