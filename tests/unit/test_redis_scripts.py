"""What only the Redis store promises: its keys, its connections, its errors. The contract suite holds the rest."""

from __future__ import annotations

import ctypes
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import pytest
from redis import Redis

from taskguard.custody import Claimed, Hold, Unique
from taskguard.envelope import Envelope
from taskguard.errors import ConfigurationError, StoreError, StoreUnavailable
from taskguard.record import Attempt, Failure, Reason, State
from taskguard.stores.redis import RedisStore
from taskguard.stores.redis.connection import Connections
from taskguard.stores.redis.scripts import Script
from tests.clocks import ManualClock

VERBS = sorted(
    Path(file.name).stem
    for file in (resources.files("taskguard.stores.redis") / "lua").iterdir()
    if not file.name.startswith("_")
)


def order(task_id: str = "7f1c8a52-5f0e-4a3c-9f0a-0d6a2c4b9e11", key: str = "order-1") -> Envelope:
    return Envelope(
        task="shop.charge",
        task_id=task_id,
        key=key,
        body=b'[[1],{},{"chain":null}]',
        queue="orders",
        fingerprint="ab" * 10,
    )


def claimed(store: RedisStore, envelope: Envelope) -> int:
    answer = store.claim(envelope, holder="worker@host/1", lease=15, max_crashes=3)
    assert isinstance(answer, Claimed)
    return answer.token


@pytest.fixture
def store(redis_url: str, namespace: str, clock: ManualClock) -> Iterator[RedisStore]:
    """A store that goes by the manual clock."""
    store = RedisStore.from_url(redis_url, namespace=namespace, clock=clock)
    yield store
    store.close()


@pytest.fixture
def server(redis_url: str) -> Iterator[Redis]:
    """The server behind the store, as an operator sees it."""
    with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def connections(redis_url: str) -> Iterator[Connections]:
    """Connections that wait for two seconds."""
    connections = Connections(redis_url, 2.0)
    yield connections
    connections.close()


@pytest.fixture
def keys(server: Redis, namespace: str) -> Callable[[], set[str]]:
    """The store's keys as they are now, without their hash tag."""

    def now() -> set[str]:
        found = [key.decode() for key in server.scan_iter(match=f"*{namespace}*", count=1000)]
        assert all(key.startswith(f"{{tg:{namespace}:0}}:") for key in found), found
        return {key.partition("}:")[2] for key in found} - {"rung"}  # which lasts for a quarter of a second

    return now


def test_every_key_of_a_partition_has_its_hash_tag(store: RedisStore, keys: Callable[[], set[str]]) -> None:
    """A Cluster keeps a record, its copies, its waiters, its names and all indexes on one node."""
    first, second = order("t1"), order("t2")
    token = claimed(store, first)
    store.schedule(second, due_at=9e9, waits_on=first.id, unique=Unique("charge:1", 60))
    store.revoke(["t3"], retention=60)
    store.bury_message(order("t4"), failure=Failure(reason=Reason.UNKNOWN_TASK))
    assert keys() == {
        *(f"record:{id}" for id in (first.id, second.copy_id, order("t4").copy_id)),
        *(f"wire:{id}" for id in (first.id, second.copy_id, order("t4").copy_id)),
        *("state:running", "state:pending", "state:dead", "due"),
        *(f"waiters:{first.id}", "unique:charge:1", "revoked:t3"),
    }
    store.complete(first.id, token, result=b"1", retention=60)
    assert {f"result:{first.id}", "state:done", "expiry"} <= keys()
    assert not {f"wire:{first.id}", f"waiters:{first.id}", "state:running"} & keys()


def test_a_run_costs_two_keys_and_six_hundred_bytes_beside_its_message(
    store: RedisStore, server: Redis, keys: Callable[[], set[str]], namespace: str
) -> None:
    """Long texts rest outside the hash, so that it stays compact; the indexes are shared."""
    claimed(store, order())
    own = [f"{{tg:{namespace}:0}}:{key}" for key in keys() if order().id in key]
    assert len(own) == 2
    assert sum(server.memory_usage(key) or 0 for key in own) - len(order().to_wire()) <= 600
    assert server.object("encoding", f"{{tg:{namespace}:0}}:record:{order().id}") == b"listpack"


def test_nothing_is_left_when_every_record_is_over(
    store: RedisStore, clock: ManualClock, keys: Callable[[], set[str]]
) -> None:
    """Records leave every index when they go; nothing grows without bound."""
    done, failed, unique = order("t1", "a"), order("t2", "b"), Unique("n", 60)
    store.complete(done.id, claimed(store, done), result=b"1", retention=60)
    store.bury(failed.id, claimed(store, failed), failure=Failure(reason=Reason.POISON), attempt=None)
    claimed(store, order("t3", "b"))  # displaces the dead letter
    store.schedule(order("t4", "b"), due_at=clock(), waits_on=failed.id, unique=unique)
    assert store.remove(store.take_due(limit=9, lease=30)) == 1
    assert store.purge(failed.copy_id, retention=60)
    assert store.release_unique("n", "t4")
    clock.advance(15)
    assert store.remove(store.take_due(limit=9, lease=30)) == 1
    clock.advance(8 * 86400)
    assert store.expire(limit=9) == 2
    assert keys() == set()


