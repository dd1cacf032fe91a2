"""The pytest plugin of taskguard: the fixtures `reliable` and `taskguard_app`.

A package of its own, because pytest imports it at every start: under ``taskguard`` it would bring Celery along, also
for those who do not use it. What it offers is in `taskguard.testing`, imported when a test asks for the fixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from taskguard.testing import Reliable


def pytest_addoption(parser: pytest.Parser) -> None:
    """The one setting: where the application is."""
    parser.addini(
        "taskguard_app", "the Celery application that `reliable` puts on stage: package.module:app", default=""
    )


@pytest.fixture
def taskguard_app(pytestconfig: pytest.Config) -> Any:
    """The Celery application under test: ``taskguard_app`` of pytest's configuration, or else the one last made.

    Override it in a conftest.py where a project has several.
    """
    from taskguard.errors import ConfigurationError
    from taskguard.testing.stage import named_app

    try:
        return named_app(pytestconfig.getini("taskguard_app"))
    except ConfigurationError as exc:
        complaint = str(exc)
    pytest.fail(complaint, pytrace=False)


@pytest.fixture
def reliable(taskguard_app: Any) -> Iterator[Reliable]:
    """The application with a store, a broker, results and a clock of this test's own; see `taskguard.testing`."""
    from taskguard.errors import ConfigurationError
    from taskguard.testing import Reliable

    with ExitStack() as stack:
        try:
            entered, complaint = stack.enter_context(Reliable(taskguard_app)), ""
        except ConfigurationError as exc:
            complaint = str(exc)
        if complaint:
            pytest.fail(complaint, pytrace=False)
        yield entered
