"""The outbox of every SQL store: what is handed over, in which order, and what becomes of what is not published."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest
from sqlalchemy import Connection, Engine, create_engine, select

from taskguard.celery.composing import Composed
from taskguard.envelope import Envelope, record_id
from taskguard.errors import StoreUnavailable
from taskguard.handover import MAX_TRIES, Handed, Held, Outgoing
from taskguard.outbox.place import Place
from taskguard.outbox.transactions import ConnectionTransaction
from taskguard.record import Failure, Reason, State
from taskguard.stores.sql import SQLStore
from taskguard.stores.sql.outgoing import family, insertion, parameters
from taskguard.stores.sql.schema import messages
from tests.contracts.messages import existing, message

Outcomes = list[Exception | None]


class Broker:
    """Takes what it is given, but for the keys in ``refused``; ``gone_after`` so many its link breaks."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.refused: set[str] = set()
        self.gone_after: int | None = None

    def __call__(self, rows: Sequence[Outgoing]) -> Outcomes:
        outcomes: Outcomes = []
        stopped: set[str] = set()
        for number, row in enumerate(rows):
            key = Envelope.from_wire(row.wire).key
            if self.gone_after is not None and number >= self.gone_after:
                outcomes.append(Held(OSError("the broker is away")))
            elif row.ordering and row.ordering in stopped:
                outcomes.append(Held())
            elif key in self.refused:
                stopped.add(row.ordering)
                outcomes.append(ValueError(f"{key}: no route"))
            else:
                self.keys.append(key)
                outcomes.append(None)
        return outcomes


class House:
    """A store, a producer's engine on the same database, and a broker."""

    def __init__(self, url: str, namespace: str) -> None:
        self.namespace = namespace
        self.store = SQLStore.from_url(url, namespace=namespace)
        self.store.ping()
        self.engine: Engine = create_engine(url)
        self.broker = Broker()

    def envelope(self, key: str) -> Envelope:
        return message(key, task_id=f"task-{key}").replace(
            headers={"task": "shop.charge", "id": f"task-{key}", "taskguard": {"key": key, "fp": "same", "seq": 0}}
        )

    def write(self, *keys: str, ordering: str = "", commit: bool = True, first: int = 0, **changes: object) -> None:
        """One transaction that sends these messages."""
        kind = family(self.engine.dialect.name)
        due = changes.pop("due_at_ms", None)
        with self.engine.connect() as connection:
            for step, key in enumerate(keys, start=first):
                envelope = self.envelope(key).replace(**changes)
                row = parameters(
                    envelope, namespace=self.namespace, wire=envelope.to_ready("tag"), due_at_ms=due,  # type: ignore[arg-type]
                    ordering=ordering, step=step, kind=kind, tells=True,
                )  # fmt: skip
                connection.execute(insertion(kind, tells=True), row)
            if commit:
                connection.commit()

    def send(self, connection: Connection, *keys: str) -> None:
        """These messages in this transaction, together, as a producer's group is sent."""
        envelopes = [self.envelope(key) for key in keys]
        composed = [Composed(each, each.to_ready("tag"), None, "group") for each in envelopes]
        ConnectionTransaction(connection).write(Place(self.engine.url, self.namespace), composed)

    def ordinals(self) -> list[int]:
        with self.engine.connect() as connection:
            mine = messages.c.namespace == self.namespace
            return list(connection.execute(select(messages.c.ordinal).where(mine)).scalars())

    def hand_over(self, limit: int = 100, retention: float = 0.0) -> Handed:
        return self.store.outbox.hand_over(self.broker, limit=limit, lease=30, retention=retention)

    def close(self) -> None:
        self.engine.dispose()
        self.store.close()


@pytest.fixture(params=("sqlite", "postgresql", "mariadb"))
def house(request: pytest.FixtureRequest, namespace: str) -> Iterator[House]:
    """An empty outbox in each database."""
    house = House(request.getfixturevalue(f"{request.param}_url"), namespace)
    yield house
    house.close()


