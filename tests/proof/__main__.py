"""The full run: every row, everywhere, with stock Celery beside taskguard. ``python -m tests.proof``.

After the rows a thousand tasks under kills, everywhere. Exit status 1 where taskguard broke a promise, or a fault did
not fire. ``--write`` puts the figures into docs/proof.md.
"""

from __future__ import annotations

import argparse
import time

from tests.proof import draw, killed
from tests.proof.page import print_table, read_figures, render, write_figures
from tests.proof.performance import jobs, run
from tests.proof.rows import CONTESTANTS, LAST_ROW, POOLS, Contestant, all_rows


def numbers(text: str) -> set[int]:
    """``1-4,8`` as numbers. Raises ValueError."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.proof", description=__doc__)
    parser.add_argument("--rows", type=numbers, help="such as 1-4,8; without the kills")
    parser.add_argument(
        "--kills", action=argparse.BooleanOptionalAction, help="the kills even with --rows; or not with all rows either"
    )
    parser.add_argument("--contestant", choices=CONTESTANTS, help="one alone")
    parser.add_argument("--pools", nargs="+", choices=POOLS, default=list(POOLS))
    parser.add_argument("--processes", type=int, default=3, help="rows played at once (3)")
    parser.add_argument("--write", action="store_true", help="put the figures of these rows into docs/proof.md")
    parser.add_argument("--page", action="store_true", help="play nothing; write docs/proof.md from the kept figures")
    asked = parser.parse_args()
    if asked.page:
        render()
        return 0
    wanted = set(range(1, LAST_ROW + 1)) if asked.rows is None else asked.rows
    rows = [row for row in all_rows() if row.number in wanted and row.scenario is not None]
    contestants: list[Contestant] = [asked.contestant] if asked.contestant else list(CONTESTANTS)
    began = time.time()
    figures = run(list(jobs(rows, contestants, asked.pools)), asked.processes)
    print_table(figures)
    failed = [figure for figure in figures if figure.failure]
    print(f"{len(figures)} plays in {time.time() - began:.0f} s, {len(failed)} failed")
    if asked.write:
        write_figures(read_figures(), figures)
        render()
    whole = asked.rows is None and asked.contestant is None
    kept = _kills(write=asked.write) if asked.kills or (whole and asked.kills is None) else True
    return 1 if failed or not kept else 0


def _kills(*, write: bool) -> bool:
    """Play them after the rows, because their figures are times. Returns whether taskguard kept its promises."""
    kills, kept = killed.play(draw.seed())
    killed.print_kills(kills)
    if write:
        killed.write_kills(killed.read_kills(), kills)
        render()
    return kept


if __name__ == "__main__":
    raise SystemExit(main())
