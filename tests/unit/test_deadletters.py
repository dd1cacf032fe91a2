"""Dead letters: requeue, edit, purge, filters and files, over a store in memory with a clock that stands still."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskguard import headers
from taskguard.custody import Buried, Claimed, Dropped
from taskguard.deadletters import DeadLetters, edited
from taskguard.envelope import Envelope
from taskguard.errors import ConfigurationError, MessageError, UnknownRecord
from taskguard.letter import DeadLetter, Filter
from taskguard.letterfile import from_line, load, to_line
from taskguard.record import Reason, Record, State
from taskguard.stores.memory import MemoryStore
from tests.clocks import ManualClock
from tests.unit.letters import EMBED, HOSTILE, bury, bury_run, failure, message


@pytest.fixture
def store(clock: ManualClock) -> MemoryStore:
    """An empty store."""
    return MemoryStore(clock)


@pytest.fixture
def desk(store: MemoryStore) -> DeadLetters:
    """The operator's side of it."""
    return DeadLetters(store)


def resting(store: MemoryStore, id: str) -> tuple[Record, Envelope]:
    """The record, which must wait to be published, and its message."""
    record = store.find(id)
    assert record is not None
    assert record.state is State.PENDING
    assert record.wire is not None
    return record, Envelope.from_wire(record.wire)


class TestRequeue:
    def test_gives_the_message_all_its_chances_back(self, store: MemoryStore, desk: DeadLetters) -> None:
        """No retry is used, the sequence grows by one, and what the broker wrote about old deliveries is gone."""
        id = bury_run(store, message())
        [result] = desk.requeue([id])
        record, envelope = resting(store, id)
        assert (result.due_at, record.due_at) == (store.now(), store.now())
        assert (envelope.retries, envelope.sequence, record.crashes) == (0, 4, 0)
        assert envelope.headers[headers.KEY] == {"key": "charge:1", "fp": "before", "seq": 4}
        assert not headers.DELIVERY_HEADERS & envelope.headers.keys()
        assert envelope.body == message().body

    def test_lets_the_new_attempt_run_and_the_old_copy_not(self, store: MemoryStore, desk: DeadLetters) -> None:
        """A copy of the dead attempt in a queue shows the failure again; the requeued one is claimed."""
        id = bury_run(store, message())
        assert isinstance(store.claim(message(), holder="late", lease=15, max_crashes=3), Buried)
        list(desk.requeue([id]))
        _, envelope = resting(store, id)
        assert isinstance(store.claim(envelope, holder="new", lease=15, max_crashes=3), Claimed)

    def test_removes_a_deadline_that_has_passed(self, store: MemoryStore, desk: DeadLetters) -> None:
        """The operator's decision is newer than the deadline. Celery's and the broker's expiry go with it."""
        late = message(
            deadline_at=store.now() - 1,
            headers={"expires": "2025-01-01T00:00:00", headers.KEY: {"deadline_ms": 5, "hint": "kept"}},
            properties={"expiration": "1000", "delivery_mode": 2},
        )
        id = bury(store, late, failure(Reason.EXPIRED))
        list(desk.requeue([id]))
        _, envelope = resting(store, id)
        assert envelope.deadline_at is None
        assert envelope.headers["expires"] is None
        assert envelope.headers[headers.KEY] == {"hint": "kept", "key": "charge:1", "fp": "before", "seq": 4}
        assert envelope.properties == {"delivery_mode": 2}

    def test_keeps_a_deadline_still_to_come(self, store: MemoryStore, desk: DeadLetters) -> None:
        """A deadline that can still be met stays."""
        id = bury(store, message(deadline_at=store.now() + 60))
        list(desk.requeue([id]))
        assert resting(store, id)[1].deadline_at == store.now() + 60

    def test_counts_a_new_deadline_from_when_each_is_due(self, store: MemoryStore, desk: DeadLetters) -> None:
        """A paced letter has as long as the first."""
        ids = [bury(store, message(order)) for order in (1, 2)]
        list(desk.requeue(ids, rate=0.1, deadline=30))
        assert [resting(store, id)[1].deadline_at for id in ids] == [store.now() + 30, store.now() + 40]

    def test_books_a_moment_for_each_letter_when_paced(self, store: MemoryStore, desk: DeadLetters) -> None:
        """Fifty a second are due 20 ms apart, and one that is gone takes no moment."""
        ids = [bury(store, message(order)) for order in range(3)]
        results = list(desk.requeue([ids[0], "gone", *ids[1:]], rate=50))
        assert [result.due_at and round(result.due_at - store.now(), 3) for result in results] == [0, None, 0.02, 0.04]
        assert results[1].problem == "is no dead letter any more"

    def test_changes_nothing_in_a_dry_run(self, store: MemoryStore, desk: DeadLetters) -> None:
        """The answer is the same, the store too."""
        id = bury(store, message())
        before = store.find(id)
        [result] = desk.requeue([id], dry_run=True)
        assert result.due_at == store.now()
        assert store.find(id) == before

    def test_refuses_a_letter_without_a_readable_message(self, store: MemoryStore, desk: DeadLetters) -> None:
        """It stays a dead letter, is shown, and can be purged."""
        id = bury(store, message())
        store.records[id] = replace(store.records[id], wire=b"\xffnot json", failure="{}", history="[")
        [result] = desk.requeue([id])
        assert (result.due_at, result.problem) == (None, "holds no readable message")
        [letter] = desk.select()
        assert letter.as_dict()["error"] == "unreadable failure: {}"
        with pytest.raises(MessageError, match="no readable message"):
            desk.edit(id, args=[])
        assert list(desk.purge([id])) == [(id, True)]


