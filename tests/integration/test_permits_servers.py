"""Permits on a server that restarts, freezes, forgets, evicts or refuses; and watchers that live through it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis

from taskguard.downstream.outage import Shielded
from taskguard.errors import StoreError, StoreUnavailable
from taskguard.permits import (
    Ask,
    CircuitView,
    Outcomes,
    RateAsk,
)
from taskguard.policies.rates import FixedWindow, SlidingLog, SlidingWindow, TokenBucket
from taskguard.stores.redis.permits import RedisPermits
from tests.contracts.permits import admitted, take
from tests.integration.journal import Deadline
from tests.integration.permitserver import BREAKER, ask_for_all, everything
from tests.integration.servers import PrivateRedis
from tests.unit.test_redis_scripts import impostor


@contextmanager
def watching(permits: RedisPermits) -> Iterator[list[CircuitView]]:
    """What a watcher was told so far. It is stopped, promptly, with the block."""
    told: list[CircuitView] = []
    ended = threading.Event()
    thread = threading.Thread(target=permits.watch_circuits, args=(told.append,), kwargs={"stop": ended.is_set})
    thread.start()
    yield told
    ended.set()
    thread.join(2)
    assert not thread.is_alive()


def _subscribers(server: Redis, permits: RedisPermits) -> int:
    return int(server.pubsub_numsub(permits.partition + b":permit:changes")[0][1])


def _answers(shielded: Shielded, ask: Ask) -> bool:
    try:
        return admitted(shielded.admit(ask))
    except StoreUnavailable:
        return False


def test_a_script_the_server_lost_is_loaded_again_at_every_call(own: PrivateRedis) -> None:
    """Trap 19: SCRIPT FLUSH, a restart, a failover, a new node: at the first call or the n-th, nobody sees an error."""
    permits = RedisPermits.from_url(own.url, namespace="n", timeout=5)
    with Redis.from_url(own.url) as server:
        for number in range(5):
            server.script_flush()
            everything(permits, f"bank {number}")
            server.script_flush()
            assert admitted(take(permits, TokenBucket(5), name=f"alone {number}"))
    own.kill()
    own.start()
    assert admitted(take(permits, TokenBucket(5)))
    permits.close()


def test_an_emptied_server_admits_as_a_new_one(own: PrivateRedis) -> None:
    """Traps 23 and 24: what eviction or a failover lost fails open, and never raises."""
    permits = RedisPermits.from_url(own.url, namespace="n", timeout=5)
    once = ask_for_all("bank", "h", TokenBucket(1, per=3600))
    assert admitted(permits.admit(once))
    assert not admitted(permits.admit(once))
    permits.report("bank", BREAKER, Outcomes(0, 5, 5, 0))
    with Redis.from_url(own.url) as server:
        server.flushall()
    assert permits.circuits() == []
    assert admitted(permits.admit(once))
    permits.close()


def test_eviction_drops_permits_and_answers_go_on(tmp_path: Path) -> None:
    """Trap 23: a server short of memory may evict every key that we write, because each has a TTL."""
    options = ("--appendonly", "no", "--maxmemory", "3mb", "--maxmemory-policy", "volatile-lru")
    with PrivateRedis(tmp_path / "redis", *options) as own, Redis.from_url(own.url) as server:
        permits = RedisPermits.from_url(own.url, namespace="n", timeout=5)
        policy = SlidingLog(100, per=3600)
        for number in range(12_000):
            assert admitted(take(permits, policy, name=f"client {number}"))
        assert server.info("stats")["evicted_keys"] > 0
        permits.close()


def test_a_replica_is_unavailable_and_not_an_answer(own: PrivateRedis) -> None:
    """Trap 20: READONLY after a failover; the primary's return is noticed."""
    permits = RedisPermits.from_url(own.url, namespace="n", timeout=5)
    assert admitted(take(permits, TokenBucket(5)))
    with Redis.from_url(own.url) as server:
        server.execute_command("REPLICAOF", "127.0.0.1", "1")
        server.config_set("replica-serve-stale-data", "yes")
        with pytest.raises(StoreUnavailable, match="is a replica"):
            take(permits, TokenBucket(5))
        server.execute_command("REPLICAOF", "NO", "ONE")
    assert admitted(take(permits, TokenBucket(5)))
    permits.close()


@pytest.mark.parametrize("line", ["BUSY Redis is busy running a script.", "LOADING Redis is loading the dataset"])
def test_a_server_that_cannot_serve_now_is_unavailable(line: str) -> None:
    """Trap 20: somebody else's script runs, or the data is being loaded."""
    with impostor(lambda _: f"-{line}\r\n".encode()) as url:
        permits = RedisPermits.from_url(url, namespace="n", timeout=5)
        with pytest.raises(StoreUnavailable):
            take(permits, TokenBucket(5))
        permits.close()


@pytest.mark.parametrize("line", ["MOVED 866 127.0.0.1:7001", "ASK 866 127.0.0.1:7001"])
def test_a_cluster_that_moves_keys_is_an_error_of_the_store(line: str) -> None:
    """Trap 20: no other node is asked behind the caller's back."""
    with impostor(lambda _: f"-{line}\r\n".encode()) as url:
        permits = RedisPermits.from_url(url, namespace="n", timeout=5)
        with pytest.raises(StoreError):
            take(permits, TokenBucket(5))
        permits.close()


