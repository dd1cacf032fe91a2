"""Rows 5-7 and 11: a whole worker dies, or the main process of one."""

from __future__ import annotations

import os
import signal

import psutil

from taskguard.record import Reason
from tests.proof.outcome import Outcome
from tests.proof.rows import POOLS, Setup, row
from tests.proof.stage import END_PATIENCE, Stage

LATE = Setup(options={"acks_late": True})
PREFETCHING = Setup(conf={"worker_prefetch_multiplier": 2})
EARLY = Setup(options={"acks_late": False})
HASTY = Setup(transport={"visibility_timeout": 3, "unacked_restore_interval": 0.5, "unacked_restore_throttle": 1})
"""A killed stock worker's messages come back in an hour otherwise."""
MAX_CRASHES = 3
AGAIN = 30.0
"""Seconds in which a new worker must have begun all that a killed one had: some leases, and far from the visibility
timeout, which is 60 seconds with taskguard."""


def _worker_dies(stage: Stage) -> Outcome:
    """Twenty tasks; four run and more are prefetched when the whole process tree is SIGKILLed."""
    worker = stage.worker()
    gate = stage.gate()
    results = [stage.send("held", gate) for _ in range(20)]
    stage.wait(lambda: stage.total("started", results) == 4, "four runs")
    worker.kill()
    stage.fired(not worker.alive and not stage.total("finished", results), "four runs died with their worker")
    stage.journal.open(gate)
    stage.start_worker()
    if stage.guarded:
        stage.wait_all("started", results, timeout=AGAIN)
    return stage.finish(results, starts=24)


@row(5, "whole worker killed, early ack", pools=POOLS, both=PREFETCHING, stock=EARLY)
def early(stage: Stage) -> Outcome:
    """A worker's process tree is SIGKILLed with four tasks running and more prefetched, acknowledged on arrival."""
    return _worker_dies(stage)


@row(6, "whole worker killed, acks_late", pools=POOLS, both=PREFETCHING | LATE)
def late(stage: Stage) -> Outcome:
    """The same with late acknowledgement."""
    return _worker_dies(stage)


@row(7, "only the parent killed", both=LATE, guarded=HASTY, stock=HASTY)
def parent(stage: Stage) -> Outcome:
    """Only the main process is SIGKILLed; its children must not live on beside those of the next worker.

    A body of theirs can reach its end before they notice. It runs again then, and one of the two ends counts.
    """
    worker = stage.worker()
    gate = stage.gate()
    results = [stage.send("held", gate) for _ in range(4)]
    stage.wait_all("started", results)
    children = worker.tree()[1:]
    os.kill(worker.process.pid, signal.SIGKILL)
    stage.journal.open(gate)
    worker.wait_end()
    _, orphans = psutil.wait_procs(children, timeout=END_PATIENCE if stage.guarded else 10)
    stage.fired(not worker.alive, "the parent died")
    if stage.guarded:
        assert not orphans, "the children are gone before the next worker comes"
    stage.start_worker()
    return stage.finish(results, starts=8, twice=4, note=f"{len(orphans)} orphans")


@row(
    11, "poison that kills the main process", pools=POOLS, guarded=HASTY, stock=HASTY | LATE, concurrency=2, patience=20
)
def poison_main(stage: Stage) -> Outcome:
    """A task SIGKILLs its worker's main process every time, and a supervisor starts the worker again every time."""
    worker = stage.worker()
    poison = stage.send("poison", "main")
    stage.fired(lambda: not worker.alive, "the task killed its worker")
    good = [stage.send("work", number) for number in range(3)]
    results = [poison, *good]
    deaths = stage.supervise(
        lambda: len(stage.shown(results)) == len(results),
        timeout=stage.row.patience if not stage.guarded else END_PATIENCE,
    )
    # A neighbour that runs when the worker is killed is a crashed run too, and may have reached its end before.
    runs = MAX_CRASHES * len(results)
    note = f"{deaths} worker deaths"
    outcome = stage.finish(results, completed=len(good), starts=runs, twice=len(good), note=note)
    if stage.guarded:
        assert stage.letter(poison.id).failure.reason is Reason.POISON
        assert [run.crashes for run in stage.started(poison)] == list(range(MAX_CRASHES))
        assert deaths == MAX_CRASHES
    return outcome
