"""Every step of the life of a message writes just these fields, over a record in which every field is in use."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from taskguard import lifecycle
from taskguard.clock import to_ms
from taskguard.custody import Claimed, Completed, Dropped, InProgress
from taskguard.envelope import Envelope
from taskguard.record import Attempt, Failure, Reason, Record, State

NOW = 1_750_000_000.0
NEXT = Envelope(
    task="shop.charge", task_id="task-1", key="order-1", body=b"[]", queue="orders", fingerprint="new", sequence=5
)
USED = Record(
    id=NEXT.id,
    task="shop.charge",
    task_id="task-1",
    key="order-1",
    state=State.RUNNING,
    primary=True,
    sequence=4,
    fingerprint="old",
    queue="old",
    token=9,
    holder="worker-1/a",
    lease="relay",
    kept=True,
    due_at=NOW + 5,
    expires_at=NOW + 99,
    crashes=2,
    wire=b"old",
    result=b"old",
    failure="old",
    created_at=NOW - 100,
    updated_at=NOW - 50,
)
LINE = Attempt(at=NOW, worker="worker-1", outcome="retry", error="OSError")
BURIED = Failure(reason=Reason.POISON)


def written(after: Record | None, before: Record = USED) -> dict[str, object]:
    """The fields that differ, with their new values; the history by its lines."""
    assert after is not None
    names = [field.name for field in fields(Record) if getattr(before, field.name) != getattr(after, field.name)]
    return {name: tuple(after.attempts) if name == "history" else getattr(after, name) for name in names}


def test_a_claim_writes() -> None:
    """The run is new: no relay's lease, no mark of the last run, no end."""
    before = replace(USED, state=State.PENDING)
    after, _ = lifecycle.claim(before, NEXT, holder="worker-2/b", lease=15, max_crashes=9, now=NOW)
    assert written(after, before) == {
        "state": State.RUNNING,
        "sequence": 5,
        "fingerprint": "new",
        "queue": "orders",
        "token": to_ms(NOW),
        "holder": "worker-2/b",
        "lease": "",
        "kept": False,
        "due_at": NOW + 15,
        "expires_at": None,
        "wire": NEXT.to_wire(),
        "updated_at": NOW,
    }


def test_a_token_grows_by_one_when_the_clock_stands_behind_it() -> None:
    """No more, so that tokens do not run away from the clock."""
    before = replace(USED, state=State.PENDING, token=to_ms(NOW) + 7)
    after, _ = lifecycle.claim(before, NEXT, holder="worker-2/b", lease=15, max_crashes=9, now=NOW)
    assert after.token == to_ms(NOW) + 8


def test_a_new_record_has_all_that_the_message_says() -> None:
    """Fingerprint and queue too, for a copy at rest."""
    fresh = lifecycle.fresh(NEXT, primary=False, now=NOW)
    assert (fresh.id, fresh.fingerprint, fresh.queue, fresh.sequence) == (NEXT.copy_id, "new", "orders", 5)
    assert (fresh.wire, fresh.created_at, fresh.updated_at) == (NEXT.to_wire(), NOW, NOW)


def test_rest_writes() -> None:
    """Waiting, and nobody's."""
    assert written(lifecycle.rest(USED, NEXT, due_at=NOW + 60, attempt=LINE, now=NOW)) == {
        "state": State.PENDING,
        "sequence": 5,
        "fingerprint": "new",
        "queue": "orders",
        "holder": "",
        "lease": "",
        "kept": False,
        "due_at": NOW + 60,
        "expires_at": None,
        "wire": NEXT.to_wire(),
        "history": (LINE,),
        "updated_at": NOW,
    }


def test_a_crash_writes() -> None:
    """The next run's token is not the lost one's, and the line says what ended."""
    ended = Attempt(at=NOW, worker="worker-1/a", outcome="crash", error="lease ended")
    assert written(lifecycle.crashed(USED, now=NOW)) == {
        "state": State.PENDING,
        "crashes": 3,
        "token": 10,
        "lease": "",
        "holder": "",
        "kept": False,
        "due_at": NOW,
        "history": (ended,),
        "updated_at": NOW,
    }


@pytest.mark.parametrize("kept", [True, False])
def test_a_completion_writes(kept: bool) -> None:
    """A kept message stays with its holder until Celery has done the rest; then its retention begins."""
    before = replace(USED, kept=kept)
    let_go = {} if kept else {"holder": "", "due_at": None, "wire": None}
    assert written(lifecycle.complete(before, result=b"7", retention=60, now=NOW), before) == {
        "state": State.DONE,
        "result": b"7",
        "expires_at": (NOW + 5 if kept else NOW) + 60,
        "updated_at": NOW,
        **let_go,
    }


