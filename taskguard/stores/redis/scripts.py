"""The Lua scripts: one file per operation, each with the prologues of its family in front."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True, slots=True)
class Script:
    """A script as the server knows it: by the SHA-1 of its source."""

    source: bytes
    sha: bytes


@cache
def script(verb: str, *prologues: str) -> Script:
    """The script ``lua/<verb>.lua``, after the prologues of its family: ``script("claim", "_record")``."""
    folder = resources.files(__package__) / "lua"
    source = b"\n".join((folder / f"{name}.lua").read_bytes() for name in (*prologues, verb))
    return Script(source, hashlib.sha1(source, usedforsecurity=False).hexdigest().encode())
