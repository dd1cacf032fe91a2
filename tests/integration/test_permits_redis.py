"""What only permits in Redis can get wrong: keys, numbers, memory. The contract suite holds what they decide."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
from redis import Redis
from redis.crc import key_slot

from taskguard.permits import (
    Ask,
    SlotAsk,
)
from taskguard.policies.rates import FixedWindow, Rate, SlidingLog, TokenBucket
from taskguard.stores.redis.asks import REMEMBERED
from taskguard.stores.redis.permits import RedisPermits
from tests.contracts.permits import EVERY_RATE, MicroClock, admitted, kind, take, wait_us
from tests.integration.journal import Deadline
from tests.integration.permitserver import ask_for_all, everything

STRANGE = ("plain", "with space", "{braces}", "}{", "a:b", "täg\n", "", "x" * 300)


def _usage(server: Redis, namespace: str) -> int:
    return sum(server.memory_usage(key, samples=0) or 0 for key in server.keys(f"*{namespace}*"))


def test_every_key_has_a_ttl_as_long_as_its_state_speaks(permits: RedisPermits, server: Redis, namespace: str) -> None:
    """Trap 16: nothing stays for ever, nothing goes before its time, and no TTL is rounded down to nothing."""
    everything(permits, "bank")
    found = {key.decode().partition(":permit:")[2]: server.pttl(key) for key in server.keys(f"*{namespace}*")}
    assert {name.partition(":")[0] for name in found} == {
        *("bucket", "fixed", "sliding", "log", "line", "slots", "circuit", "circuits", "adaptive", "adapted", "pauses"),
    }
    assert all(ttl > 0 for ttl in found.values()), found
    assert 6_000 < found["bucket:bank"] <= 10_001
    assert found["sliding:bank SlidingWindow"] > 10_000
    assert found["slots:bank"] > 3600_000
    assert found["circuit:bank"] > 86_000_000


@pytest.mark.parametrize("policy", [TokenBucket(1e6), TokenBucket(1000, burst=1), *EVERY_RATE], ids=kind)
def test_a_state_of_less_than_a_millisecond_is_kept_for_one(
    permits: RedisPermits, server: Redis, namespace: str, policy: Rate
) -> None:
    """Trap 16: a TTL of 0 would delete the key with each call, and the limit with it."""
    commands = [take(permits, policy, 0.01) for _ in range(20)]
    assert all(map(admitted, commands))
    assert all(server.pttl(key) != -1 for key in server.keys(f"*{namespace}*"))


def test_what_an_operator_sets_for_good_has_no_end(permits: RedisPermits, server: Redis, namespace: str) -> None:
    """Forced and paused without an end: until it is taken back. Taken back, it ends like the others."""
    permits.force("bank", "forced_open", until=None, who="ann", why="")
    permits.pause("queue", until=None, who="ann", why="")
    assert {server.pttl(key) for key in server.keys(f"*{namespace}*")} == {-1}
    permits.force("bank", "closed", until=None, who="ann", why="")
    permits.resume("queue")
    assert all(server.pttl(key) > 0 for key in server.keys(f"*{namespace}*"))


@pytest.mark.parametrize("name", STRANGE)
def test_all_keys_share_one_slot_whatever_the_names(
    permits: RedisPermits, server: Redis, namespace: str, name: str
) -> None:
    """Trap 18: a Cluster refuses a script whose keys are on two nodes; a name cannot break out of the hash tag."""
    everything(permits, name)
    slots = {key_slot(key) for key in server.keys(f"*{namespace}*")}
    assert slots == {key_slot(b"{tg:%b:0}" % namespace.encode())}


def test_names_do_not_run_into_each_other(permits: RedisPermits) -> None:
    """Trap 18: kind and name are told apart by position, so no name can be another's key."""
    policy = FixedWindow(1, per=3600)
    for name in STRANGE:
        assert admitted(take(permits, policy, name=name)), name
        assert not admitted(take(permits, policy, name=name)), name
    assert admitted(take(permits, policy, name="bank:"))
    assert admitted(take(permits, policy, name="bank"))


