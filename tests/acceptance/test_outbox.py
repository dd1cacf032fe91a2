"""Orders are done if and only if they were committed, each once, whatever is killed on their way.

``python -m tests.acceptance.outbox`` plays it with 20,000 orders.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.acceptance.outbox import PAIRS, VICTIMS, Outcome, _judge, play
from tests.proof import draw

ORDERS = 600
FAULTS = 6
SEED = draw.seed()


@pytest.mark.timeout(420)
@pytest.mark.parametrize(("broker", "store"), PAIRS)
def test_exactly_the_committed_orders_are_done_once_and_in_order(broker: str, store: str, tmp_path: Path) -> None:
    """Relays, workers and the broker are killed meanwhile, each at least once."""
    outcome = play(broker, store, orders=ORDERS, seed=SEED, directory=tmp_path, faults=FAULTS)
    print(f"{draw.VARIABLE}={SEED}: {outcome.shown()}")
    assert outcome.flaws == []
    assert outcome.committed == outcome.done == ORDERS // 2
    assert outcome.killed.keys() == set(VICTIMS)
    assert outcome.killed.total() == FAULTS


def test_every_flaw_is_told() -> None:
    """What the scene looks for, it finds."""
    outcome = Outcome("redis", "mariadb", 1, 8)
    placed = [("a", 1), ("a", 2), ("a", 3), ("b", 1)]
    done = [("a", 1), ("a", 1), ("a", 3), ("b", 1), ("b", 2)]
    _judge(outcome, placed, done, [("a", 2), ("a", 1), ("b", 1), ("b", 7)])
    assert [flaw.split(",")[0] for flaw in outcome.flaws] == [
        "1 committed and not done",
        "1 done and not committed",
        "1 done more than once",
        "1 committed and not published",
        "1 published and not committed",
        "out of order: ['a']",
    ]
    outcome = Outcome("redis", "mariadb", 1, 8)
    _judge(outcome, placed, placed, [*placed, *placed])
    assert outcome.flaws == []
