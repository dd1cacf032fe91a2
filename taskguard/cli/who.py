"""Who types, and why: kept with every change of rules and circuits."""

from __future__ import annotations

import getpass

import click

why_option = click.option("--why", default="", metavar="TEXT", help="Kept with the change, for whoever asks.")


def operator() -> str:
    """The operating system's user."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user id without a name, as in a container
        return "unknown"