def test_what_a_transaction_wrote_is_handed_over_when_it_has_committed(house: House) -> None:
    """In the order in which it was written, whole, and then it is gone."""
    house.write("a", "b", "c")
    assert house.hand_over() == Handed(taken=3, published=3)
    assert house.broker.keys == ["a", "b", "c"]
    assert house.hand_over() == Handed()
    assert house.store.due_in() is None


def test_what_is_rolled_back_was_never_there(house: House) -> None:
    """Neither is it published, nor does anything of it remain."""
    house.write("a", commit=False)
    assert house.hand_over() == Handed()
    assert house.store.find(house.envelope("a").copy_id) is None


def test_a_row_is_a_record_like_any_other(house: House) -> None:
    """PENDING, due at once, no primary; the message in it is the one that was sent."""
    house.write("a")
    record = existing(house.store, house.envelope("a").copy_id)
    assert (record.state, record.primary, record.task_id) == (State.PENDING, False, "task-a")
    assert record.due_at == pytest.approx(house.store.now(), abs=30)
    assert Envelope.from_wire(record.wire or b"") == house.envelope("a")


def test_what_is_due_later_waits(house: House) -> None:
    """Until its moment."""
    house.write("later", due_at_ms=int((house.store.now() + 3600) * 1000))
    house.write("now")
    assert house.hand_over().published == 1
    assert house.broker.keys == ["now"]
    status = house.store.outbox.status()
    assert (status.waiting, status.later) == (0, 1)


def test_a_batch_is_bounded(house: House) -> None:
    """The longest due first."""
    for due, key in enumerate("abcde", start=1):
        house.write(key, due_at_ms=due)
    assert [house.hand_over(limit=2).taken for _ in range(4)] == [2, 2, 1, 0]
    assert house.broker.keys == [*"abcde"]


def test_what_is_past_its_deadline_is_left_to_be_settled(house: House) -> None:
    """It is not published; the relay's other way takes it, whole."""
    house.write("late", deadline_at=house.store.now() - 1)
    house.write("fresh", deadline_at=house.store.now() + 3600)
    assert house.hand_over().published == 1
    assert house.broker.keys == ["fresh"]
    [leased] = house.store.take_due(limit=10, lease=30)
    assert Envelope.from_wire(leased.wire).key == "late"
    assert house.store.remove([leased]) == 1


def test_the_other_way_leaves_the_outbox_alone(house: House) -> None:
    """A row that is in time has one way out."""
    house.write("a")
    assert house.store.take_due(limit=10, lease=30) == []


def test_a_refused_message_waits_longer_each_time_and_ends_as_a_dead_letter(house: House) -> None:
    """The others go out; the reason is kept, and the message as operators read it."""
    house.write("bad", "good")
    house.broker.refused = {"bad"}
    handed = house.hand_over()
    assert (handed.taken, handed.published, [str(why) for _, why in handed.refused]) == (2, 1, ["bad: no route"])
    id = house.envelope("bad").copy_id
    waits = []
    for tries in range(1, MAX_TRIES):
        record = existing(house.store, id)
        assert (record.state, record.crashes) == (State.PENDING, tries)
        waits.append((record.due_at or 0) - record.updated_at)
        _make_due(house, id)
        assert len(house.hand_over().refused) == 1
    assert waits == sorted(waits)
    assert waits[0] == pytest.approx(1)
    assert waits[-1] >= 32
    letter = existing(house.store, id)
    assert (letter.state, letter.due_at) == (State.DEAD, None)
    assert Failure.from_json(letter.failure).reason is Reason.UNPUBLISHABLE
    assert Envelope.from_wire(letter.wire or b"") == house.envelope("bad")
    assert len(letter.attempts) == MAX_TRIES
    assert house.store.requeue(id, house.envelope("bad"), due_at=house.store.now())
    house.broker.refused = set()
    [leased] = house.store.take_due(limit=10, lease=30)
    assert Envelope.from_wire(leased.wire).key == "bad"