def test_a_call_is_one_command(own: PrivateRedis) -> None:
    """Trap 17: nothing can crash between two commands, and no call waits for a second round trip."""
    permits = RedisPermits.from_url(own.url, namespace="n", timeout=5)
    everything(permits, "bank")
    policy = TokenBucket(1000)
    asks = [
        ask_for_all("bank", "h1", policy),
        ask_for_all("bank", "h2", policy, release="h1"),
        Ask(rates=(RateAsk("bank", policy), RateAsk("day", FixedWindow(5, per=86400)))),
        Ask(rates=(RateAsk("bank", policy, 5000.0),), book=True),
        Ask(rates=(RateAsk("bank", SlidingWindow(1, per=86400)),), book=True, booked=True),
    ]
    with Redis.from_url(own.url) as server:
        before = server.info("commandstats")["cmdstat_evalsha"]["calls"]
        reads = server.info("stats")["total_reads_processed"]
        for _ in range(20):
            for ask in asks:
                permits.admit(ask)
        assert server.info("commandstats")["cmdstat_evalsha"]["calls"] - before == 100
        assert server.info("stats")["total_reads_processed"] - reads <= 100 + 3
    permits.close()


def test_a_trip_is_pushed(redis_url: str, namespace: str, permits: RedisPermits) -> None:
    """Every change reaches the watcher, in order, with what an operator said; counts alone are no change."""
    other = RedisPermits.from_url(redis_url, namespace=namespace, timeout=5)
    with watching(permits) as told, Redis.from_url(redis_url) as server:
        assert Deadline.after(10).reached(lambda: _subscribers(server, permits) == 1)
        other.report("bank {1}", BREAKER, Outcomes(0, 1, 0, 0))
        other.report("bank {1}", BREAKER, Outcomes(0, 5, 5, 0))
        other.force("bank {1}", "forced_closed", until=None, who='änn/"\\', why="two\nlines")
        assert Deadline.after(10).reached(lambda: len(told) >= 2)
    assert [(view.name, view.state, view.generation) for view in told] == [
        ("bank {1}", "open", 1),
        ("bank {1}", "forced_closed", 2),
    ]
    assert (told[1].who, told[1].why) == ('änn/"\\', "two\nlines")
    assert told[0].until is not None
    other.close()


def test_a_watcher_is_told_what_changed_while_it_was_cut_off(own: PrivateRedis) -> None:
    """The connection is made again and everything read: a trip, a circuit that the server forgot."""
    permits = RedisPermits.from_url(own.url, namespace="n", timeout=1)
    permits.report("lost", BREAKER, Outcomes(0, 5, 5, 0))
    with watching(permits) as told:
        assert Deadline.after(10).reached(lambda: len(told) == 1)
        own.kill()
        own.start()
        permits.report("bank", BREAKER, Outcomes(0, 5, 5, 0))
        assert Deadline.after(15).reached(lambda: len(told) >= 3), told
    assert {(view.name, view.state) for view in told[1:]} == {("bank", "open"), ("lost", "closed")}
    permits.close()


def test_a_watcher_whose_connection_is_killed_misses_nothing(permits: RedisPermits, server: Redis) -> None:
    """A change is told once, however often the subscription was lost."""
    with watching(permits) as told:
        for number in range(4):
            assert Deadline.after(10).reached(lambda: _subscribers(server, permits) == 1)
            server.client_kill_filter(_type="pubsub", skipme=False)
            permits.force("bank", "forced_open" if number % 2 else "closed", until=None, who="ann", why=str(number))
        assert Deadline.after(10).reached(lambda: bool(told) and told[-1].generation == 4), told
    assert [view.generation for view in told] == sorted({view.generation for view in told})


def test_a_frozen_server_costs_one_timeout(own: PrivateRedis) -> None:
    """Trap 41: it takes connections and answers nobody: one call waits, the others are told at once; it comes back."""
    shielded = Shielded(RedisPermits.from_url(own.url, namespace="n", timeout=0.1))
    ask = Ask(rates=(RateAsk("bank", TokenBucket(1e6)),))
    assert admitted(shielded.admit(ask))
    with own.frozen():
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.1 s"):
            shielded.admit(ask)
        assert time.monotonic() - began < 0.5
        began = time.monotonic()
        for _ in range(500):
            with pytest.raises(StoreUnavailable):
                shielded.admit(ask)
        assert time.monotonic() - began < 2
    assert Deadline.after(10).reached(lambda: _answers(shielded, ask))
    shielded.close()


def test_a_server_that_is_gone_is_refused_at_once_and_noticed_when_it_is_back(
    own: PrivateRedis, caplog: pytest.LogCaptureFixture
) -> None:
    """Traps 41 to 43: one line in the log when it goes, one when it is back."""
    shielded = Shielded(RedisPermits.from_url(own.url, namespace="n", timeout=0.1))
    ask = Ask(rates=(RateAsk("bank", TokenBucket(1e6)),))
    assert admitted(shielded.admit(ask))
    own.kill()
    for _ in range(200):
        with pytest.raises(StoreUnavailable):
            shielded.admit(ask)
    own.start()
    assert Deadline.after(10).reached(lambda: _answers(shielded, ask))
    assert len([record for record in caplog.records if record.name == "taskguard.downstream.outage"]) == 2
    shielded.close()


def test_a_wrong_password_is_said_within_the_timeout(redis_url: str) -> None:
    """Trap 41: refused rights are an error of the store, at once, without the password."""
    permits = RedisPermits.from_url(redis_url.replace("redis://", "redis://nobody:s3cret@"), namespace="n")
    with pytest.raises(StoreError, match="check user, password") as caught:
        take(permits, TokenBucket(5))
    assert "s3cret" not in str(caught.value)
