"""The house of a test process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.proof import draw
from tests.proof.house import House


def pytest_report_header() -> str:
    """The seed, so that a draw can be repeated."""
    return f"{draw.VARIABLE}={draw.seed()}"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """The stage that rows of the same setup share."""
    with House(tmp_path_factory.mktemp("proof")) as house:
        yield house