def test_refused_messages_may_be_tried_again_at_once(house: House) -> None:
    """An operator has mended the queue."""
    house.write("a")
    house.broker.refused = {"a"}
    house.hand_over()
    assert house.store.outbox.status().retrying == 1
    house.broker.refused = set()
    assert house.store.outbox.requeue() == 1
    assert house.hand_over().published == 1


def test_a_broker_that_is_away_changes_nothing(house: House) -> None:
    """Every row is there as it was, due at once and untried; the error is the relay's to wait out."""
    house.write("a", "b")
    house.broker.gone_after = 0
    with pytest.raises(OSError, match="away"):
        house.hand_over()
    house.broker.gone_after = None
    assert existing(house.store, house.envelope("a").copy_id).crashes == 0
    assert house.hand_over().published == 2
    assert house.broker.keys == ["a", "b"]


def test_what_was_confirmed_before_the_broker_went_away_is_not_published_again(house: House) -> None:
    """The rest waits, untried, and goes out in its order when it is back."""
    house.write(*"abcd")
    house.broker.gone_after = 2
    handed = house.hand_over()
    assert (handed.published, str(handed.away)) == (2, "the broker is away")
    house.broker.gone_after = None
    assert house.hand_over().published == 2
    assert house.broker.keys == [*"abcd"]


def test_published_rows_may_be_kept(house: House) -> None:
    """For so many seconds, and never due again."""
    house.write("a")
    assert house.hand_over(retention=3600).published == 1
    record = existing(house.store, house.envelope("a").copy_id)
    assert (record.state, record.due_at) == (State.PUBLISHED, None)
    assert record.expires_at == pytest.approx(house.store.now() + 3600, abs=30)
    assert house.hand_over() == Handed()


def test_the_same_task_id_sent_again_takes_the_place_of_what_rests(house: House) -> None:
    """One message, the newer one; also of a message that was published and kept."""
    house.write("a", due_at_ms=10**13)
    house.write("a")
    assert house.hand_over(retention=3600).published == 1
    house.write("a")
    assert house.hand_over().published == 1


def test_a_row_of_another_namespace_is_not_ours(house: House) -> None:
    """Applications share a database."""
    house.write("a")
    other = SQLStore.from_url(house.engine.url.render_as_string(False), namespace=f"{house.namespace}-other")
    assert other.outbox.hand_over(house.broker, limit=9, lease=9, retention=0) == Handed()
    other.close()


# -- order -------------------------------------------------------------------------------------------------------------


def test_a_refused_message_holds_up_its_key_and_no_other(house: House) -> None:
    """Until it is published, or is a dead letter."""
    house.write("a1", "a2", ordering="a")
    house.write("b1", ordering="b")
    house.broker.refused = {"a1"}
    assert house.hand_over().published == 1
    assert house.broker.keys == ["b1"]
    assert existing(house.store, house.envelope("a2").copy_id).crashes == 0, "it was not at fault"
    assert house.hand_over().taken == 0
    house.broker.refused = set()
    house.store.outbox.requeue()
    assert house.hand_over().published == 2
    assert house.broker.keys == ["b1", "a1", "a2"]


def test_a_dead_letter_lets_its_key_go_on(house: House) -> None:
    """Or one message would stop a key for ever."""
    house.write("a1", "a2", ordering="a")
    house.broker.refused = {"a1"}
    for _ in range(MAX_TRIES):
        _make_due(house, house.envelope("a1").copy_id)
        house.hand_over()
    assert existing(house.store, house.envelope("a1").copy_id).state is State.DEAD
    house.hand_over()
    assert house.broker.keys == ["a2"]


def test_a_later_message_does_not_pass_one_that_is_not_due(house: House) -> None:
    """A countdown on the first holds up the second."""
    house.write("a1", ordering="a", due_at_ms=int((house.store.now() + 3600) * 1000))
    house.write("a2", ordering="a")
    assert house.hand_over() == Handed()