def test_a_record_deleted_by_hand_is_not_handed_out(store: RedisStore, clock: ManualClock, server: Redis) -> None:
    """An index entry without a record is dropped, not leased for ever."""
    store.schedule(order(), due_at=clock())
    server.delete(*server.keys(f"*:record:{order().copy_id}"))
    assert store.take_due(limit=9, lease=30) == []
    assert store.due_in() is None


def test_scan_reads_on_where_its_reader_moves_what_it_read(store: RedisStore, clock: ManualClock) -> None:
    """Pages are kept by position, not by rank: requeueing while reading misses nothing, not even within one instant."""
    letters = [order(f"t{n}") for n in range(250)]
    for n, letter in enumerate(letters):
        store.bury_message(letter, failure=Failure(reason=Reason.EXPIRED))
        if n == 220:
            clock.advance(1)
    seen = []
    for record in store.scan(State.DEAD):
        seen.append(record.task_id)
        assert store.requeue(record.id, letters[int(record.task_id[1:])], due_at=clock())
    assert sorted(seen) == sorted(letter.task_id for letter in letters)
    assert store.depths()[State.DEAD].count == 0


@pytest.mark.parametrize("verb", VERBS)
def test_a_script_says_what_it_takes_and_returns(verb: str) -> None:
    """The header is the interface: purpose, arguments with units, reply. A script fits on a page."""
    text = (resources.files("taskguard.stores.redis") / "lua" / f"{verb}.lua").read_text()
    assert text.startswith("-- ")
    assert "-- ARGV: now ms" in text or "-- ARGV: now us" in text
    assert "-- RETURNS" in text
    assert len(text.splitlines()) <= 60


def test_a_script_the_server_does_not_know_is_loaded(connections: Connections, namespace: str) -> None:
    """After SCRIPT FLUSH, a restart or a failover the call goes on."""
    source = f"return 'answer'  -- {namespace}".encode()
    script = Script(source, hashlib.sha1(source).hexdigest().encode())
    assert connections.run(script, b"key") == b"answer"
    assert connections.run(script, b"key") == b"answer"


def test_a_killed_connection_is_opened_again(connections: Connections, server: Redis) -> None:
    """An idle connection that the server closed costs no error."""
    first = connections.call(b"CLIENT", b"ID")
    server.client_kill_filter(_id=str(first))
    assert connections.call(b"CLIENT", b"ID") != first


def test_threads_get_their_own_replies(connections: Connections) -> None:
    """No two calls share a connection at one time."""
    words = [b"%d" % n for n in range(400)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda word: connections.call(b"ECHO", word), words)) == words


def test_a_forked_child_leaves_its_parents_connections_alone(connections: Connections) -> None:
    """Prefork workers fork with open stores; a shared socket would mix up replies."""
    mine = connections.call(b"CLIENT", b"ID")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, b"%d" % connections.call(b"CLIENT", b"ID"))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        theirs = int(pipe.read() or 0)
    assert theirs not in (0, mine)
    assert connections.call(b"CLIENT", b"ID") == mine


def test_a_reply_that_came_too_late_is_not_the_next_calls(redis_url: str, namespace: str) -> None:
    """A connection that was given up in the middle of a call is never used again."""
    connections = Connections(redis_url, 0.2)
    with pytest.raises(StoreUnavailable, match=r"within 0\.2 s"):
        connections.call(b"BLPOP", namespace.encode(), b"0.5")
    assert connections.call(b"ECHO", b"mine") == b"mine"
    connections.close()


