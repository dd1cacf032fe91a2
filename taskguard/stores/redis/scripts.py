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
    return _made(_source(*prologues, verb))


@cache
def joint_script(verb: str, *parts: tuple[str, ...]) -> Script:
    """The script ``lua/<verb>.lua`` after other scripts, each with its prologues in front and a function to it."""
    functions = [b"local function %b(KEYS, ARGV)\n%b\nend" % (part[-1].encode(), _source(*part)) for part in parts]
    return _made(b"\n".join((*functions, _source(verb))))


def _source(*names: str) -> bytes:
    folder = resources.files(__package__) / "lua"
    return b"\n".join((folder / f"{name}.lua").read_bytes() for name in names)


def _made(source: bytes) -> Script:
    return Script(source, hashlib.sha1(source, usedforsecurity=False).hexdigest().encode())