class TestEdit:
    def test_makes_a_new_attempt_with_other_arguments(self, store: MemoryStore, desk: DeadLetters) -> None:
        """Body and reprs follow, the worker makes the fingerprint; the chain that comes after the task stays."""
        id = bury_run(store, message(headers={"retries": 3, "compression": "zlib"}))
        assert desk.edit(id, kwargs={"amount": 7})
        record, envelope = resting(store, id)
        assert json.loads(envelope.body) == [[1], {"amount": 7}, EMBED]
        assert envelope.headers["kwargsrepr"] == "{'amount': 7}"
        assert "compression" not in envelope.headers
        assert record.fingerprint == envelope.headers[headers.KEY]["fp"] == ""
        assert (envelope.sequence, envelope.retries) == (4, 0)

    def test_needs_all_arguments_where_the_old_ones_are_not_json(self, store: MemoryStore, desk: DeadLetters) -> None:
        """A pickle is never decoded, so half of it cannot be kept."""
        id = bury(store, message(body=b"cos\nsystem\n.", content_type="application/x-python-serialize"))
        with pytest.raises(MessageError, match="give both args and kwargs"):
            desk.edit(id, kwargs={})
        assert desk.edit(id, args=[1], kwargs={})
        _, envelope = resting(store, id)
        assert (envelope.content_type, json.loads(envelope.body)[:2]) == ("application/json", [[1], {}])

    def test_gives_a_letter_that_never_ran_another_key(self, store: MemoryStore, desk: DeadLetters) -> None:
        """The way out of key_reused: same arguments, a key of its own."""
        id = bury(store, message(), failure(Reason.KEY_REUSED))
        assert desk.edit(id, key="charge:1b")
        _, envelope = resting(store, id)
        assert (envelope.key, envelope.headers[headers.KEY]["key"]) == ("charge:1b", "charge:1b")
        assert (envelope.body, envelope.fingerprint) == (message().body, "before")

    def test_refuses_a_key_that_would_tear_a_run_from_its_history(self, store: MemoryStore, desk: DeadLetters) -> None:
        """The record of a run is its key's."""
        id = bury_run(store, message())
        with pytest.raises(MessageError, match="holds its history"):
            desk.edit(id, key="another")
        with pytest.raises(ConfigurationError, match="empty"):
            DeadLetters(store).edit(bury(store, message(2)), key="")

    def test_says_when_the_letter_is_gone(self, desk: DeadLetters) -> None:
        """Somebody else was faster."""
        assert not desk.edit("gone", args=[])


