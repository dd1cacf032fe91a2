"""Every row once, with taskguard, somewhere drawn by a seed. ``PROOF_SEED`` repeats a draw."""

from __future__ import annotations

from typing import Any

import pytest

from tests.proof import draw
from tests.proof.house import House, stage_key
from tests.proof.rows import LAST_ROW, Place, Row, all_rows

SEED = draw.seed()


def _drawn() -> list[Any]:
    """Rows that share a stage go to one process, one after the other."""
    hand = draw.Draw(SEED)
    drawn = [(row, hand.place(row)) for row in all_rows() if row.scenario is not None]
    params = []
    for row, place in sorted(drawn, key=lambda each: (stage_key(*each), each[0].number)):
        shared = not (row.alone or row.private)
        marks = [pytest.mark.xdist_group(f"proof {stage_key(row, place)}")] if shared else []
        marks += [pytest.mark.smoke] if row.smoke else []
        params.append(pytest.param(row, place, id=f"row-{row.label}-on-{place}-seed-{SEED}", marks=marks))
    return params


@pytest.mark.parametrize(("row", "place"), _drawn())
def test_the_hazard_ends_well(row: Row, place: Place, house: House) -> None:
    """The fault fires, and taskguard keeps its promises."""
    print(f"{draw.VARIABLE}={SEED}: row {row.number} on {place}: {row.hazard}")
    print(house.play(row, "taskguard", place).shown())


def test_every_row_of_the_catalogue_is_there() -> None:
    """Each number has a scenario, or says where it belongs."""
    rows = all_rows()
    assert [row.number for row in rows] == list(range(1, LAST_ROW + 1))
    assert all((row.scenario is None) == bool(row.belongs_to) for row in rows)
