"""What an operator types, and what is read from the screen."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from click.testing import CliRunner, Result

from taskguard.cli import cli

Run = Callable[..., Result]


def type_in(*words: str, status: int = 0, columns: int = 80, **options: Any) -> Result:
    """Type a command; it must end with *status*, and never in an unexpected exception."""
    result = CliRunner().invoke(cli, words, env={"COLUMNS": str(columns)}, prog_name="taskguard", **options)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status, result.output
    return result


def parsed(result: Result) -> list[dict[str, Any]]:
    """The JSON list on stdout."""
    items: list[dict[str, Any]] = json.loads(result.stdout)
    return items