class TestWhatIsShown:
    def test_decodes_json_alone(self, store: MemoryStore, desk: DeadLetters) -> None:
        """Other bodies are known by the reprs of their producer."""
        pickled = message(
            2,
            body=b"\x80\x04.",
            content_type="application/x-python-serialize",
            headers={"argsrepr": "(2,)", "kwargsrepr": "{}"},
        )
        ids = [bury(store, message()), bury(store, pickled)]
        plain, opaque = (desk.find(id) for id in ids)
        assert plain is not None
        assert opaque is not None
        assert (plain.args, plain.kwargs) == ([1], {"amount": 5})
        assert "body" not in plain.as_dict()
        assert (opaque.args, opaque.kwargs, opaque.as_dict()["body"]) == ("(2,)", "{}", "\\x80\x04.")

    @given(
        body=st.binary(max_size=200) | st.just(b"[" * 100_000) | st.just(b"[1, 2, 3]") | st.just(b"9" * 5000),
        content_type=st.sampled_from(["application/json", "application/x-python-serialize", ""]),
        headers=st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.integers())),
        text=st.text() | st.just(HOSTILE),
    )
    def test_survives_whatever_a_broker_delivered(
        self, body: bytes, content_type: str, headers: dict[str, object], text: str
    ) -> None:
        """Any letter is listed, searched, exported, imported and requeued without an error."""
        store = MemoryStore(ManualClock())
        desk = DeadLetters(store)
        garbage = message(body=body, content_type=content_type, headers=headers, task=text)
        id = bury(store, garbage, failure(Reason.UNDECODABLE, text))
        [letter] = desk.select(Filter(text=id))
        json.dumps(letter.as_dict())
        assert from_line(to_line(letter)).envelope == letter.envelope
        [result] = desk.requeue([id])
        assert result.due_at is not None
        assert resting(store, id)[1].body == body


class TestFilters:
    @pytest.mark.parametrize(
        ("wanted", "orders"),
        [
            (Filter(), {1, 2, 3}),
            (Filter(task="shop.*"), {1, 2}),
            (Filter(task="SHOP.*"), set()),
            (Filter(reasons=frozenset({Reason.POISON, Reason.EXPIRED})), {2, 3}),
            (Filter(error='bankerror: "SAID 50'), {1}),
            (Filter(queue="mail"), {3}),
            (Filter(older_than=3600), {1}),
            (Filter(newer_than=3600), {2, 3}),
            (Filter(text='"AMOUNT": 5'), {1, 2, 3}),
            (Filter(text="charge:3"), {3}),
            (Filter(text='BankError: "said'), {1}),
            (Filter(task="shop.*", reasons=frozenset({Reason.EXPIRED})), set()),
        ],
        ids=[
            "none",
            "task",
            "case",
            "reasons",
            "error",
            "queue",
            "older",
            "newer",
            "arguments",
            "key",
            "quotes",
            "two",
        ],
    )
    def test_let_through_what_they_say(
        self, store: MemoryStore, desk: DeadLetters, clock: ManualClock, wanted: Filter, orders: set[int]
    ) -> None:
        """Every field narrows; ages count from when the letter was buried."""
        bury(store, message(1), failure(Reason.MAX_RETRIES, '"said 503"'))
        clock.advance(3600)
        bury(store, message(2), failure(Reason.POISON, ""))
        bury(store, message(3, task="mail.send", queue="mail"), failure(Reason.EXPIRED, "late"))
        assert {letter.args[0] for letter in desk.select(wanted)} == orders

    def test_find_one_cause(self, store: MemoryStore, desk: DeadLetters, clock: ManualClock) -> None:
        """Numbers in a message do not make another cause; groups count, and remember first and last."""
        for order in (1, 2, 3):
            bury(store, message(order), failure(text=f"order {order} refused"))
            clock.advance(10)
        bury(store, message(4), failure(text="timeout"))
        first, second = desk.groups()
        assert (first.count, second.count) == (3, 1)
        assert first.newest_at - first.oldest_at == 20
        assert len(list(desk.select(Filter(group=first.sample.group)))) == 3
        assert [(tally.sample.failure.reason, tally.count) for tally in desk.stats()] == [(Reason.MAX_RETRIES, 4)]


class TestNames:
    def test_may_be_ids_beginnings_or_task_ids(self, store: MemoryStore, desk: DeadLetters) -> None:
        """Each letter is meant once, however it is named."""
        one, two = bury(store, message(1)), bury(store, message(2))
        assert desk.resolve([one, one[:12], "task-2"]) == [one, two]

    def test_must_mean_exactly_one_letter(self, store: MemoryStore, desk: DeadLetters) -> None:
        """None, or several, is an error that says so."""
        for order in range(20):
            bury(store, message(order))
        first = next(desk.select()).id
        several = next(letter.id for letter in desk.select() if letter.id[0] == first[0] and letter.id != first)[0]
        for name, words in (
            ("nope", "no dead letter has the id 'nope'"),
            ("", "no dead letter"),
            (several, "write more"),
        ):
            with pytest.raises(UnknownRecord, match=words):
                desk.resolve([name])


