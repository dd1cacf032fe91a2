"""What the contract cannot see of the pure transitions: they are pure, and a refusal is the same object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskguard import lifecycle
from taskguard.custody import Claimed, Hold
from taskguard.envelope import Envelope
from taskguard.record import Failure, Reason, Record, State
from taskguard.stores.memory import MemoryStore

NOW = 1_750_000_000.0
ENVELOPE = Envelope(task="shop.charge", task_id="task-1", key="order-1", body=b"[]", queue="orders")
RUNNING, _ = lifecycle.claim(None, ENVELOPE, holder="worker-1/a", lease=15, max_crashes=3, now=NOW)
DEAD = lifecycle.bury(RUNNING, failure=Failure(reason=Reason.POISON), attempt=None, now=NOW)


@pytest.mark.parametrize(
    "refusal",
    [
        lambda record: lifecycle.renew(record, "stranger", lease=15, now=NOW, keep=True),
        lambda record: lifecycle.finish(record, "worker-1/a", now=NOW),
        lambda record: lifecycle.remove(record, "", now=NOW),
        lambda record: lifecycle.remove(record, "stranger", now=NOW),
    ],
)
@pytest.mark.parametrize("record", [None, RUNNING, DEAD], ids=["none", "running", "dead"])
def test_a_refused_step_returns_the_very_record(
    record: Record | None, refusal: Callable[[Record | None], Record | None]
) -> None:
    """Stores read "the same object" as "nothing to write"."""
    assert refusal(record) is record


class WatchedRecords(dict[str, Record]):
    """A store's records, with the ids of those that were written since they were put here."""

    def __init__(self, records: dict[str, Record]) -> None:
        super().__init__(records)
        self.written: list[str] = []

    def __setitem__(self, id: str, record: Record) -> None:
        self.written.append(id)
        super().__setitem__(id, record)


def test_what_a_heartbeat_may_not_renew_nor_finish_is_not_written() -> None:
    """Of a worker's runs in one call, only those that change cost a write: not a stranger's, nor one unheard of."""
    store = MemoryStore(lambda: NOW)
    mine, others, unknown = (ENVELOPE.replace(key=key) for key in ("mine", "others", "unknown"))
    for envelope, holder in ((mine, "worker-1/a"), (others, "worker-2/b")):
        store.claim(envelope, holder=holder, lease=15, max_crashes=3)
    holds = [Hold(envelope.id, "worker-1/a") for envelope in (others, mine, unknown)]
    store.records = renewed = WatchedRecords(store.records)
    store.renew(holds, lease=15, keep=True)
    assert renewed.written == [mine.id]
    store.complete(mine.id, store.records[mine.id].token, result=b"1", retention=60)
    store.records = finished = WatchedRecords(store.records)
    store.finish(holds)
    assert finished.written == [mine.id]


def test_a_refused_claim_returns_the_very_record() -> None:
    """A redelivery costs a read and no write."""
    after, _ = lifecycle.claim(RUNNING, ENVELOPE, holder="worker-2/b", lease=15, max_crashes=3, now=NOW)
    assert after is RUNNING


def test_an_expired_record_counts_as_none() -> None:
    """Whether or not it was swept already."""
    done = lifecycle.complete(RUNNING, result=b"1", retention=60, now=NOW)
    _, answer = lifecycle.claim(done, ENVELOPE, holder="worker-2/b", lease=15, max_crashes=3, now=NOW + 60)
    assert isinstance(answer, Claimed)


@given(st.floats(-1e6, 1e6, allow_nan=False))
def test_tokens_grow_even_when_the_clock_does_not(drift: float) -> None:
    """A server's clock that was set back does not give an old run custody again."""
    record, tokens = RUNNING, [RUNNING.token]
    for n in range(4):
        record = lifecycle.crashed(record, now=NOW + drift * n)
        record, answer = lifecycle.claim(
            record, ENVELOPE, holder=f"worker/{n}", lease=15, max_crashes=9, now=NOW + drift * n
        )
        assert isinstance(answer, Claimed)
        tokens.append(answer.token)
    assert tokens == sorted(set(tokens))


@pytest.mark.parametrize("ended", [DEAD, lifecycle.discard(RUNNING, reason="x", retention=60, now=NOW)])
def test_tokens_grow_across_an_ended_message_when_the_clock_is_set_back(ended: Record) -> None:
    """The next message of a key outranks the runs of the one before, whatever the clock says."""
    following = ENVELOPE.replace(task_id="task-2")
    _, answer = lifecycle.claim(ended, following, holder="worker-2/b", lease=15, max_crashes=3, now=NOW - 3600)
    assert isinstance(answer, Claimed)
    assert answer.token > RUNNING.token


@pytest.mark.parametrize("state", State)
def test_only_a_running_record_is_owned(state: State) -> None:
    """A token outlives its run and is worth nothing then."""
    assert lifecycle.owned(replace(RUNNING, state=state), RUNNING.token) is (state is State.RUNNING)
    assert not lifecycle.owned(replace(RUNNING, state=state), RUNNING.token + 1)
    assert not lifecycle.owned(None, RUNNING.token)


def test_a_letter_is_displaced_by_another_message_only() -> None:
    """Its own next attempt overwrites it."""
    letter = lifecycle.displaced(DEAD, ENVELOPE.replace(task_id="task-2"))
    assert letter == replace(DEAD, id=ENVELOPE.copy_id, primary=False)
    assert lifecycle.displaced(DEAD, ENVELOPE.replace(sequence=1)) is None
    assert lifecycle.displaced(RUNNING, ENVELOPE.replace(task_id="task-2")) is None
    assert lifecycle.displaced(None, ENVELOPE) is None
