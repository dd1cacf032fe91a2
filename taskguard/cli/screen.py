"""The look of all tables: plain heads, no boxes, and only cleaned text, never markup."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from taskguard.cli.text import clean

PIPE_WIDTH = 160
"""Columns in a pipe or a file, where rich would guess 80 and break what somebody looks for."""


def console() -> Console:
    """The console on stdout. What its encoding cannot show is escaped."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(highlight=False, markup=False, emoji=False, width=width)


def table() -> Table:
    """A table as wide as the terminal."""
    return Table(box=SIMPLE_HEAD, expand=True, padding=0, show_edge=False, header_style="bold")


def cell(text: str, style: str = "") -> Text:
    """Text on one line."""
    return Text(clean(" ".join(text.split())), style=style)
