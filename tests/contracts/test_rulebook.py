"""The rules in every process: in effect within a second, never older than before, kept while the store is away."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import pytest
import redis

from taskguard.errors import StoreUnavailable
from taskguard.events import Event
from taskguard.limiter.limiter import Limiter
from taskguard.limiter.rulebook import RuleBook
from taskguard.ports import RuleStore
from taskguard.rules import Identity, Rule, RuleSet
from taskguard.stores import open_permits, open_rules
from taskguard.stores.memory.rules import MemoryRules

EACH = Rule(id="each", client="*", limits="100/minute")
ACME = Rule(id="acme", client="acme", limits="500/minute")
PATIENCE = 10.0

MakeBook = Callable[..., RuleBook]


@pytest.fixture
def make_book() -> Iterator[MakeBook]:
    """Open books, and close them in the end."""
    books: list[RuleBook] = []

    def make(store: RuleStore, **options: object) -> RuleBook:
        books.append(RuleBook(store, **options))  # type: ignore[arg-type]
        return books[-1]

    yield make
    for book in books:
        book.close()


def ids(book: RuleBook) -> list[str]:
    """The rules in effect."""
    found = book.rules(patience=PATIENCE)
    assert found is not None
    return [rule.id for rule in found.rules]


def put(store: RuleStore, *rules: Rule) -> int:
    """Put rules as somebody."""
    return store.put(rules, who="ann", why="a test")


def test_a_book_has_the_rules_of_its_store(store_url: str, namespace: str, make_book: MakeBook) -> None:
    """From the first question on."""
    store = open_rules(store_url, namespace=namespace)
    put(store, EACH, ACME)
    assert ids(make_book(open_rules(store_url, namespace=namespace))) == ["acme", "each"]
    assert ids(make_book(open_rules(store_url, namespace=f"{namespace}-empty"))) == []


def test_a_change_is_in_effect_everywhere_within_a_second(store_url: str, namespace: str, make_book: MakeBook) -> None:
    """Four books, three changes, no restart."""
    store = open_rules(store_url, namespace=namespace)
    books = [make_book(open_rules(store_url, namespace=namespace)) for _ in range(4)]
    assert [ids(book) for book in books] == [[]] * 4
    for rule in (EACH, ACME, Rule(id="each", client="*", limits="7/minute")):
        version = put(store, rule)
        made = time.monotonic()
        assert all(book.wait_for(version, PATIENCE) for book in books)
        assert time.monotonic() - made < 1.0
    for book in books:
        rules = book.rules()
        assert rules is not None
        assert rules.match(Identity(client="x"))[0].limits[0].limit == 7


def child(book: RuleBook, pipe: Connection, version: int) -> None:
    """What a forked worker sees: the parent's rules at once, the new ones when they come."""
    pipe.send([rule.id for rule in (book.rules() or RuleSet()).rules])
    pipe.send(book.wait_for(version, PATIENCE))
    pipe.recv()
    found = book.rules()
    pipe.send([rule.id for rule in found.rules] if found else [])


@pytest.mark.parametrize("backend", ["redis", "postgresql"])
def test_a_forked_child_listens_for_itself(
    backend: str, request: pytest.FixtureRequest, namespace: str, make_book: MakeBook
) -> None:
    """It has its parent's rules from the start, and hears of the next change within a second."""
    url = request.getfixturevalue(f"{backend}_url")
    store = open_rules(url, namespace=namespace)
    version = put(store, EACH)
    book = make_book(open_rules(url, namespace=namespace))
    assert ids(book) == ["each"]
    mine, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(book, its, version))
    process.start()
    try:
        assert mine.poll(PATIENCE)
        assert mine.recv() == ["each"]
        assert mine.poll(PATIENCE)
        assert mine.recv() is True
        put(store, ACME)
        time.sleep(1.0)  # the promise itself: a second after the change, the child has it
        mine.send("look")
        assert mine.poll(PATIENCE)
        assert mine.recv() == ["acme", "each"]
        assert ids(book) == ["acme", "each"]
    finally:
        process.kill()
        process.join(PATIENCE)


