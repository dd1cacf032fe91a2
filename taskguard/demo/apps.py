"""Where the demo's tasks are: `workers` lies beside taskguard in its repository, and inside it once it is installed.

It is found by its folder, ahead of any package of that name: many projects have one, and the demo is tried in theirs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_INSTALLED = Path(__file__).with_name("programs")
HOME = str(_INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2])
"""The folder that holds the package `workers`."""


def find_here() -> None:
    """From now on this process imports the demo's `workers`."""
    if HOME not in sys.path[:1]:
        sys.path.insert(0, HOME)


def search_path() -> str:
    """``PYTHONPATH`` of the processes that the demo starts."""
    return os.pathsep.join(filter(None, (HOME, os.environ.get("PYTHONPATH"))))