def test_purging_leaves_old_copies_dead(store: MemoryStore, desk: DeadLetters) -> None:
    """A copy still in a queue does not run; purging twice changes nothing."""
    id = bury_run(store, message())
    assert list(desk.purge([id, id])) == [(id, True), (id, False)]
    assert store.claim(message(), holder="late", lease=15, max_crashes=3) == Dropped("purged")


class TestFiles:
    def test_bring_back_message_failure_and_history(self, store: MemoryStore, desk: DeadLetters) -> None:
        """Nothing is lost on the way, binary bodies and hostile texts included."""
        bury(store, message(1, body=b"\x00\xff", headers={"note": HOSTILE}), failure(text=HOSTILE))
        bury(store, message(2, deadline_at=1.5))
        lines = [to_line(letter) for letter in desk.select()]
        assert all(line.isascii() and "\n" not in line for line in lines)
        other = MemoryStore(ManualClock())
        assert [new for _, new in load(other, [*lines, "\n"])] == [True, True]
        for before, after in zip(desk.select(), DeadLetters(other).select(), strict=True):
            assert before.record.wire == after.record.wire
            assert (before.failure, before.attempts) == (after.failure, after.attempts)

    def test_change_nothing_when_read_twice(self, store: MemoryStore, desk: DeadLetters) -> None:
        """Nor when the letter has been requeued since, or is the record of a run in the same store."""
        ran, waiting = bury_run(store, message(1)), bury(store, message(2))
        lines = [to_line(letter) for letter in desk.select()]
        assert [new for _, new in load(store, lines)] == [False, False]
        list(desk.requeue([ran, waiting]))
        before = dict(store.records)
        assert [new for _, new in load(store, lines)] == [False, False]
        assert store.records == before

    def test_bring_back_what_was_purged(self, store: MemoryStore, desk: DeadLetters) -> None:
        """An export is a backup: its letters run again when requeued."""
        id = bury_run(store, message())
        lines = [to_line(letter) for letter in desk.select()]
        list(desk.purge([id]))
        [(copy, new)] = load(store, lines)
        assert new
        list(desk.requeue([copy]))
        assert isinstance(store.claim(resting(store, copy)[1], holder="w", lease=15, max_crashes=3), Claimed)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"v": 2}, "format 2 is not 1; upgrade"),
            ({"wire": "text"}, "not a taskguard message"),
            ({"wire": {"v": 9}}, "wire version 9"),
            ({"failure": {"reason": "bored"}}, "not a line of"),
            ({"failure": {"reason": "poison", "message": 5}}, "message is 5"),
            ({"history": [{}]}, "not a line of"),
        ],
        ids=str,
    )
    def test_name_the_line_that_cannot_be_read(
        self, store: MemoryStore, desk: DeadLetters, change: dict[str, object], words: str
    ) -> None:
        """What came before is imported, and reading the mended file again is safe."""
        bury(store, message(1))
        bury(store, message(2))
        good, other = (to_line(letter) for letter in desk.select())
        bad = json.dumps(json.loads(other) | change)
        target = MemoryStore(ManualClock())
        with pytest.raises(MessageError, match=rf"^line 2: .*{words}"):
            list(load(target, [good, bad]))
        assert [new for _, new in load(target, [good, other])] == [False, True]

    @pytest.mark.parametrize("line", ["{", "[]", "null", "[" * 100_000], ids=["open", "list", "null", "deep"])
    def test_refuse_what_is_no_export(self, line: str) -> None:
        """One error, whatever the line is."""
        with pytest.raises(MessageError, match="not a line of"):
            from_line(line)

    def test_refuse_fields_of_another_kind(self, store: MemoryStore) -> None:
        """A task that is a number would break whoever reads the store next."""
        outer = json.loads(to_line(DeadLetter.of(store.records[bury(store, message())])))
        outer["wire"]["task"] = 5
        with pytest.raises(MessageError, match="task is 5"):
            from_line(json.dumps(outer))


def test_editing_without_a_change_is_the_same_message(store: MemoryStore) -> None:
    """The rewriting itself is pure and adds nothing."""
    letter = DeadLetter.of(store.records[bury(store, message())])
    assert edited(letter) == letter.envelope