class TestMonotonic:
    def test_an_older_version_is_never_taken(self, namespace: str, make_book: MakeBook) -> None:
        """A replica that lags, a store restored from yesterday: the newest that was seen stays in effect."""
        store = MemoryRules()
        put(store, EACH)
        older = store.rules()
        assert older is not None
        newest = put(store, ACME)
        book = make_book(store)
        assert ids(book) == ["acme", "each"]
        store._rules = older
        book.told(older.version)
        book.saw(older.version)
        book.told(0)
        assert (ids(book), book.version) == (["acme", "each"], newest)

    def test_a_store_that_announces_a_version_and_gives_an_older_one_changes_nothing(self, make_book: MakeBook) -> None:
        """The announcement came from the primary, the answer from a replica that lags."""
        store = Lagging()
        put(store, EACH)
        store.lags_at = store._rules
        newest = put(store, ACME)
        book = make_book(store)
        store.lags = False
        assert ids(book) == ["acme", "each"]
        store.lags = True
        book.told(newest + 1)
        assert (ids(book), book.version) == (["acme", "each"], newest)

    def test_rules_put_into_an_emptied_store_are_news(self, namespace: str, make_book: MakeBook) -> None:
        """Versions follow the clock, so nobody waits for a count to catch up."""
        store = MemoryRules()
        before = put(store, EACH, ACME)
        book = make_book(store)
        assert ids(book) == ["acme", "each"]
        store._rules = RuleSet()
        while store._clock() * 1000 <= before + 1:
            time.sleep(0.001)
        version = put(store, EACH)
        assert book.wait_for(version, PATIENCE)
        assert ids(book) == ["each"]

    def test_readers_never_see_versions_go_back(self, redis_url: str, namespace: str, make_book: MakeBook) -> None:
        """While rules change as fast as they can."""
        store = open_rules(redis_url, namespace=namespace)
        book = make_book(open_rules(redis_url, namespace=namespace))
        version = put(store, EACH)
        assert book.wait_for(version, PATIENCE)
        seen: list[int] = []
        done = threading.Event()

        def read() -> None:
            while not done.is_set():
                found = book.rules()
                assert found is not None
                if not seen or seen[-1] != found.version:
                    seen.append(found.version)

        reading = threading.Thread(target=read)
        reading.start()
        for n in range(40):
            version = put(store, Rule(id="each", client="*", limits=f"{n + 1}/minute"))
            book.saw(version)
        assert book.wait_for(version, PATIENCE)
        done.set()
        reading.join()
        assert seen == sorted(set(seen))

    def test_a_version_heard_with_a_permit_is_fetched_at_once(self, make_book: MakeBook) -> None:
        """Without waiting for the next look."""
        store = Deaf()
        book = make_book(store)
        assert ids(book) == []
        version = put(store, EACH)
        assert book.version == 0
        book.saw(version)
        assert book.wait_for(version, PATIENCE)

    def test_a_permits_answer_tells_of_newer_rules(self, redis_url: str, namespace: str, make_book: MakeBook) -> None:
        """Where the store keeps both, the next call after a change brings it, whatever became of the push."""
        from taskguard.stores.redis.rules import RedisRules

        class DeafRedis(RedisRules):
            watch = Deaf.watch

        store = open_rules(redis_url, namespace=namespace)
        put(store, EACH)
        book = make_book(DeafRedis.from_url(redis_url, namespace=namespace))
        assert ids(book) == ["each"]
        limiter = Limiter(book, open_permits(redis_url, namespace=namespace, timeout=PATIENCE))
        version = put(store, Rule(id="each", client="*", limits="7/minute"))
        assert book.version < version
        assert limiter.check(Identity(client="ann")).allowed
        assert book.wait_for(version, PATIENCE)


class Deaf(MemoryRules):
    """Rules of a store that tells once what there is, and then nothing more."""

    def watch(self, changed: Callable[[int], None], *, stop: Callable[[], bool]) -> None:
        changed(self.version())
        while not stop():
            time.sleep(0.01)


class Lagging(MemoryRules):
    """Rules of a store whose answers may be from an older day."""

    def __init__(self) -> None:
        super().__init__()
        self.lags = False
        self.lags_at = RuleSet()

    def rules(self, known: int = 0) -> RuleSet | None:
        return self.lags_at if self.lags else super().rules(known)


class Away(MemoryRules):
    """Rules of a store that may be away."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False

    def rules(self, known: int = 0) -> RuleSet | None:
        if self.away:
            raise StoreUnavailable("store does not answer; wait")
        return super().rules(known)


def test_redis_tells_at_once(
    redis_url: str, namespace: str, make_book: MakeBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a push, without waiting for a look: here nobody looks again for a minute."""
    monkeypatch.setattr("taskguard.stores.redis.rules.LOOK", 60.0)
    store = open_rules(redis_url, namespace=namespace)
    book = make_book(open_rules(redis_url, namespace=namespace))
    assert ids(book) == []
    with redis.Redis.from_url(redis_url) as client:  # it has looked, and may still be about to subscribe
        channel = f"{{tg:{namespace}:0}}:rules:changed"
        until = time.monotonic() + PATIENCE
        while client.pubsub_numsub(channel)[0][1] == 0:
            assert time.monotonic() < until
            time.sleep(0.005)
    for rule in (EACH, ACME):
        assert book.wait_for(put(store, rule), PATIENCE)