def test_greenlets_wait_beside_each_other(redis_url: str, namespace: str) -> None:
    """Under gevent's monkey patching a call blocks its greenlet, not the process."""
    program = f"""
from gevent import monkey; monkey.patch_all()
import gevent, time
from taskguard.stores.redis.connection import Connections
connections = Connections({redis_url!r}, 5.0)
before = time.monotonic()
jobs = [gevent.spawn(connections.call, b"BLPOP", b"{namespace}", b"0.5") for _ in range(20)]
gevent.joinall(jobs, raise_error=True)
assert time.monotonic() - before < 5, time.monotonic() - before
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@contextmanager
def impostor(answer: Callable[[bytes], bytes]) -> Iterator[str]:
    """The URL of a server that answers every command with ``answer(command)``."""

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                while command := peer.recv(65536):
                    peer.sendall(answer(command))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


@pytest.mark.parametrize(
    ("line", "error", "words"),
    [
        ("LOADING Redis is loading the dataset in memory", StoreUnavailable, "wait until it is done"),
        ("READONLY You can't write against a read only replica.", StoreUnavailable, "use the primary's URL"),
        ("OOM command not allowed when used memory > 'maxmemory'.", StoreUnavailable, "cannot serve now"),
        ("NOPERM User alice has no permissions to run the 'evalsha' command", StoreError, "rights"),
        ("ERR unknown command 'EVALSHA'", StoreError, "failed"),
    ],
)
def test_a_servers_refusal_becomes_our_error(line: str, error: type[StoreError], words: str) -> None:
    """What waiting can mend is StoreUnavailable, all else StoreError; both are one line with the way out."""
    with impostor(lambda _: f"-{line}\r\n".encode()) as url:
        store = RedisStore.from_url(url, namespace="n", timeout=5.0)
        with pytest.raises(error, match=words) as caught:
            store.depths()
        store.close()
    assert type(caught.value) is error
    assert url in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_ping_refuses_a_server_that_is_too_old() -> None:
    """It says what was found and what is needed."""

    def answer(command: bytes) -> bytes:
        text = b"# Server\r\nredis_version:6.0.16\r\n"
        return b"$%d\r\n%b\r\n" % (len(text), text) if b"INFO\r\n$6\r\nserver" in command else b"+OK\r\n"

    with impostor(answer) as url:
        store = RedisStore.from_url(url, namespace="n", timeout=5.0)
        with pytest.raises(StoreError, match=r"Redis 6\.0\.16; taskguard needs 6\.2 or newer"):
            store.ping()
        store.close()


def test_ping_returns_where_the_server_will_do(store: RedisStore) -> None:
    """Redis 7 or newer is enough."""
    store.ping()


def test_a_server_that_never_answers_costs_no_more_than_the_timeout() -> None:
    """A black hole must not hold a worker."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = RedisStore.from_url(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", namespace="n", timeout=0.2)
        before = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.2 s"):
            store.claim(order(), holder="h", lease=15, max_crashes=3)
        assert time.monotonic() - before < 2


def test_a_server_that_is_not_there_is_unavailable() -> None:
    """Connection refused is said with the URL and the way out, and without user and password."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    store = RedisStore.from_url(f"redis://alice:s3cret@127.0.0.1:{port}/0?password=s3cret", namespace="n")
    with pytest.raises(StoreUnavailable, match="check that Redis is running") as caught:
        store.ping()
    assert f"redis://127.0.0.1:{port}/0 " in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_wrong_password_is_not_worth_waiting_for(redis_url: str) -> None:
    """Refused credentials are a StoreError, and are not shown."""
    store = RedisStore.from_url(redis_url.replace("redis://", "redis://nobody:s3cret@"), namespace="n")
    with pytest.raises(StoreError, match="check user, password") as caught:
        store.ping()
    assert type(caught.value) is StoreError
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3cret/word@host:6379/0",
        "redis://:s3cret#word@host:6379/0",
        "redis://:s3cret@host:port/0",
        "redis://:s3cret@host:6379/0?unknown=option",
        "redis+sentinel://:s3cret@host:26379/0",
    ],
)
def test_a_url_that_cannot_be_read_is_refused_without_its_password(url: str) -> None:
    """Refused when the store is made, with the form that would do."""
    with pytest.raises(ConfigurationError, match="write redis://user:password@host:6379/0") as caught:
        RedisStore.from_url(url, namespace="n")
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("state", ["dead", "published"])
def test_a_record_as_the_first_versions_wrote_it_is_read(
    store: RedisStore, server: Redis, clock: ManualClock, namespace: str, state: str
) -> None:
    """With the copy's name in full and a sequence of 0: a letter is displaced, a delivery before its claim crashes."""
    old, at = order("t1", "a"), f"{clock() * 1000:.0f}"
    base = f"{{tg:{namespace}:0}}"
    record = {"st": state, "task": old.task, "tid": "t1", "key": "a", "copy": old.copy_id, "q": old.queue}
    record |= {"fp": old.fingerprint, "seq": "0", "tok": at, "new": at, "at": at}
    server.hset(f"{base}:record:{old.id}", mapping=record)
    server.set(f"{base}:wire:{old.id}", old.to_wire())
    server.zadd(f"{base}:state:{state}", {old.id: at})
    found = store.find(old.id)
    assert found is not None
    assert found.primary
    if state == "dead":
        claimed(store, order("t2", "a"))
        assert [letter.id for letter in store.scan(State.DEAD)] == [old.copy_id]
    else:
        attempt = Attempt(at=clock(), worker="w", outcome="crash", error="")
        assert store.crash(Hold(old.id, "w/1"), old, attempt=attempt)
        after = store.find(old.id)
        assert after is not None
        assert (after.crashes, after.primary, after.sequence) == (1, True, 0)


def test_a_process_that_was_forked_in_c_has_connections_of_its_own(store: RedisStore) -> None:
    """uWSGI forks so, and runs no hooks of Python's: both processes would read the answers on one connection."""
    mine = store._connections.call(b"CLIENT", b"ID")
    reading, writing = os.pipe()
    child = ctypes.PyDLL(None).fork()
    if child == 0:
        os.write(writing, b"%d" % store._connections.call(b"CLIENT", b"ID"))
        os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(reading, 20)) != mine
    assert store._connections.call(b"CLIENT", b"ID") == mine
    os.close(reading)
    os.close(writing)
