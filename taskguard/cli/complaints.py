"""Errors as people see them: one line on stderr, ``taskguard: what, the value, the way out``, and never a traceback.

Exit status 1, or 2 when the command was typed wrongly.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from taskguard.cli.text import one_line
from taskguard.errors import TaskguardError

_EXTRAS = {
    "rich": "tables need rich, which is not installed; pip install 'taskguard[cli]', or add --json",
    "sqlalchemy": "SQL databases need {}, which is not installed; pip install 'taskguard[sql]'",
    "psycopg": "PostgreSQL needs {}, which is not installed; pip install 'taskguard[sql]'",
    "pymysql": "MySQL needs {}, which is not installed; pip install 'taskguard[mysql]'",
}
"""What an extra brings, and what is missing without it."""


class Complaint(click.ClickException):
    """An error that ends the command."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it."""
        click.echo(f"taskguard: {one_line(self.format_message())}", file=file, err=True)


class Misuse(Complaint):
    """The command was typed wrongly."""

    exit_code = 2


@contextmanager
def complaining() -> Iterator[None]:
    """Turn what can go wrong for reasons outside this program into a `Complaint`. A bug keeps its traceback."""
    try:
        yield
    except Complaint:
        raise
    except click.UsageError as exc:
        if type(exc).__name__ == "NoArgsIsHelpError":  # click 8.2 and newer: shows the help, which is no complaint
            raise
        command = exc.ctx.command_path if exc.ctx else "taskguard"
        raise Misuse(f"{exc.format_message().rstrip('.')}; see `{command} --help`") from exc
    except click.ClickException as exc:
        raise Complaint(exc.format_message()) from exc
    except TaskguardError as exc:
        raise Complaint(str(exc)) from exc
    except ModuleNotFoundError as exc:
        missing = (exc.name or "").split(".")[0]
        if missing not in _EXTRAS:
            raise
        raise Complaint(_EXTRAS[missing].format(missing)) from exc
    except OSError as exc:
        if exc.errno == errno.EPIPE:  # the reader of our output has seen enough; click ends quietly
            raise
        raise Complaint(str(exc)) from exc
