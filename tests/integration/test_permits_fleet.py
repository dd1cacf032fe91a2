"""Permits in Redis asked by many at once: threads, forks, greenlets, leases, both scripts of a bucket."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from taskguard.downstream.leases import Leased, lend_by_asking
from taskguard.permits import (
    Ask,
    CircuitAsk,
    Outcomes,
    Permit,
    ProbeOutcome,
    RateAsk,
    Refusal,
    SlotAsk,
)
from taskguard.policies.circuit import CircuitBreaker
from taskguard.policies.rates import SlidingLog, TokenBucket
from taskguard.stores.redis.permits import RedisPermits
from tests.contracts.permits import MicroClock, admitted, take


def test_threads_and_processes_admit_not_one_too_many(redis_url: str, namespace: str) -> None:
    """Traps 28 and 30: 4 processes of 8 threads, forked after the first use, on rate, places and log at once."""
    permits = RedisPermits.from_url(redis_url, namespace=namespace, timeout=10)
    rates = (RateAsk("bank", TokenBucket(150, per=3600)), RateAsk("log", SlidingLog(140, per=3600)))
    assert admitted(permits.admit(Ask(rates=rates)))
    reader, writer = os.pipe()
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            try:
                with ThreadPoolExecutor(8) as pool:
                    asks = [Ask(rates=rates, slot=SlotAsk("p", 1000, f"{number}.{n}", 60)) for n in range(80)]
                    os.write(writer, b"%d\n" % sum(map(admitted, pool.map(permits.admit, asks))))
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        counts = list(map(int, pipe))
    assert len(counts) == 4
    assert 1 + sum(counts) == 140
    permits.close()


def test_greenlets_ask_beside_each_other(redis_url: str, namespace: str) -> None:
    """Trap 30: under gevent's monkey patching the replies stay apart, and the limit holds."""
    program = f"""
from gevent import monkey; monkey.patch_all()
import gevent
from taskguard.stores import open_permits
from taskguard.permits import Ask, Permit, RateAsk
from taskguard.policies.rates import TokenBucket
permits = open_permits({redis_url!r}, namespace={namespace!r}, timeout=5)
ask = Ask(rates=(RateAsk("bank", TokenBucket(20, per=3600)),))
jobs = [gevent.spawn(permits.admit, ask) for _ in range(60)]
gevent.joinall(jobs, raise_error=True)
assert sum(isinstance(job.value, Permit) for job in jobs) == 20
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_two_scripts_of_a_bucket_share_its_state(timed: RedisPermits, micros: MicroClock) -> None:
    """The short way and the general one decide alike, call by call, and go by the same line."""
    draw, policy = random.Random(7), TokenBucket(5, burst=4)
    twin = RedisPermits(timed.connections, namespace=timed.partition.decode(), clock=micros)
    twin._take_permit = lambda rate: None  # type: ignore[method-assign]
    for _ in range(400):
        cost, booked = draw.choice((1, 1, 2, 0.5)), draw.random() < 0.2
        book = draw.random() < 0.1
        pair = [take(each, policy, cost, booked=booked, book=book) for each in (timed, twin)]
        assert pair[0] == pair[1]
        micros.advance(us=draw.randrange(400_000))


def test_a_part_is_lent_as_by_asking(redis_url: str, namespace: str, micros: MicroClock) -> None:
    """Trap 31: lending in one step takes what two questions would take, and no more."""
    draw, policy = random.Random(11), TokenBucket(70, burst=30)
    one, two = (RedisPermits.from_url(redis_url, namespace=f"{namespace}{n}", timeout=5, clock=micros) for n in "12")
    for _ in range(300):
        most = draw.randint(1, 40)
        lent, asked = one.lend("bank", policy, most=most), lend_by_asking(two.admit, "bank", policy, most=min(most, 30))
        if most <= 30:
            assert lent.permits == asked.permits
        if lent.permits < most:
            assert 0 < lent.retry_after <= policy.interval + 1e-6
        assert one.lend("bank", policy, most=0).permits == 0
        if most <= 30:
            micros.advance(us=draw.randrange(300_000))
        else:
            micros.advance(1)
    one.close()
    two.close()


def test_nobody_lends_before_those_in_line(timed: RedisPermits, micros: MicroClock) -> None:
    """A lease stands behind all that have booked."""
    policy = TokenBucket(10, burst=1)
    assert admitted(take(timed, policy))
    booked = [take(timed, policy, book=True) for _ in range(3)]
    assert all(isinstance(answer, Refusal) and answer.slot_in for answer in booked)
    micros.advance(0.15)
    assert timed.lend("bank", policy, most=5).permits == 0
    micros.advance(0.2)
    assert timed.lend("bank", policy, most=5).permits == 1


def test_leases_over_redis_admit_what_is_permitted(redis_url: str, namespace: str) -> None:
    """Trap 31: threads at full speed on a real server stay within ``burst + rate * w``, with few round trips."""
    permits = RedisPermits.from_url(redis_url, namespace=namespace, timeout=5)
    leased = Leased(permits, "bank", TokenBucket(5000, burst=1000))
    asked = 0
    lend = leased._lend

    def counted(name: str, policy: TokenBucket, *, most: int) -> object:
        nonlocal asked
        asked += 1
        return lend(name, policy, most=most)

    leased._lend = counted  # type: ignore[assignment]
    began = time.monotonic()

    def spend() -> int:
        spent = 0
        while time.monotonic() - began < 0.6:
            spent += leased.acquire() == 0.0
        return spent

    with ThreadPoolExecutor(4) as pool:
        spent = sum(pool.map(lambda _: spend(), range(4)))
    lasted = time.monotonic() - began
    assert spent <= 1000 + 5000 * lasted
    assert spent >= 1000
    assert asked <= spent / 5
    permits.close()


def test_probes_are_one_in_the_fleet(timed: RedisPermits, micros: MicroClock) -> None:
    """Of many who ask at once, one probes; when its process dies, the next does after the lease."""
    policy = CircuitBreaker(minimum_calls=2, wait_in_open=1, probe_lease=5)
    timed.report("bank", policy, Outcomes(0, 5, 5, 0))
    micros.advance(1)
    asks = [Ask(circuit=CircuitAsk("bank", policy, f"h{n}")) for n in range(64)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(timed.admit, asks))
    probes = [answer for answer in answers if isinstance(answer, Permit)]
    assert len(probes) == 1
    assert probes[0].probe
    micros.advance(5)
    again = timed.admit(Ask(circuit=CircuitAsk("bank", policy, "next")))
    assert isinstance(again, Permit)
    assert again.circuit is not None
    view = timed.report("bank", policy, Outcomes(again.circuit.generation), ProbeOutcome("next", "success"))
    assert view.state == "closed"
