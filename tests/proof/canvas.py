"""Rows 38-42: workflows whose members end in another way than by returning, and Celery's verdicts as exceptions."""

from __future__ import annotations

from collections.abc import Sequence

from celery import chain, chord
from celery.result import AsyncResult

from taskguard.record import Reason
from tests.integration.journal import Deadline
from tests.proof.outcome import Outcome
from tests.proof.rows import POOLS, Setup, row
from tests.proof.stage import Stage

LATE_REJECT = Setup(options={"acks_late": True, "reject_on_worker_lost": True})
SLOTS = 4


def _open_ends(stage: Stage, results: Sequence[AsyncResult]) -> int:
    """How many of these, which are not to complete, stay without a visible end. taskguard's must not."""

    def ended() -> bool:
        return all(result.ready() for result in results)

    if stage.guarded:
        stage.wait(ended, "a visible end of what cannot run any more")
    else:
        Deadline.after(stage.row.patience).reached(ended)
    return sum(not result.ready() for result in results)


def _told(open_ends: int, of: Sequence[AsyncResult], what: str) -> str:
    return f"{open_ends} of {len(of)} {what} without a visible end"


@row(38, "chord member ignored, killed, unregistered", pools=POOLS, patience=8)
def chord_left_alone(stage: Stage) -> Outcome:
    """A chord's member raises Ignore, another's worker is killed, a third's task is unknown."""
    worker = stage.worker()
    t, gate = stage.app.tasks, stage.gate()
    ignored = chord([t["work"].si(1), t["ignoring"].si()])(t["total"].s())
    unknown = chord([t["work"].si(1), stage.app.signature("nobody.knows", queue=stage.queue)])(t["total"].s())
    stage.wait(lambda: stage.started(ignored.parent[1]), "the member that raises Ignore")
    stage.wait(lambda: worker.says(unknown.parent[1].id), "the member that nobody knows")
    stage.wait_all("finished", [ignored.parent[0], unknown.parent[0]])
    killed = chord([t["held"].si(gate) for _ in range(2)])(t["total"].s())
    stage.wait_all("started", killed.parent.results)
    worker.kill()
    stage.fired(not stage.total("finished", killed.parent.results), "the worker died with two members")
    stage.journal.open(gate)
    stage.start_worker()
    bodies = [ignored, unknown]
    note = _told(_open_ends(stage, [*bodies, ignored.parent[1]]), [*bodies, ignored.parent[1]], "broken chords' ends")
    results = [ignored.parent[0], *unknown.parent, *killed.parent, killed]
    outcome = stage.finish(results, completed=len(results) - 1, starts=len(results) - 1 + 2, note=note)
    if stage.guarded:
        assert [body.state for body in bodies] == ["FAILURE"] * 2
        assert not any(stage.started(body) for body in bodies)
        assert killed.result == 2
        assert stage.letter(unknown.parent[1].id).failure.reason is Reason.UNKNOWN_TASK
    return outcome


@row(39, "chord member failed, rejected, killed, expired")
def chord_broken(stage: Stage) -> Outcome:
    """A chord's member fails, another's rejects, a third's process dies, a fourth's expires before it starts."""
    stage.worker()
    t, gate = stage.app.tasks, stage.gate()
    busy = [stage.send("held", gate) for _ in range(SLOTS)]
    stage.wait_all("started", busy)
    expired = chord([t["work"].si(1), t["work"].si(2).set(expires=0.5)])(t["total"].s())
    gone_at = stage.clock() + 0.6
    stage.wait(lambda: stage.clock() > gone_at, "the member's end")
    stage.journal.open(gate)
    failed = chord([t["work"].si(1), t["broken"].si()])(t["total"].s())
    rejected = chord([t["work"].si(1), t["rejecting"].si()])(t["total"].s())
    killed = chord([t["work"].si(1), t["frail"].si()])(t["total"].s())
    stage.fired(
        lambda: (
            stage.counts("killing", killed.parent)
            and all(stage.started(each) for each in (failed.parent[1], rejected.parent[1], expired.parent[0]))
        ),
        "each member met its end",
    )
    bodies = [expired, failed, rejected]
    note = _told(_open_ends(stage, bodies), bodies, "broken chords' bodies")
    members = [member for body in (*bodies, killed) for member in body.parent]
    results = [*busy, *members, killed]
    outcome = stage.finish(results, completed=len(results) - 3, starts=len(results), note=note)
    if stage.guarded:
        assert [body.state for body in bodies] == ["FAILURE"] * 3
        assert not any(stage.started(body) for body in (*bodies, expired.parent[1]))
        assert killed.result == 2
        reasons = [stage.letter(body.parent[1].id).failure.reason for body in bodies]
        assert reasons == [Reason.EXPIRED, Reason.PERMANENT_ERROR, Reason.REJECTED]
    return outcome


@row(40, "chain step ignored, rejected, failed", pools=POOLS, patience=8)
def chain_broken(stage: Stage) -> Outcome:
    """A chain's first step raises Ignore, another's Reject, a third's an error: the steps behind it cannot run."""
    stage.worker()
    t = stage.app.tasks
    ignored, rejected, failed = ends = [
        chain(t[name].si(), t["work"].si(1), t["work"].si(2)).apply_async()
        for name in ("ignoring", "rejecting", "broken")
    ]
    firsts = [last.parent.parent for last in ends]
    stage.fired(lambda: all(stage.started(first) for first in firsts), "each first step ran")
    behind = [ignored.parent.parent, *ends, *(last.parent for last in ends)]
    note = _told(_open_ends(stage, behind), behind, "steps")
    outcome = stage.finish([rejected.parent.parent, failed.parent.parent], completed=0, note=note)
    if stage.guarded:
        assert not any(stage.started(step) for last in ends for step in (last, last.parent))
        assert (ignored.state, rejected.state, failed.state) == ("REVOKED", "FAILURE", "FAILURE")
        assert [len(stage.started(first)) for first in firsts] == [1, 1, 1]
    return outcome


@row(41, "chain step that crashes after its end, ignore_result", both=LATE_REJECT)
def chain_repeated(stage: Stage) -> Outcome:
    """A first step that stores no result dies when the next one is published and its own message not acknowledged."""
    stage.worker()
    t = stage.app.tasks
    lasts = [chain(t["crash_after"].si().set(ignore_result=True), t["work"].si(n)).apply_async() for n in range(3)]
    firsts = [last.parent for last in lasts]
    stage.fired(lambda: len(stage.counts("killing", firsts)) == len(firsts), "each first step's child died at its end")
    outcome = stage.finish(lasts, note=f"{len(lasts)} next steps")
    if stage.guarded:
        assert stage.total("started", firsts) == stage.total("completed", firsts) == len(firsts)
        for first in firsts:
            stage.wait(lambda r=first: stage.told("replayed", r), "the redelivery to be recognised")
    return outcome


@row(42, "autoretry_for=(Exception,) and Reject", pools=POOLS)
def reject_retried(stage: Stage) -> Outcome:
    """A task that is to be retried on every exception rejects its message."""
    stage.worker()
    results = [stage.send("stubborn") for _ in range(2)]
    stage.fired(lambda: all(stage.started(result) for result in results), "each rejected")
    outcome = stage.finish(results, completed=0)
    if stage.guarded:
        assert {stage.letter(result.id).failure.reason for result in results} == {Reason.REJECTED}
    return outcome
