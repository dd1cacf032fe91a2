"""What options accept: durations, rates, JSON. Callbacks of click options; each raises BadParameter."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import click

from taskguard.clock import seconds
from taskguard.errors import ConfigurationError

_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:/\s*([smh]))?\s*")
_PERIODS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_KINDS = {list: "a list, such as '[1, \"two\"]'", dict: "an object, such as '{\"order_id\": 1}'"}


def duration(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Seconds, or ``90s``, ``5m``, ``24h``, ``7d``; as seconds."""
    if value is None:
        return None
    try:
        return seconds(value)
    except ConfigurationError as exc:
        raise click.BadParameter(str(exc), ctx, param) from exc


def lasting(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """A `duration` of more than nothing."""
    found = duration(ctx, param, value)
    if found == 0:
        raise click.BadParameter(f"{value!r} ends before it begins; give more than 0, such as 5m", ctx, param)
    return found


def names(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Names of circuits, of queues: not blank."""
    for each in value:
        if not each.strip():
            raise click.BadParameter(f"{each!r} is no name; give one with a letter in it, such as bank", ctx, param)
    return value


def rate(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """``50/s``, ``100/m``, ``500/h``, a bare number is per second; as a number per second, more than zero."""
    if value is None:
        return None
    match = _RATE.fullmatch(value)
    per_second = float(match[1]) / _PERIODS[match[2] or "s"] if match else 0.0
    if per_second <= 0:
        raise click.BadParameter(f"{value!r} is not a rate; write 50/s, 100/m or 500/h", ctx, param)
    return per_second


def json_of(kind: type[list[Any]] | type[dict[str, Any]]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """JSON of one kind."""

    def read(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        if value is None:
            return None
        try:
            found = json.loads(value)
        except (ValueError, RecursionError) as exc:
            raise click.BadParameter(f"{value[:80]!r} is not JSON ({exc}); write {_KINDS[kind]}", ctx, param) from exc
        if not isinstance(found, kind):
            raise click.BadParameter(f"{value[:80]!r} is JSON of another kind; write {_KINDS[kind]}", ctx, param)
        return found

    return read
