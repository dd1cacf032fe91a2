"""docs/proof.md is what a full run wrote, and leaves out no row."""

from __future__ import annotations

from itertools import product

from tests.acceptance.kills import BROKERS, PREFETCHES, STORES
from tests.proof.killed import read_kills
from tests.proof.page import NOT_MEASURED, PAGE, generated, read_figures
from tests.proof.rows import CONTESTANTS, all_rows


def test_the_page_names_every_row() -> None:
    """Its number and its name, and the scenario that plays it or why there is none."""
    page = PAGE.read_text()
    for row in all_rows():
        assert f"### {row.number}. {row.name}\n" in page
        assert (f"`{row.scenario.__name__}`" if row.scenario else row.belongs_to) in page


def test_the_page_is_what_the_figures_say() -> None:
    """Nobody has edited a figure, and nobody forgot to write the page after a run."""
    assert generated() in PAGE.read_text(), "run python -m tests.proof --page"


def test_every_row_has_figures_of_both_contestants() -> None:
    """None of them is a failure."""
    figures = read_figures()
    for row in all_rows():
        if row.scenario is not None:
            played = {figure.contestant for figure in figures if figure.row == row.number and figure.outcome}
            assert played == set(CONTESTANTS), (
                f"row {row.number}; run python -m tests.proof --rows {row.number} --write"
            )
    assert not [figure for figure in figures if figure.failure]


def test_nothing_on_the_page_is_left_unmeasured() -> None:
    """A row with a scenario shows what became of the tasks, for stock and for taskguard."""
    unmeasured, title = [], ""
    for line in PAGE.read_text().splitlines():
        title = line if line.startswith("### ") else title
        if NOT_MEASURED in line:
            unmeasured.append(title)
    assert unmeasured == []


def test_the_kills_have_figures_of_every_pair_and_of_stock_on_every_broker() -> None:
    """None of taskguard's lost anything, or completed anything twice."""
    kills = read_kills()
    guarded = [killed for killed in kills if killed.side == "taskguard"]
    assert {(k.broker, k.store, k.prefetch) for k in guarded} == set(product(BROKERS, STORES, PREFETCHES))
    assert {killed.broker for killed in kills if killed.side == "stock"} == set(BROKERS)
    for killed in guarded:
        assert killed.completed == killed.sent
        assert (killed.lost, killed.hidden, killed.dead, killed.never_again, killed.completed_twice) == (0, 0, 0, 0, 0)
        assert not killed.broken
