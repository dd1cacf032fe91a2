"""The kills: what became of a thousand tasks under five of them, as a table, and for docs/proof.md.

The scene is `tests.acceptance.kills`; here is what is kept of its figures.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from _pytest.outcomes import OutcomeException, Skipped

from tests.acceptance.kills import HICCUP, KILLS, LEASE, RECOVERY, TASKS, Figures, every_scene, figures

KEPT = Path(__file__).with_name("kills.json")
HEADS = (
    "", "where", "seed", "completed", "lost", "hidden", "dead letters", "completed twice", "effects repeated",
    "held by the killed", "never started again", "recovery p50, p99",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Killed:
    """What is kept of one scene. None where it was not written down."""

    side: str
    broker: str
    store: str
    prefetch: int | None
    seed: int
    on: str
    machine: str = ""
    sent: int = TASKS
    kills: int = KILLS
    completed: int = TASKS
    completed_twice: int | None = 0
    lost: int = 0
    hidden: int = 0
    dead: int = 0
    repeated: int | None = None
    started: int | None = None
    prefetched: int | None = None
    never_again: int = 0
    p50: float | None = None
    p99: float | None = None
    broken: tuple[str, ...] = ()

    @classmethod
    def of(cls, told: Figures) -> Self:
        """Played today. Stock is held to nothing."""
        same = {name: getattr(told, name) for name in (
            "side", "broker", "store", "prefetch", "seed", "sent", "kills", "completed", "completed_twice", "lost",
            "hidden", "dead", "repeated", "started", "prefetched", "never_again",
        )}  # fmt: skip
        p50, p99 = (None if math.isnan(value := told.percentile(share)) else round(value, 2) for share in (0.5, 0.99))
        broken = tuple(told.broken()) if told.side == "taskguard" else ()
        return cls(**same, p50=p50, p99=p99, broken=broken, on=datetime.now(UTC).date().isoformat())

    @property
    def place(self) -> str:
        """Where it was played; stock has no store."""
        parts = [self.broker, self.store] if self.side == "taskguard" else [self.broker]
        prefetch = "default prefetch" if self.prefetch is None else f"prefetch {self.prefetch}"
        return " · ".join([*parts, prefetch])

    def cells(self) -> tuple[str, ...]:
        """A line of the table, under `HEADS`."""
        held = "" if self.started is None else f"{self.started} begun, {self.prefetched} not"
        recovery = "" if self.p99 is None else f"{self.p50:.2f} s, {self.p99:.2f} s"
        counts = [self.lost, self.hidden, self.dead, self.completed_twice, self.repeated]
        numbers = [*counts, held, self.never_again, recovery]
        cells = ["not written down" if value in (None, "") else str(value) for value in numbers]
        return (self.side, self.place, str(self.seed), f"{self.completed} of {self.sent}", *cells)

    @property
    def identity(self) -> tuple[str, str, str, int]:
        """Of the scene, in the order of the page."""
        return (self.broker, self.side, self.store, self.prefetch or 0)


def play(seed: int) -> tuple[list[Killed], bool]:
    """Play every scene, and say on stderr how it goes. Returns also whether all were played and kept every promise.

    What has no server here is left out.
    """
    kills, kept = [], True
    for broker, store, side, prefetch in every_scene():
        try:
            told = figures(broker, store, side, seed=seed, prefetch=prefetch)
        except Skipped as exc:
            print(f"{side} on {broker} and {store}: {exc}", file=sys.stderr, flush=True)
            continue
        except (Exception, OutcomeException):
            traceback.print_exc()
            kept = False
            continue
        kills.append(killed := Killed.of(told))
        kept = kept and not killed.broken
        print("\n".join([told.shown(), *killed.broken, *told.slow]), file=sys.stderr, flush=True)
    return kills, kept


def print_kills(kills: Iterable[Killed]) -> None:
    """The table, one line a scene."""
    print(f"\n{TASKS} tasks, {KILLS} killed workers, a lease of {LEASE:g} s")
    for cells in (HEADS, *(killed.cells() for killed in kills)):
        print(" | ".join(cells))


def read_kills() -> list[Killed]:
    """Those of the latest runs that were written."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else []
    return [Killed(**{**each, "broken": tuple(each["broken"])}) for each in kept]


def write_kills(old: Iterable[Killed], new: Sequence[Killed]) -> None:
    """Keep *new*, and of *old* what is about other scenes."""
    kept = {killed.identity: killed for killed in [*old, *new]}
    lines = ",\n".join(json.dumps(asdict(kept[identity]), ensure_ascii=False) for identity in sorted(kept))
    KEPT.write_text(f"[\n{lines}\n]\n")


SECTION = f"""\
## {TASKS:,} tasks and {KILLS} killed workers

Two workers of four children run {TASKS:,} tasks of some 0.1 s, with a lease of {LEASE:g} s. {KILLS} times one of them \
is SIGKILLed with all its children, and another is started at once.

- *held by the killed*: what the killed workers had, begun or only fetched.
- *effects repeated*: an effect that a run had before it was killed is had again by the next run, so as many can \
repeat as were begun.
- *recovery*: the time from a kill to the next start of what the killed worker held, or from the last where several \
hit who had it one after the other; what never started again is not in it.

taskguard is held to this: nothing lost, hidden or dead, no key completed twice, and a recovery of {RECOVERY:g} s at \
the 99th percentile. Where any start takes long, because the machine is busy, up to {HICCUP:g} s more is allowed.

Test: `tests/acceptance/test_kills.py` plays one pair, drawn by the seed; `make proof` plays them all, with stock \
beside each broker (`acks_late`, `reject_on_worker_lost`).
"""


def section() -> str:
    """What docs/proof.md says about them."""
    kills = read_kills()
    ran = sorted({(killed.on, killed.machine) for killed in kills})
    return "\n".join(
        [
            SECTION,
            *(f"Measured {on}{f', {machine}' if machine else ''}.\n" for on, machine in ran),
            f"| {' | '.join(HEADS)} |",
            "|" + " --- |" * len(HEADS),
            *(f"| {' | '.join(killed.cells())} |" for killed in kills),
            "",
        ]
    )
