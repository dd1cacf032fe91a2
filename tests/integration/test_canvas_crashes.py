"""Workflows while processes die: the results, the states and the bodies that ran are those of plain Celery unharmed.

Each workflow is put through plain tasks first. Then a crash is armed and the same workflow is put through reliable
tasks: every task's child dies once at the crash point, so that each of its messages comes again, or the whole worker
does. The points are those behind the completion, where nothing may be repeated. ``PROOF_SEED`` repeats a draw,
``PROOF_ALL=1`` plays every workflow with every crash.
"""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import pytest

from tests import services
from tests.integration.crashpoints import ENABLED, Action, Armoury, Point
from tests.integration.journal import Deadline, Journal
from tests.integration.workflows import (
    WORKFLOWS,
    Workflow,
    a_map,
    a_replacement_by_a_group,
    a_starmap,
    assert_same,
    bodies,
    ended,
    some_chunks,
    wait_over,
)
from tests.integration.workshop import PATIENCE, Workshop
from tests.proof.draw import plays_all, seed

BROKERS = ("redis", "rabbitmq")
UNHARMED = "unharmed"
"""The workshop, on Redis, in which nobody dies and the plain tasks run."""
ALL = plays_all()
HASTY = '{"visibility_timeout": 5, "unacked_restore_interval": 0.5, "unacked_restore_throttle": 1}'
SENT = Point("Producer.publish", "after")
POINTS = (
    Point("MessageStore.complete", "after"),
    Point("MessageStore.bury", "after"),
    Point("MessageStore.rest", "after"),
    Point("MessageStore.discard", "after"),
    SENT,
    Point("Producer.publish", "before"),
    Point("Backend.store_result", "before"),
    Point("Backend.store_result", "after"),
    Point("Backend.on_chord_part_return", "before"),
    Point("Backend.on_chord_part_return", "after"),
)


class Crash(NamedTuple):
    """Where a process dies, and how much with it."""

    point: Point
    action: Action

    def __str__(self) -> str:
        return f"{self.action} {self.point}"


PLAIN = (a_map, a_starmap, some_chunks, a_replacement_by_a_group)
"""In these, tasks of Celery's own run the bodies or collect the results, and nobody has custody of them."""

CHILD = [Crash(point, "die each") for point in POINTS]
STORED = [Crash(Point("Backend.store_result", side), "fall") for side in ("before", "after")]
WORKER = [
    *STORED,
    Crash(Point("MessageStore.complete", "after"), "fall"),
    Crash(SENT, "fall"),
]


def draw() -> list[Any]:
    """Each workflow with the crashes it meets: every task's child dies at every point, and a worker dies at one."""
    drawn = []
    for number, workflow in enumerate(each for each in WORKFLOWS if each not in PLAIN):
        chance = random.Random(seed() * 1000 + number)
        single = [*CHILD, *WORKER] if ALL else [chance.choice(STORED)]
        # What a body sends itself, as `replace` does, is sent again by a body that is cut and runs again.
        replaces = "replacement" in workflow.__name__
        all_points = [crash for crash in CHILD if not (replaces and crash.point.operation == SENT.operation)]
        for crashes in (all_points, *([each] for each in single)):
            word = "every child at every point" if crashes is all_points else str(crashes[0])
            for broker in BROKERS if ALL else [chance.choice(BROKERS)]:
                marks = [pytest.mark.xdist_group(f"canvas-crashes-{broker}")]
                name = f"{broker}-{workflow.__name__}-{word}"
                drawn.append(pytest.param(broker, workflow, crashes, id=name, marks=marks))
    return sorted(drawn, key=lambda param: str(param.values[0]))


@pytest.fixture(scope="module")
def workshops(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Workshop]]:
    """The workshops that are open, by broker: two workers each, which are started again when they die."""
    with ExitStack() as stack:
        yield Opened(stack, tmp_path_factory)


class Opened(dict[str, Workshop]):
    """Opens a workshop when it is asked for."""

    def __init__(self, stack: ExitStack, directories: pytest.TempPathFactory) -> None:
        self._stack, self._directories = stack, directories

    def __missing__(self, broker: str) -> Workshop:
        namespace, redis = f"t{uuid.uuid4().hex[:16]}", services.require("redis")
        url = redis if broker == UNHARMED else services.require(broker)
        self._stack.callback(services.delete_redis_keys, redis, f"*{namespace}*")
        if broker == "rabbitmq":
            url = self._stack.enter_context(services.rabbitmq_vhost(url, namespace))
        workshop = self[broker] = Workshop(
            broker=url, notes=redis, store=redis, namespace=namespace, directory=self._directories.mktemp("canvas"),
            TASKGUARD_LEASE="2",
        )  # fmt: skip
        self._stack.callback(workshop.close)
        stop = threading.Event()
        mortal = {ENABLED: "worker", "TEST_TRANSPORT": HASTY if broker == "redis" else "{}"}
        supervisor = workshop.keep(1, stop) if broker == UNHARMED else workshop.keep(2, stop, **mortal)
        self._stack.callback(supervisor.join)
        self._stack.callback(stop.set)
        return workshop


@pytest.mark.parametrize(("broker", "workflow", "crashes"), draw())
def test_a_workflow_whose_processes_die_is_as_in_plain_celery_unharmed(
    workshops: dict[str, Workshop], broker: str, workflow: Workflow, crashes: list[Crash]
) -> None:
    """Every redelivery goes on from the stored outcome: links, chains and chords neither stop nor run twice."""
    print(f"PROOF_SEED={seed()}")
    workshop, unharmed = workshops[broker], workshops[UNHARMED]
    workshop.wait_idle()
    plain = wait_over(unharmed, workflow(unharmed.plain))
    with armed(workshop, crashes) as fired:
        other = ended(workshop, workflow(workshop.reliable))
        assert_same(workshop, plain, other)
        if not Deadline.after(3).reached(fired):  # it may die over what is seen already
            assert len(crashes) == 1
            pytest.skip("the workflow does not pass this point")

        def ran() -> tuple[list[str], list[str]]:
            done = bodies(workshop, other), bodies(unharmed, plain)
            if all(crash.action == "die each" for crash in crashes):
                return tuple([repr(body) for body in each] for each in done)  # type: ignore[return-value]
            # Whatever else a worker ran at the moment of its death was cut, and runs again.
            return tuple(sorted({repr(body) for body in each}) for each in done)  # type: ignore[return-value]

        Deadline.after(PATIENCE).reached(lambda: len(set(map(str, ran()))) == 1)
        became, wanted = ran()
        assert became == wanted


@contextmanager
def armed(workshop: Workshop, crashes: list[Crash]) -> Iterator[Callable[[], int]]:
    """Arm the crashes while the block lasts; gives a function that tells how often processes died."""
    where = workshop.environ["TEST_NOTES"], workshop.environ["TEST_NAMESPACE"]
    armoury, journal = Armoury(*where), Journal(*where)
    before = len(journal.entries("fired"))
    for crash in crashes:
        armoury.arm(crash.point, action=crash.action)
    try:
        yield lambda: len(journal.entries("fired")) - before
    finally:
        armoury.clear()
        armoury.close()
        journal.close()
