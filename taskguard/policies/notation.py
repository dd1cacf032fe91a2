"""Rates as people write them: ``100/second``, ``10 per 2 minutes; 1000/day``, ``50/second burst=200``.

The grammar is that of the ``limits`` library, which Flask-Limiter and SlowAPI users know: a number, ``/`` or ``per``, a
multiple where there is one, a unit; several of them separated by ``;``, ``,`` or ``|``. On top of it come short units
(``s``, ``m``, ``h``, ``d``), fractions, and two options behind the unit: ``burst=N`` and ``algorithm=NAME``. A month
has 30 days, as there, and a year 365.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from taskguard.errors import ConfigurationError
from taskguard.policies.rates import FixedWindow, LeakyBucket, Rate, SlidingLog, SlidingWindow, TokenBucket

ALGORITHMS: Mapping[str, type[Rate]] = {
    "token_bucket": TokenBucket,
    "leaky_bucket": LeakyBucket,
    "fixed_window": FixedWindow,
    "sliding_window": SlidingWindow,
    "sliding_log": SlidingLog,
}
"""The names of the algorithms; the first is the default."""

UNITS: Mapping[str, float] = {
    "year": 365 * 86400.0,
    "month": 30 * 86400.0,
    "day": 86400.0,
    "hour": 3600.0,
    "minute": 60.0,
    "second": 1.0,
    "ms": 0.001,
}
_SHORT = {"s": "second", "sec": "second", "m": "minute", "min": "minute", "h": "hour", "d": "day"}
_SEPARATORS = re.compile(r"[;,|]")
_ONE = re.compile(
    r"\s*(?P<limit>\d+(?:\.\d+)?)\s*(?:/|per\s)\s*(?P<times>\d+(?:\.\d+)?)?\s*(?P<unit>[a-z]+)(?P<options>(?:\s+\w+=\S+)*)\s*",
    re.IGNORECASE,
)
EXAMPLES = "write '100/second', '10 per 2 minutes', or '50/second burst=200', several separated by ';'"


def parse_rates(text: str, *, what: str = "rate") -> tuple[Rate, ...]:
    """The policies that *text* names. Raises ConfigurationError for what is none, with a way to write it."""
    if not isinstance(text, str):
        raise ConfigurationError(f"{what}: {text!r} is no text; {EXAMPLES}")
    return tuple(_one(part, what) for part in _SEPARATORS.split(text))


def parse_rate(text: str, *, what: str = "rate") -> Rate:
    """The one policy that *text* names. Raises as `parse_rates`."""
    found = parse_rates(text, what=what)
    if len(found) > 1:
        raise ConfigurationError(f"{what}: {text!r} names {len(found)} rates; give one")
    return found[0]


def _one(text: str, what: str) -> Rate:
    match = _ONE.fullmatch(text)
    if match is None:
        raise ConfigurationError(f"{what}: {text.strip()!r} is not a rate; {EXAMPLES}")
    unit = _unit(match["unit"].lower())
    if unit is None:
        raise ConfigurationError(
            f"{what}: {match['unit']!r} in {text.strip()!r} is no unit; use one of {', '.join(UNITS)}"
        )
    per = UNITS[unit] * float(match["times"] or 1)
    options = dict(option.split("=", 1) for option in match["options"].lower().split())
    unknown = options.keys() - {"burst", "algorithm"}
    if unknown:
        raise ConfigurationError(
            f"{what}: {min(unknown)!r} in {text.strip()!r} is no option; burst= and algorithm= are"
        )
    kind = ALGORITHMS.get(options.get("algorithm", "token_bucket"))
    if kind is None:
        raise ConfigurationError(
            f"{what}: {options['algorithm']!r} is no algorithm; choose one of {', '.join(ALGORITHMS)}"
        )
    if "burst" not in options:
        return _made(kind, what, float(match["limit"]), per)
    if kind is not TokenBucket:
        raise ConfigurationError(
            f"{what}: burst= in {text.strip()!r} means nothing to {options['algorithm']}; only a token_bucket saves up"
        )
    try:
        burst = float(options["burst"])
    except ValueError:
        raise ConfigurationError(f"{what}: burst={options['burst']!r} is no number; write burst=20") from None
    return _made(TokenBucket, what, float(match["limit"]), per, burst)


def _made(kind: type[Rate], what: str, *numbers: float) -> Rate:
    try:
        return kind(*numbers)
    except ConfigurationError as exc:
        raise ConfigurationError(f"{what}: {exc}") from None


def _unit(word: str) -> str | None:
    word = _SHORT.get(word, word)
    return word if word in UNITS else word.removesuffix("s") if word.removesuffix("s") in UNITS else None


def algorithm_of(rate: Rate) -> str:
    """The name of its algorithm."""
    return next(name for name, kind in ALGORITHMS.items() if kind is type(rate))


def notation(rate: Rate) -> str:
    """*rate* as `parse_rate` reads it: the same policy comes out."""
    unit, size = next((unit, size) for unit, size in UNITS.items() if rate.period >= size or unit == "ms")
    times = rate.period / size
    if UNITS[unit] * float(_plain(times)) != rate.period:
        unit, times = "second", rate.period
    text = f"{_plain(rate.limit)}/{'' if times == 1 else _plain(times)}{' ' if times != 1 else ''}{unit}"
    if times != 1 and unit != "ms":
        text += "s"
    if isinstance(rate, TokenBucket):
        return text if rate.burst == rate.limit or rate.burst is None else f"{text} burst={_plain(rate.burst)}"
    return f"{text} algorithm={algorithm_of(rate)}"


def _plain(number: float) -> str:
    """Digits without an exponent, as short as they say the same number."""
    if number == int(number):
        return str(int(number))
    text = repr(number)
    return text if "e" not in text else f"{number:.30f}".rstrip("0")
