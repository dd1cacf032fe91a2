"""The Lua scripts, and how one is run outside the pipelined line."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from taskguard.celery.redis_broker.stock import redis as stock

NEEDS = {"turn": ("_readable",)}


@dataclass(frozen=True, slots=True)
class Script:
    """A script as the server knows it: by the SHA-1 of its source."""

    source: bytes
    sha: str


@cache
def script(verb: str) -> Script:
    """The script ``lua/<verb>.lua``, with what it needs in front."""
    folder = resources.files(__package__) / "lua"
    source = b"\n".join((folder / f"{name}.lua").read_bytes() for name in (*NEEDS.get(verb, ()), verb))
    return Script(source, hashlib.sha1(source, usedforsecurity=False).hexdigest())


def run(client: Any, verb: str, keys: list[str], *arguments: Any) -> Any:
    """Run a script and wait for its reply, loading it where the server does not know it."""
    known = script(verb)
    command = ("EVALSHA", known.sha, len(keys), *keys, *arguments)
    try:
        return client.execute_command(*command)
    except stock.redis.exceptions.NoScriptError:
        client.execute_command("SCRIPT LOAD", known.source)
        return client.execute_command(*command)
