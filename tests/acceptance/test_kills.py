"""A thousand tasks and five SIGKILLed workers: nothing lost, everything completed once, and soon.

One broker and store are drawn by ``PROOF_SEED``; ``python -m tests.acceptance.kills`` plays all, with stock Celery
beside them.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.acceptance.kills import BROKERS, KILLS, PREFETCHES, RECOVERY, STORES, TASKS, Figures, figures
from tests.acceptance.killscene import RESERVE, WINDOW, draw_kills
from tests.proof import draw

SEED = draw.seed()


def _drawn() -> tuple[str, str, int | None]:
    """A broker, a store, and a prefetch."""
    chance = random.Random(SEED)
    return chance.choice(BROKERS), chance.choice(STORES), chance.choice(PREFETCHES)


@pytest.mark.timeout(420)
@pytest.mark.parametrize(("broker", "store", "prefetch"), [_drawn()])
def test_nothing_is_lost_and_every_key_completes_once_while_workers_are_killed(
    broker: str, store: str, prefetch: int | None, tmp_path: Path
) -> None:
    """Effects repeat only where a kill fell between effect and completion; what had not started is charged nothing."""
    told = figures(broker, store, seed=SEED, prefetch=prefetch, directory=tmp_path)
    print(f"{draw.VARIABLE}={SEED}: {told.shown()}")
    assert (told.sent, told.kills) == (TASKS, KILLS)
    assert told.started + told.prefetched > KILLS, "the kills hit workers with their hands full"
    assert told.flaws == []
    assert (told.completed, told.completed_twice, told.dead, told.hidden, told.lost) == (TASKS, 0, 0, 0, 0)
    assert told.never_again == 0
    assert told.repeated <= told.started
    assert told.percentile(0.99) <= told.recovery_allowed <= RECOVERY + 1, "\n".join(told.slow)
    assert told.broken() == []


def test_a_busy_machine_excuses_one_second_at_most() -> None:
    """However late ordinary starts were, a recovery of more than six seconds is told."""
    told = Figures(
        side="taskguard", broker="redis", store="redis", seed=1, prefetch=None, sent=TASKS, kills=KILLS,
        completed=TASKS, started=KILLS, prefetched=KILLS, recovery=[RECOVERY + 1], ordinary=60.0,
    )  # fmt: skip
    assert told.broken() == []
    told.recovery = [RECOVERY + 1.01]
    assert told.broken() == ["not so: recovery within 6.00 s"]
    told.ordinary = 0.2
    assert told.broken() == ["not so: recovery within 5.20 s"]


@pytest.mark.parametrize("seed", range(20))
def test_kills_are_drawn_while_there_is_work(seed: int) -> None:
    """No kill comes before both workers have something to do, or when too little is left to do."""
    drawn = [draw.after for draw in draw_kills(random.Random(seed), TASKS, KILLS)]
    assert len(drawn) == KILLS
    assert drawn == sorted(drawn)
    assert drawn[0] >= 2 * WINDOW
    assert drawn[-1] < TASKS - KILLS * RESERVE