@pytest.mark.parametrize("rate", [700, 7_000, 30_000, 300_000, 1_000_000])
def test_the_long_run_rate_is_exact(timed: RedisPermits, micros: MicroClock, rate: int) -> None:
    """Trap 15: with numbers kept to 14 digits a limit of 7,000 a second admits 43 % more, one of 30,000 three times."""
    policy, cost, spent = TokenBucket(rate, burst=max(1, rate // 1000)), max(1, rate // 3000), 0
    while admitted(answer := take(timed, policy, cost)):
        pass
    began = micros.passed
    for _ in range(400):
        micros.advance(us=wait_us(answer))
        while admitted(answer := take(timed, policy, cost)):
            spent += cost
    assert spent == pytest.approx(rate * (micros.passed - began) / 1e6, rel=4e-3)


def test_a_state_keeps_every_digit(timed: RedisPermits, server: Redis, namespace: str) -> None:
    """Trap 15: a third of a second is written with 17 digits."""
    take(timed, TokenBucket(3))
    (key,) = server.keys(f"*{namespace}*bucket*")
    assert server.get(key) == b"14310400000000 333333.33333333331"


def test_a_wait_is_never_rounded_down_to_now(timed: RedisPermits, micros: MicroClock) -> None:
    """Trap 15: a reply of 0.4 would be cut to 0, which reads as admitted."""
    policy = TokenBucket(1_000_000, burst=1)
    assert admitted(take(timed, policy))
    assert wait_us(take(timed, policy)) == 1
    micros.advance(us=1)
    assert admitted(take(timed, policy))


def test_calls_in_the_same_microsecond_are_told_apart(timed: RedisPermits) -> None:
    """Trap 25: a log that keeps calls by their instant would keep one of them."""
    policy = SlidingLog(50, per=10)
    assert [admitted(take(timed, policy)) for _ in range(60)] == [True] * 50 + [False] * 10
    assert [admitted(timed.admit(Ask(slot=SlotAsk("p", 5, f"h{n}", 9)))) for n in range(7)] == [True] * 5 + [False] * 2


def test_a_server_whose_clock_is_set_back_is_not_closed_for_that_long(timed: RedisPermits, micros: MicroClock) -> None:
    """Trap 21: after a failover to a replica that is an hour behind, a period brings everything back."""
    for policy in EVERY_RATE:
        while admitted(take(timed, policy, name=kind(policy))):
            pass
    micros.advance(-3600)
    for policy in EVERY_RATE:
        assert wait_us(take(timed, policy, name=kind(policy))) <= 20_000_000, policy
    micros.advance(20)
    assert all(admitted(take(timed, policy, name=kind(policy))) for policy in EVERY_RATE)


def test_the_clocks_of_clients_decide_nothing(redis_url: str, namespace: str) -> None:
    """Trap 21: two processes whose clocks differ by a minute share the limit; only the server's clock counts."""
    program = (
        "import sys, time; real = time.time; skew = float(sys.argv[3]); time.time = lambda: real() + skew\n"
        "from taskguard.stores import open_permits\nfrom taskguard.permits import *\n"
        "from taskguard.policies.rates import *\n"
        "permits = open_permits(sys.argv[1], namespace=sys.argv[2], timeout=5)\n"
        "ask = Ask(rates=(RateAsk('bank', SlidingLog(100, per=3600)), RateAsk('bank', TokenBucket(100, per=3600))))\n"
        "print(sum(isinstance(permits.admit(ask), Permit) for _ in range(150)))"
    )
    counts = [
        int(subprocess.check_output([sys.executable, "-c", program, redis_url, namespace, skew]))
        for skew in ("0", "61", "-61")
    ]
    assert counts == [100, 0, 0]


def test_options_of_the_url_do_not_change_replies(redis_url: str, namespace: str) -> None:
    """Trap 22: decode_responses, or another protocol, in the URL."""
    permits = RedisPermits.from_url(f"{redis_url}?decode_responses=True&protocol=3", namespace=namespace, timeout=5)
    everything(permits, "bank")
    assert admitted(permits.admit(ask_for_all("shop", "h", TokenBucket(5))))
    assert permits.circuit("bank").calls == 1
    permits.close()


def test_refused_calls_leave_nothing_behind(permits: RedisPermits, server: Redis, namespace: str) -> None:
    """Trap 46: no key, no entry, no byte for a call that was denied."""
    policies = [*EVERY_RATE, SlidingLog(100, per=3600)]
    for policy in policies:
        while admitted(take(permits, policy)):
            pass
    permits.admit(Ask(slot=SlotAsk("bank", 1, "h", 60)))
    before = _usage(server, namespace)
    for number in range(300):
        for policy in policies[-1:]:
            assert not admitted(take(permits, policy))
        assert not admitted(permits.admit(Ask(slot=SlotAsk("bank", 1, f"other {number}", 60))))
    assert _usage(server, namespace) <= before


def test_a_million_limits_leave_when_they_say_nothing(permits: RedisPermits, server: Redis, namespace: str) -> None:
    """Trap 44: memory is bounded by what is live, in the server and here, and no live limit is dropped for it."""
    live = TokenBucket(1, per=3600)
    assert admitted(take(permits, live, name="live"))
    for number in range(REMEMBERED + 500):
        assert admitted(take(permits, TokenBucket(1000, burst=2), name=f"client {number}"))
    assert len(permits._buckets) <= REMEMBERED
    assert len(permits._shapes._known) <= REMEMBERED
    assert not admitted(take(permits, live, name="live"))
    assert Deadline.after(10).reached(lambda: len(server.keys(f"*{namespace}*client*")) == 0)


def test_no_limit_has_a_thread(permits: RedisPermits) -> None:
    """Trap 45: neither a limiter nor a key has a timer or a leaker of its own."""
    before = threading.active_count()
    for number in range(200):
        everything(permits, f"bank {number % 3}")
    assert threading.active_count() == before
