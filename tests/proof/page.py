"""The figures of full runs, the table they make, and docs/proof.md."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from tests.proof import killed
from tests.proof.outcome import Outcome
from tests.proof.rows import Contestant, Place, Row, all_rows

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "proof.md"
FIGURES = Path(__file__).with_name("figures.json")
NOT_MEASURED = "not measured yet"
BEGIN, END = "<!-- begin of what `make proof ARGS=--write` writes -->", "<!-- end of it -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One row as one contestant played it at one place: its outcome, or why there is none."""

    row: int
    contestant: Contestant
    broker: str
    store: str
    pool: str
    on: str
    versions: str
    seconds: float
    outcome: dict[str, Any] | None = None
    failure: str = ""
    skipped: str = ""

    @classmethod
    def now(cls, row: int, contestant: Contestant, place: Place, *, seconds: float, **told: Any) -> Self:
        """Played today, with what is installed here."""
        return cls(
            row=row, contestant=contestant, broker=place.broker, store=place.store, pool=place.pool,
            on=datetime.now(UTC).date().isoformat(), versions=versions(), seconds=round(seconds, 1), **told,
        )  # fmt: skip

    @property
    def place(self) -> str:
        """Where it was played; stock has no store."""
        parts = [self.broker, self.store, self.pool] if self.contestant == "taskguard" else [self.broker, self.pool]
        return " · ".join(parts)

    def shown(self) -> str:
        """What became of the tasks, in a line."""
        if self.outcome is not None:
            return Outcome(**self.outcome).shown()
        return f"FAILED: {self.failure.splitlines()[0][:200]}" if self.failure else f"skipped: {self.skipped}"

    def line(self) -> str:
        """For a log."""
        return f"row {self.row} {self.contestant} on {self.place} ({self.seconds:.0f} s): {self.shown()}"


def versions() -> str:
    """What the figures depend on."""
    packages = " · ".join(f"{name} {version(name.lower())}" for name in ("Celery", "kombu", "redis"))
    return f"{packages} · Python {platform.python_version()}"


def print_table(figures: Iterable[Figure]) -> None:
    """The table, as wide as it must be; plain where rich is not installed."""
    names = {row.number: row.name for row in all_rows()}
    ordered = sorted(figures, key=lambda f: (f.row, f.broker, f.pool, f.contestant, f.store))
    lines = [(str(f.row), names[f.row], f.place, f.contestant, f.shown()) for f in ordered]
    heads = ("row", "hazard", "place", "contestant", "outcome")
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for line in (heads, *lines):
            print(" | ".join(line))
        return
    table = Table(*heads)
    for line in lines:
        table.add_row(*line, style="bold red" if line[-1].startswith("FAILED") else None)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200).print(table)


# -- what is kept of full runs ---------------------------------------------------------------------------------------


def read_figures() -> list[Figure]:
    """The figures of the latest runs that were written."""
    return [Figure(**each) for each in json.loads(FIGURES.read_text())] if FIGURES.exists() else []


def write_figures(old: Iterable[Figure], new: Sequence[Figure]) -> None:
    """Keep *new*, and of *old* what is about other plays; a play that was skipped has no figures."""
    kept = {_identity(figure): figure for figure in [*old, *new] if not figure.skipped}
    ordered = sorted(kept.values(), key=_identity)
    lines = ",\n".join(json.dumps(asdict(figure), ensure_ascii=False) for figure in ordered)
    FIGURES.write_text(f"[\n{lines}\n]\n")


def _identity(figure: Figure) -> tuple[object, ...]:
    return (figure.row, figure.contestant, figure.broker, figure.store, figure.pool)


# -- docs/proof.md ---------------------------------------------------------------------------------------------------


def render() -> None:
    """Write the generated part of docs/proof.md anew; what stands around it stays."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{generated()}\n{END}{after}")


def generated() -> str:
    """The hazards, each with its test and with what became of the tasks; then the kills."""
    figures = read_figures()
    ran = {(figure.on, figure.versions) for figure in figures}
    parts = ["## The hazards\n", *(f"Measured {on} with {what}.\n" for on, what in sorted(ran))]
    for row in all_rows():
        parts.append(_section(row, [figure for figure in figures if figure.row == row.number]))
    return "\n".join([*parts, killed.section()])


def _section(row: Row, figures: Sequence[Figure]) -> str:
    title = f"### {row.number}. {row.name}\n"
    if row.scenario is None:
        return f"{title}\n{row.belongs_to}\n"
    module = Path(*row.module.split(".")).with_suffix(".py")
    lines = [title, f"{' '.join(row.hazard.split())}\n", f"Test: `{module}`, `{row.scenario.__name__}`\n"]
    lines += ["| | where | what became of the tasks |", "| --- | --- | --- |"]
    for contestant in ("stock", "taskguard"):
        # Places with the same outcome share a line: the differences are what one reads the table for.
        same: dict[str, list[str]] = {}
        for figure in figures:
            if figure.contestant == contestant:
                same.setdefault(figure.shown(), []).append(figure.place)
        same = same or {NOT_MEASURED: ["—"]}
        lines += [f"| {contestant} | {'<br>'.join(places)} | {shown} |" for shown, places in same.items()]
    return "\n".join(lines) + "\n"
