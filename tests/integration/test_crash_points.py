"""Every crash point: a process dies before or after each operation of each port, and the promises hold.

The points are read from the code (`tests.integration.crashpoints`), and the scenes that meet them are in
`tests.integration.crashscenes` and the modules beside it. Each scene asserts that its crash came, how often the task
was started in all, and that it had one end which everybody can see. ``make test`` plays each scene once on each side,
on a broker and a store drawn for it; with ``PROOF_ALL=1`` on all of them. ``PROOF_SEED`` repeats a draw.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import product
from typing import Any

import pytest

from tests.integration import crashpoints
from tests.integration.conftest import open_site
from tests.integration.crashpoints import Point
from tests.integration.crashscenes import Scene
from tests.integration.crashscenes_permits import SCENES
from tests.integration.crew import Crew
from tests.proof.draw import plays_all, seed

Pair = tuple[str, str]

PAIRS: list[Pair] = list(product(("redis", "rabbitmq"), ("redis", "postgresql")))
ALL = plays_all()
SEED = seed()

SPARED = {
    "MessageStore.writes_results_to": "compares two addresses",
    "MessageStore.joined_with": "compares two addresses",
    "JointStore.claim": "dies where a claim does, and where a question for permits does: it is both",
    "Message.ack_log_error": "calls ack",
    "Message.reject_log_error": "calls reject",
    "Message.decode": "talks to nobody",
    "PermitStore.circuits": "operators look at it: it reads",
    "PermitStore.watch_circuits": "a thread listens, and its process's death ends that; a call asks for what it missed",
    "PermitStore.watch_paused": "a thread listens, and its process's death ends that; the next worker asks",
    "MessageStore.watch_due": "a thread listens, and its process's death ends that; the next relay looks",
    "PermitStore.now": "reads a clock",
    "PermitStore.close": "gives connections back",
    "PermitStore.force": "an operator's, who says it again; where a downstream asks to wait, the run dies as at report",
    "PermitStore.adapt": "the tending thread's: a step that was not made is proposed by later calls",
    "PermitStore.adaptive": "the tending thread's: it reads",
    "PermitStore.pause": "an operator's, who says it again; where a circuit pauses a queue, the task rests after",
    "PermitStore.resume": "an operator's, who says it again",
    "PermitStore.paused": "a worker's thread asks every moment: it reads",
    **dict.fromkeys(
        ("RuleStore.rules", "RuleStore.version", "RuleStore.changes", "RuleStore.watch", "RuleStore.close"),
        "of edges and operators, no run asks for rules: it reads",
    ),
    **dict.fromkeys(
        ("RuleStore.put", "RuleStore.delete"),
        "an operator's, who says it again: one step makes the whole version or none, and no run asks for rules",
    ),
    **dict.fromkeys(
        ("DemandStore.read", "DemandStore.now", "DemandStore.close"), "of edges and operators, no run: it reads"
    ),
    "DemandStore.add": "an edge's thread counts for people, and no run; what its process had not told is not counted",
}
"""Operations that no scene dies at, and why."""


def draw() -> list[Any]:
    """Each scene on each side, with the crew that plays it."""
    run, drawn = random.Random(SEED), []
    stores = run.sample(("redis", "postgresql"), 2)
    chosen = list(zip(("redis", "rabbitmq"), stores, strict=True))
    alone = run.choice(chosen)
    for scene in SCENES:
        for side in ("before", "after"):
            for pair in PAIRS if ALL else [alone if scene.relay_alone else run.choice(chosen)]:
                group = "-".join((*pair, "alone") if scene.relay_alone else pair)
                drawn.append(
                    pytest.param(
                        (*pair, scene.relay_alone),
                        scene,
                        Point(scene.operation, side),
                        id=f"{group}-{side} {scene}",
                        marks=pytest.mark.xdist_group(f"crash-{group}"),
                    )
                )
    return sorted(drawn, key=lambda param: str(param.values[0]))


class Stage:
    """The crew that plays. Another one is hired, and the former dismissed, when the next scene needs it."""

    def __init__(self, directories: pytest.TempPathFactory) -> None:
        self._directories = directories
        self._stack = ExitStack()
        self._hired: tuple[tuple[str, str, bool], Crew] | None = None

    def crew(self, wanted: tuple[str, str, bool]) -> Crew:
        """A crew on a broker and a store, with a relay apart from the workers or not."""
        if self._hired is None or self._hired[0] != wanted:
            self.clear()
            broker, store, relay_alone = wanted
            options = {"size": 1, "relays": 1} if relay_alone else {"size": 2}
            directory = self._directories.mktemp("crew")
            crew = open_site(self._stack, broker, store, directory, partial(Crew, **options))  # type: ignore[arg-type]
            assert isinstance(crew, Crew)
            self._hired = wanted, crew
            crew.keep()
        return self._hired[1]

    def clear(self) -> None:
        """At the end nothing may be on its way, and nothing have run again."""
        hired, self._hired = self._hired, None
        with self._stack:
            if hired is not None:
                hired[1].assert_still()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Where the scenes are played."""
    stage = Stage(tmp_path_factory)
    yield stage
    stage.clear()


@pytest.mark.parametrize(("wanted", "scene", "point"), draw())
def test_a_process_that_dies_loses_nothing_and_repeats_no_more_than_it_must(
    stage: Stage, wanted: tuple[str, str, bool], scene: Scene, point: Point
) -> None:
    """One end, in sight of all; one completed run; growing tokens; no start more than the crash explains."""
    print(f"PROOF_SEED={SEED}")
    crew = stage.crew(wanted)
    crew.begin_scene()
    scene.play(crew, point)
    assert crew.fired(point), "the crash came"
    assert not crew.armoury.armed(), "every crash came"


def test_every_operation_of_every_port_has_a_scene() -> None:
    """A new operation fails here until a scene dies at it, or it is spared with a reason."""
    found = {point.operation for point in crashpoints.points()}
    assert crashpoints.overlooked(found, {scene.operation for scene in SCENES}, SPARED) == set()