class TestOutages:
    def test_a_store_that_is_away_leaves_the_rules_that_are_known(self, make_book: MakeBook) -> None:
        """And what was changed meanwhile is in effect when it is back."""
        store = Away()
        put(store, EACH)
        book = make_book(store)
        assert ids(book) == ["each"]
        store.away = True
        book.told(book.version + 1)
        assert ids(book) == ["each"]
        store.away = False
        version = put(store, ACME)
        assert book.wait_for(version, PATIENCE)

    def test_nobody_waits_longer_than_told_for_rules_that_cannot_be_read(self, make_book: MakeBook) -> None:
        """The first callers wait that long, once for all of them; later ones do not wait."""
        store = Away()
        store._rules = RuleSet(7, (EACH,))
        store.away = True
        book = make_book(store)
        began = time.monotonic()
        assert book.rules(patience=0.1) is None
        assert 0.05 < time.monotonic() - began < 1.0
        began = time.monotonic()
        assert [book.rules(patience=0.1) for _ in range(100)] == [None] * 100
        assert time.monotonic() - began < 0.1
        store.away = False
        assert book.wait_for(7, PATIENCE)
        assert ids(book) == ["each"]

    def test_rules_that_cannot_be_read_change_nothing(
        self, redis_url: str, namespace: str, make_book: MakeBook, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A newer taskguard wrote them, say: one line says so, and the known ones go on."""
        store = open_rules(redis_url, namespace=namespace)
        put(store, EACH)
        book = make_book(open_rules(redis_url, namespace=namespace))
        assert ids(book) == ["each"]
        with redis.Redis.from_url(redis_url) as client:
            base = f"{{tg:{namespace}:0}}:rules"
            client.hset(base, "odd", '{"id": "odd", "limits": "1/s", "colour": "red"}')
            version = client.incr(f"{base}:version")
        book.told(version)
        book.told(version)
        assert ids(book) == ["each"]
        complaints = [record for record in caplog.records if "'colour' is no field" in record.getMessage()]
        assert len(complaints) == 1

    def test_a_redis_that_was_cut_off_is_heard_again(self, redis_url: str, namespace: str, make_book: MakeBook) -> None:
        """The subscription is made again, and what was missed is caught up with."""
        store = open_rules(redis_url, namespace=namespace)
        book = make_book(open_rules(redis_url, namespace=namespace))
        assert book.wait_for(put(store, EACH), PATIENCE)
        with redis.Redis.from_url(redis_url) as client:
            channel = f"{{tg:{namespace}:0}}:rules:changed"
            mine = [each for each in client.client_list("pubsub") if each["sub"] == "1"]
            assert client.pubsub_numsub(channel)[0][1] == 1
            for each in mine:
                if client.pubsub_numsub(channel)[0][1] == 0:
                    break
                client.client_kill_filter(_id=each["id"])
        assert book.wait_for(put(store, ACME), PATIENCE)


def test_a_forked_child_of_a_fleet_without_rules_waits_for_nothing(make_book: MakeBook) -> None:
    """That there are none is known too."""
    book = make_book(MemoryRules())
    assert ids(book) == []
    book.after_fork()
    assert book.rules() is not None


def test_each_new_version_is_told_with_what_changed(make_book: MakeBook) -> None:
    """For logs and dashboards."""
    store, events = MemoryRules(), []
    book = make_book(store, notify=events.append)
    assert ids(book) == []
    version = put(store, EACH)
    assert book.wait_for(version, PATIENCE)
    told: list[Event] = list(events)
    assert [(event.name, event.detail) for event in told] == [("rules_changed", f"version {version}: +each")]


def test_a_book_that_nobody_uses_ends_with_its_thread() -> None:
    """Books are no leak."""
    book = RuleBook(MemoryRules())
    book.rules(patience=PATIENCE)
    thread = book._thread
    assert thread is not None
    gone = weakref.ref(book)
    del book
    gc.collect()
    assert gone() is None
    thread.join(PATIENCE)
    assert not thread.is_alive()
