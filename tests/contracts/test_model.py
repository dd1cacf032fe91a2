"""Random lives of messages: whatever a store is asked, in whatever order, it answers as the model does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from taskguard.clock import Clock
from taskguard.custody import Claimed, Hold, Leased, Poisoned, Unique
from taskguard.envelope import Envelope
from taskguard.ports import MessageStore
from taskguard.record import State
from tests.clocks import ManualClock
from tests.contracts.messages import LEASE, attempt, failure, message
from tests.contracts.model import Entry, Model

MAX_CRASHES = 2
SETTLED = {"complete": State.DONE, "rest": State.PENDING, "bury": State.DEAD, "discard": State.DISCARDED}
RELAY_LEASE = 30.0

messages = st.builds(
    message,
    st.sampled_from(["a", "b"]),
    task_id=st.sampled_from(["1", "2"]),
    sequence=st.integers(0, 2),
    fingerprint=st.sampled_from(["same", "same", "same", "other"]),
)
seconds = st.sampled_from([0.0, 0.25, 5.0, LEASE, RELAY_LEASE, 60.0])
chance = st.integers(0, 10**6)


class Lives(RuleBasedStateMachine):
    """One store, one model, and the tickets handed out so far, stale ones included."""

    open_store: Callable[[Clock], MessageStore]

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.store = self.open_store(self.clock)
        self.model = Model()
        self.model.now = self.clock()
        self.tokens: list[tuple[str, int]] = []
        self.holds: list[Hold] = []
        self.leases: list[Leased] = []
        self.touched: set[str] = set()

    def teardown(self) -> None:
        self.touched = set(self.model.entries)
        self.records_are_as_the_model_says()
        self.store.close()

    @rule(by=seconds)
    def time_passes(self, by: float) -> None:
        self.model.now = self.clock.advance(by)
        self.touched = set(self.model.entries)

    @rule(asked=messages, delivery=st.integers(0, 2))
    def a_worker_claims(self, asked: Envelope, delivery: int) -> None:
        hold = Hold(asked.id, f"{asked.task_id}/{asked.sequence}/{delivery}")
        known = self.model.get(asked.id)
        token_before = known.token if known is not None and known.holder == hold.holder else 0
        answer = self.store.claim(asked, holder=hold.holder, lease=LEASE, max_crashes=MAX_CRASHES)
        expected = self.model.claim(asked, hold.holder, LEASE, MAX_CRASHES)
        if isinstance(answer, Claimed | Poisoned):
            assert isinstance(expected, Claimed | Poisoned), (answer, expected)
            if expected.token:
                assert answer.token == token_before
            else:
                self.model.granted(asked.id, answer.token)
                self.tokens.append((asked.id, answer.token))
                self.holds.append(hold)
            answer = replace(answer, token=expected.token, history="")
        assert answer == expected
        self.touched = {asked.id, asked.copy_id, *self.model.entries}

    @precondition(lambda self: self.tokens)
    @rule(pick=chance, ending=st.sampled_from(["complete", "rest", "bury", "discard"]), delay=seconds, step=chance)
    def a_run_settles(self, pick: int, ending: str, delay: float, step: int) -> None:
        id, token = self.tokens[-1 - pick % len(self.tokens)]
        entry = self.model.owned(id, token)
        assert self.store.holds(id, token) == (entry is not None)
        retention = 20.0
        known = self.model.get(id)
        envelope = known.envelope if known is not None else message()
        following = envelope.replace(sequence=envelope.sequence + step % 2)
        match ending:
            case "complete":
                accepted = self.store.complete(id, token, result=b"%d" % token, retention=retention)
            case "rest":
                due_at = self.clock() + delay
                accepted = self.store.rest(id, token, following, due_at=due_at, attempt=attempt("retry"))
            case "bury":
                accepted = self.store.bury(id, token, failure=failure(), attempt=attempt("dead"))
            case _:
                accepted = self.store.discard(id, token, reason="expired", retention=retention)
        sequence = following.sequence if ending == "rest" else None
        assert accepted == (entry is not None or self.model.repeated(id, token, SETTLED[ending], sequence))
        if entry is not None:
            self._settled(entry, ending, retention, following, delay)
        self.touched = {id}

    def _settled(self, entry: Entry, ending: str, retention: float, following: Envelope, delay: float) -> None:
        match ending:
            case "complete":
                entry.result = b"%d" % entry.token
                self.model.end(entry, State.DONE, retention)
            case "rest":
                entry.outcomes.append("retry")
                self.model.rest(entry, following, self.clock() + delay)
            case "bury":
                entry.failure = failure()
                entry.outcomes.append("dead")
                self.model.end(entry, State.DEAD, None)
            case _:
                entry.reason = "expired"
                self.model.end(entry, State.DISCARDED, retention)

    @precondition(lambda self: self.holds)
    @rule(picks=st.lists(chance, max_size=3), keep=st.booleans())
    def a_parent_renews(self, picks: list[int], keep: bool) -> None:
        holds = list(dict.fromkeys(self.holds[-1 - pick % len(self.holds)] for pick in picks))
        expected = []
        for hold in holds:
            entry = self.model.held(hold)
            expected.append(entry is not None)
            if entry is not None:
                entry.due_at, entry.kept = self.clock() + LEASE, entry.kept or keep
        assert self.store.renew(holds, lease=LEASE, keep=keep) == expected
        self.touched = {hold.id for hold in holds}

    @precondition(lambda self: self.holds)
    @rule(pick=chance)
    def a_child_dies(self, pick: int) -> None:
        hold = self.holds[-1 - pick % len(self.holds)]
        known = self.model.get(hold.id)
        if known is None or known.state is State.PUBLISHED:
            return  # whether this child had claimed cannot be told from its ticket alone
        entry = self.model.held(hold)
        if entry is not None:
            self.model.crash(entry)
        assert self.store.crash(hold, known.envelope, attempt=attempt("crash")) == (entry is not None)
        self.touched = {hold.id}

    @rule(envelope=messages)
    def a_child_dies_before_its_claim(self, envelope: Envelope) -> None:
        known = self.model.get(envelope.id)
        if known is not None and known.state is not State.PUBLISHED:
            return
        entry = known or self.model.entries.setdefault(envelope.id, Entry(envelope, primary=True))
        self.model.crash(entry)
        assert self.store.crash(Hold(envelope.id, "unseen"), entry.envelope, attempt=attempt("crash"))
        self.touched = {envelope.id}

    @precondition(lambda self: self.holds)
    @rule(picks=st.lists(chance, max_size=3))
    def a_parent_finishes(self, picks: list[int]) -> None:
        holds = list(dict.fromkeys(self.holds[-1 - pick % len(self.holds)] for pick in picks))
        self.store.finish(holds)
        for hold in holds:
            self.model.finish(hold)
        self.touched = {hold.id for hold in holds}

    @rule(envelope=messages, delay=seconds, waits=st.booleans(), name=st.sampled_from(["", "", "n", "m"]))
    def a_producer_schedules(self, envelope: Envelope, delay: float, waits: bool, name: str) -> None:
        due_at, waits_on = self.clock() + delay, envelope.id if waits else ""
        answer = self.store.schedule(
            envelope, due_at=due_at, waits_on=waits_on, unique=Unique(name, 20.0) if name else None
        )
        assert answer == self.model.schedule(envelope, due_at, waits_on, name, 20.0)
        self.touched = {envelope.copy_id}

    @rule(envelope=messages)
    def a_message_is_buried(self, envelope: Envelope) -> None:
        assert self.store.bury_message(envelope, failure=failure()) == envelope.copy_id
        self.model.bury_message(envelope, failure())
        self.touched = {envelope.copy_id}

    @rule(limit=st.integers(1, 4))
    def a_relay_takes(self, limit: int) -> None:
        due = self.model.due()
        leased = self.store.take_due(limit=limit, lease=RELAY_LEASE)
        assert len({item.id for item in leased}) == len(leased) == min(limit, len(due))
        since = [due[item.id] for item in leased]
        assert since == sorted(due.values())[: len(leased)], "not the longest due first"
        for item in leased:
            entry = self.model.lease_out(item.id, item.lease, RELAY_LEASE)
            assert Envelope.from_wire(item.wire) == entry.envelope
        self.leases += leased
        self.touched = {item.id for item in leased}

    @precondition(lambda self: self.leases)
    @rule(picks=st.lists(chance, min_size=1, max_size=3))
    def a_relay_removes(self, picks: list[int]) -> None:
        leased = list(dict.fromkeys(self.leases[-1 - pick % len(self.leases)] for pick in picks))
        assert self.store.remove(leased) == sum(self.model.remove(item.id, item.lease) for item in leased)
        self.touched = {item.id for item in leased}

    @rule(task_id=st.sampled_from(["1", "2"]))
    def an_operator_revokes(self, task_id: str) -> None:
        self.store.revoke([task_id], retention=20.0)
        self.model.revoked[task_id] = self.clock() + 20.0

    @rule(name=st.sampled_from(["n", "m"]), task_id=st.sampled_from(["1", "2"]))
    def a_task_releases_its_name(self, name: str, task_id: str) -> None:
        holder, until = self.model.names.get(name, ("", 0.0))
        holds = holder == task_id and until > self.clock()
        assert self.store.release_unique(name, task_id) == holds
        if holds:
            del self.model.names[name]

    @precondition(lambda self: self.model.entries)
    @rule(pick=chance, delay=seconds, purge=st.booleans())
    def an_operator_decides(self, pick: int, delay: float, purge: bool) -> None:
        dead = [id for id, entry in self.model.living().items() if entry.state is State.DEAD]
        ids = dead or sorted(self.model.entries) or [message().id]
        id = ids[pick % len(ids)]
        entry = self.model.get(id)
        envelope = entry.envelope.replace(sequence=entry.envelope.sequence + 1) if entry is not None else message()
        if purge:
            assert self.store.purge(id, retention=20.0) == bool(dead)
        else:
            assert self.store.requeue(id, envelope, due_at=self.clock() + delay) == bool(dead)
        if entry is not None and dead and purge:
            self.model.purge(id, entry, 20.0)
        elif entry is not None and dead:
            self.model.rest(entry, envelope, self.clock() + delay)
            entry.crashes, entry.failure = 0, None
            entry.outcomes.append("requeue")
        self.touched = {id}

    @rule()
    def an_operator_looks(self) -> None:
        self.store.expire(limit=1000)
        living = self.model.living()
        depths = self.store.depths()
        for state in State:
            expected = {id for id, entry in living.items() if entry.state is state}
            assert {record.id for record in self.store.scan(state)} == expected
            assert depths[state].count == len(expected)
        dues = [entry.due_at for entry in living.values() if entry.due_at is not None]
        assert self.store.due_in() == (min(dues) - self.clock() if dues else None)

    @invariant()
    def records_are_as_the_model_says(self) -> None:
        for id in sorted(self.touched):
            entry, record = self.model.get(id), self.store.find(id)
            if entry is None or record is None:
                assert record is None, f"unexpected {record}"
                assert entry is None, f"missing {entry}"
                continue
            assert record.state is entry.state
            assert record.primary == entry.primary
            assert record.task_id == entry.envelope.task_id
            assert record.sequence == entry.envelope.sequence
            assert (record.crashes, record.kept) == (entry.crashes, entry.kept)
            assert (record.due_at, record.expires_at) == (entry.due_at, entry.expires_at)
            assert [a.outcome for a in record.attempts] == entry.outcomes
            assert (record.wire is not None) == entry.resting
            if record.wire is not None:
                assert Envelope.from_wire(record.wire) == entry.envelope
            if entry.state is State.DONE:
                assert record.result == entry.result
            if entry.state is State.RUNNING:
                assert (record.token, record.holder) == (entry.token, entry.holder)
        self.touched = set()


EXAMPLES = {"memory": 200, "redis": 40, "sqlite": 25, "postgresql": 25, "mariadb": 20}


def test_a_store_lives_as_the_model_says(
    new_store: Callable[[Clock], MessageStore], request: pytest.FixtureRequest
) -> None:
    """Clock moves, lease ends, stale tokens, repeated calls, operators: no order of them tells store and model apart.

    A failure prints the steps, and a blob for `reproduce_failure`.
    """
    machine: Any = type("Lives", (Lives,), {"open_store": staticmethod(new_store)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES[request.node.callspec.params["store_url"]],
            stateful_step_count=40,
            deadline=None,
            database=None,
            print_blob=True,
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
