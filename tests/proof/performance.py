"""Playing rows in processes of their own: what may share a stage goes to one, the rest is spread."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

from _pytest.outcomes import OutcomeException, Skipped

from tests.proof.house import House, stage_key
from tests.proof.page import Figure
from tests.proof.rows import Contestant, Place, Row, all_rows

Job = list[tuple[int, Contestant, Place]]
"""What one process plays, one after the other."""

PART = 6
"""Rows that one process plays on a shared stage: more would leave the other processes idle at the end."""

TAIL = 12_000
"""Characters of a failure that are shown."""


def jobs(rows: list[Row], contestants: list[Contestant], pools: list[str]) -> Iterator[Job]:
    """What may share a stage goes to one process, in parts of a few rows."""
    shared: dict[str, Job] = {}
    for row in rows:
        for contestant in contestants:
            for place in row.full_places(contestant):
                if place.pool not in pools:
                    continue
                play = (row.number, contestant, place)
                if contestant == "stock" or row.alone or row.private:
                    yield [play]
                else:
                    shared.setdefault(stage_key(row, place), []).append(play)
    for plays in shared.values():
        yield from (plays[start : start + PART] for start in range(0, len(plays), PART))


def play(job: Job) -> list[Figure]:
    """In a process of its own: play *job*."""
    rows = {row.number: row for row in all_rows()}
    figures = []
    with tempfile.TemporaryDirectory(prefix="taskguard-proof-") as directory, House(Path(directory)) as house:
        for number, contestant, place in job:
            began = time.time()
            told: dict[str, object] = {}
            try:
                told["outcome"] = house.play(rows[number], contestant, place).to_dict()
            except Skipped as exc:
                told["skipped"] = str(exc)
            except (Exception, OutcomeException) as exc:
                told["failure"] = _explained(exc)
            figures.append(Figure.now(number, contestant, place, seconds=time.time() - began, **told))
    return figures


def _explained(exc: BaseException) -> str:
    """What failed, in which line, and the end of what was known."""
    line = traceback.extract_tb(exc.__traceback__)[-1]
    at = next((f for f in reversed(traceback.extract_tb(exc.__traceback__)) if "proof" in f.filename), line)
    said = str(exc)
    head, tail = said[:200], said[200:][-TAIL:]
    return f"{type(exc).__name__}: {head} [{Path(at.filename).name}:{at.lineno}: {at.line}]\n{tail}"


def run(todo: list[Job], processes: int) -> list[Figure]:
    """Play all of *todo*, the longest jobs first, and say on stderr how it goes."""
    figures: list[Figure] = []
    todo.sort(key=len, reverse=True)
    total = sum(map(len, todo))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, max_tasks_per_child=1) as pool:
        futures: dict[Future[list[Figure]], Job] = {pool.submit(play, job): job for job in todo}
        for future in as_completed(futures):
            for figure in future.result():
                figures.append(figure)
                print(f"[{len(figures)}/{total}] {figure.line()}", file=sys.stderr, flush=True)
                if figure.failure:
                    print(figure.failure, file=sys.stderr, flush=True)
    return figures