def test_a_key_that_a_relay_has_in_hand_is_passed_over_by_the_others(house: House) -> None:
    """While one publishes the first of a key, another takes neither that nor what follows; but all else."""
    house.write("a1", ordering="a")
    inside, others = threading.Event(), []

    def slow(rows: Sequence[Outgoing]) -> Outcomes:
        house.write("a2", ordering="a")
        house.write("b1", ordering="b")
        house.write("x")
        others.append(house.hand_over())
        inside.set()
        return house.broker(rows)

    house.store.outbox.hand_over(slow, limit=9, lease=30, retention=0)
    assert inside.is_set()
    assert others == [Handed(taken=2, published=2)]
    assert house.broker.keys == ["b1", "x", "a1"]
    assert house.hand_over().published == 1
    assert house.broker.keys[-1] == "a2"


def test_two_relays_never_publish_the_same_row(house: House) -> None:
    """Side by side until nothing is left: each once, each key in order."""
    keys = [f"{name}{n}" for n in range(20) for name in "abcd"]
    for key in keys:
        house.write(key, ordering=key[0])
    lock, failures = threading.Lock(), []

    def locked(rows: Sequence[Outgoing]) -> Outcomes:
        with lock:
            return house.broker(rows)

    def drain() -> None:
        try:
            while house.store.outbox.status().waiting:
                house.store.outbox.hand_over(locked, limit=3, lease=30, retention=0)
        except StoreUnavailable as exc:
            failures.append(exc)

    threads = [threading.Thread(target=drain) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures
    assert sorted(house.broker.keys) == sorted(keys)
    for name in "abcd":
        assert [int(key[1:]) for key in house.broker.keys if key[0] == name] == list(range(20))


# -- operators ---------------------------------------------------------------------------------------------------------


def test_status_peek_and_purge_say_and_do_what_is_there(house: House) -> None:
    """Counts, the lag of the oldest, the next ones; and purging takes what was asked for."""
    house.write("a", "b", ordering="k")
    status = house.store.outbox.status()
    assert (status.waiting, status.keys, status.dead) == (2, 1, 0)
    assert 0 <= status.lag < 60
    assert [record.task_id for record in house.store.outbox.peek(1)] == ["task-a"]
    assert house.store.outbox.purge(task="other") == 0
    assert house.store.outbox.purge(older_than=3600) == 0
    assert house.store.outbox.purge(task="shop.charge") == 2
    assert house.store.outbox.status().waiting == 0


def test_waiting_ends_when_a_transaction_commits_where_the_database_can_tell(house: House) -> None:
    """PostgreSQL tells; a rollback tells nobody; elsewhere the time is waited out."""
    outbox = house.store.outbox
    told = outbox.wait(0.05)
    assert not told
    house.write("a", commit=False)
    assert not outbox.wait(0.05)
    house.write("b")
    assert outbox.wait(5 if _tells(house) else 0.05) is _tells(house)
    assert house.store.due_in() is not None


def _tells(house: House) -> bool:
    return house.engine.dialect.name == "postgresql"


def _make_due(house: House, id: str) -> None:
    from sqlalchemy import update

    from taskguard.stores.sql.schema import messages

    with house.engine.begin() as connection:
        connection.execute(
            update(messages)
            .where(messages.c.namespace == house.namespace, messages.c.id == id, messages.c.due_at.is_not(None))
            .values(due_at=1)
        )


def test_the_ordering_key_rests_as_its_hash(house: House) -> None:
    """However long it is."""
    house.write("a", ordering="k" * 10_000)
    seen: list[str] = []

    def look(rows: Sequence[Outgoing]) -> Outcomes:
        seen.extend(row.ordering for row in rows)
        return [None] * len(rows)

    house.store.outbox.hand_over(look, limit=9, lease=30, retention=0)
    assert seen == [record_id("k" * 10_000)]
