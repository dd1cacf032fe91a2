"""The operator's command line: ``taskguard …``, and ``celery -A app taskguard …``.

Celery imports this module for every command of its own, so it imports nothing but click; each noun is imported when
it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from taskguard.cli.complaints import complaining
from taskguard.cli.connection import connection_options


class _Lazy(click.Command):
    """A command that lives in a module of its own, imported when it is called."""

    def __init__(self, name: str, target: str, text: str) -> None:
        super().__init__(name, help=text, add_help_option=False)
        self._target = target

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        module, _, attribute = self._target.partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command.make_context(info_name, args, parent, **extra)


class _Root(click.Group):
    """The root: whatever goes wrong below it is told in one line."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        with complaining():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with complaining():
            return super().invoke(ctx)


@click.group("taskguard", cls=_Root, context_settings={"help_option_names": ["-h", "--help"]})
@connection_options
@click.version_option(package_name="taskguard", prog_name="taskguard")
def cli() -> None:
    """Look after what taskguard keeps: dead letters, waiting messages, the relay."""


for _name, _text in (
    ("dlq", "Dead letters: list, show, requeue, edit, purge, export, import."),
    ("status", "How many messages are in each state, and how old the oldest is."),
    ("revoke", "Make tasks never run, durably."),
    ("queues", "Queues that no worker consumes for now: pause, resume, list."),
    ("limits", "Rate limits by rules: list, set, delete, import, export, explain, report."),
    ("circuits", "Circuits of downstreams: list, show, open, close, disable, reset."),
    ("relay", "Run a relay alone: publish what is due."),
    ("outbox", "What transactions sent: status, peek, relay, requeue, purge."),
    ("schema", "Tables in SQL databases: create, sql, check."),
    ("demo", "Watch workers lose nothing through crashes, duplicates and poison."),
):
    cli.add_command(_Lazy(_name, f"taskguard.cli.{_name}:{_name}", _text))


def main() -> None:
    """The console script."""
    cli(prog_name="taskguard")