def test_what_is_kept_is_let_go_once_by_its_holder() -> None:
    """The lease of a relay goes too; a record that is not kept is not written again."""
    done = replace(USED, state=State.DONE)
    expected = {"holder": "", "lease": "", "kept": False, "due_at": None, "wire": None}
    assert written(lifecycle.finish(done, "worker-1/a", now=NOW), done) == expected
    assert written(lifecycle.remove(done, "relay", now=NOW), done) == expected
    unkept = replace(done, kept=False)
    assert lifecycle.finish(unkept, "worker-1/a", now=NOW) is unkept


def test_a_published_message_writes() -> None:
    """The counters stay; the relay's lease does not."""
    before = replace(USED, state=State.PENDING)
    assert written(lifecycle.remove(before, "relay", now=NOW), before) == {
        "state": State.PUBLISHED,
        "lease": "",
        "due_at": None,
        "wire": None,
        "expires_at": NOW + lifecycle.PUBLISHED_RETENTION,
        "updated_at": NOW,
    }


def test_requeue_and_purge_write() -> None:
    """All chances back, and by whom; or a stone that keeps nobody's message."""
    dead = replace(USED, state=State.DEAD, expires_at=None)
    again = lifecycle.requeue(dead, NEXT, due_at=NOW, now=NOW)
    assert (again.failure, again.crashes) == ("", 0)
    assert again.attempts == [Attempt(at=NOW, worker="operator", outcome="requeue")]
    assert written(lifecycle.purge(dead, retention=60, now=NOW), dead) == {
        "state": State.DISCARDED,
        "failure": "purged",
        "kept": False,
        "holder": "",
        "due_at": None,
        "wire": None,
        "expires_at": NOW + 60,
        "updated_at": NOW,
    }


def test_only_a_running_record_is_renewed() -> None:
    """Its holder's name outlives the run where the message is kept."""
    done = replace(USED, state=State.DONE)
    assert lifecycle.renew(done, "worker-1/a", lease=15, now=NOW, keep=True) is done


def test_only_the_message_that_was_published_is_awaited() -> None:
    """This task id and this attempt, no other."""
    published = replace(USED, state=State.PUBLISHED, sequence=5)
    assert lifecycle.awaits(published, NEXT)
    assert not lifecycle.awaits(published, NEXT.replace(task_id="task-2"))
    assert not lifecycle.awaits(published, NEXT.replace(sequence=6))
    assert not lifecycle.awaits(USED, NEXT.replace(sequence=4))


def test_only_a_message_at_rest_is_leased_to_another() -> None:
    """An empty lease is nobody's, one's own is no other's."""
    resting = replace(USED, state=State.PENDING)
    assert lifecycle.leased_to_another(resting, "mine")
    assert not lifecycle.leased_to_another(resting, "relay")
    assert not lifecycle.leased_to_another(replace(resting, lease=""), "mine")
    assert not lifecycle.leased_to_another(replace(USED, state=State.DEAD), "mine")


@pytest.mark.parametrize("task_id", ["task-1", "task-2"])
def test_answers_about_a_record_without_result_or_moment(task_id: str) -> None:
    """No result is an empty one; no moment to wait for is none."""
    asking = NEXT.replace(task_id=task_id, fingerprint="old", sequence=4)
    done = replace(USED, state=State.DONE, result=None)
    terms = {"holder": "worker-2/b", "lease": 15, "max_crashes": 9, "now": NOW}
    assert lifecycle.claim(done, asking, **terms)[1] == Completed(b"")  # type: ignore[arg-type]
    timeless = replace(USED, due_at=None)
    same = task_id == "task-1"
    assert lifecycle.claim(timeless, asking, **terms)[1] == InProgress(same, "task-1", 0.0)  # type: ignore[arg-type]


def test_a_newer_attempt_of_a_discarded_message_runs() -> None:
    """Only what was discarded, and what came before it, stays so."""
    discarded = replace(USED, state=State.DISCARDED, failure="expired")
    terms = {"holder": "worker-2/b", "lease": 15, "max_crashes": 9, "now": NOW}
    assert lifecycle.claim(discarded, NEXT.replace(sequence=4), **terms)[1] == Dropped("expired")  # type: ignore[arg-type]
    after, answer = lifecycle.claim(discarded, NEXT, **terms)  # type: ignore[arg-type]
    assert isinstance(answer, Claimed)
    assert (after.crashes, after.created_at) == (0, NOW)
