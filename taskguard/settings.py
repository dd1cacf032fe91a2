"""Settings: one name everywhere.

``lease`` is the argument of ``install(app, lease=…)``, ``taskguard_lease`` in Celery's configuration and
``TASKGUARD_LEASE`` in the environment, in this order of precedence.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Self

from taskguard.clock import seconds
from taskguard.errors import ConfigurationError

logger = logging.getLogger(__name__)

PREFIX = "taskguard_"
_WORD = re.compile(r"[^\s{}]+")
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `taskguard.install` can be told. Durations are seconds, or text such as ``"15s"`` or ``"24h"``.

    store: URL of the message store. None: eager mode uses process memory, a worker refuses to start.
    namespace: keeps applications apart that share one store.
    lease: how long a run holds its key without a heartbeat; a killed worker's runs are rescued after it.
    max_crashes: how often a run may take its process down before it is dead-lettered as poison.
    retention: how long the result of a completed key is kept for its duplicates.
    relay: run a relay inside every worker.
    early_ack: acknowledge the broker's copy when a run's lease was renewed for the first time. Turn it off where the
        store is less durable than the broker.
    store_timeout: bound of every call to the store.
    patience: how long a worker waits for a store that does not answer before it gives the message back.
    outbox: URL of the database in which producers' transactions leave messages. None: the store's, if it is SQL.
    outbox_retention: how long a published row of the outbox is kept; 0 removes it at once, which is much faster.
    session: makes the sessions of transactional tasks: a sessionmaker, or where it is, such as "shop.db:Session". None:
        plain ones, on the store's database.
    permits: URL of the permit store: rates, slots, circuits, paused queues. None: the message store's.
    permits_timeout: bound of every call to the permit store.
    """

    store: str | None = None
    namespace: str = "default"
    lease: float = 15.0
    max_crashes: int = 3
    retention: float = 86400.0
    relay: bool = True
    early_ack: bool = True
    store_timeout: float = 5.0
    patience: float = 10.0
    outbox: str | None = None
    outbox_retention: float = 0.0
    session: Any = None
    permits: str | None = None
    permits_timeout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("store", "outbox", "permits", "session"):  # compose files and shells say "unset" by an empty value
            object.__setattr__(self, name, getattr(self, name) or None)
        for name in ("lease", "retention", "store_timeout", "patience", "permits_timeout"):
            value = seconds(getattr(self, name), what=name)
            object.__setattr__(self, name, value)
            if value <= 0:
                raise ConfigurationError(f"{name}: {value!r} must be more than zero seconds")
        object.__setattr__(self, "outbox_retention", seconds(self.outbox_retention, what="outbox_retention"))
        for name in ("relay", "early_ack"):
            object.__setattr__(self, name, _boolean(name, getattr(self, name)))
        object.__setattr__(self, "max_crashes", _count("max_crashes", self.max_crashes))
        if not (isinstance(self.namespace, str) and _WORD.fullmatch(self.namespace)):
            raise ConfigurationError(f"namespace: {self.namespace!r} must be a word without spaces or braces")

    def arguments(self) -> dict[str, Any]:
        """What `install` is given to have the same settings again."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def read(cls, given: Mapping[str, Any], conf: Mapping[str, Any], environ: Mapping[str, str]) -> Self:
        """Merge arguments, Celery configuration and environment. Raises ConfigurationError for an unknown name.

        Not for one in the environment, where the prefix may be anybody's: what looks misspelt there is warned of.
        """
        names = [f.name for f in fields(cls)]
        configured = [str(key).removeprefix(PREFIX) for key in conf if str(key).startswith(PREFIX)]
        for name in (*given, *configured):
            if name not in names:
                raise ConfigurationError(f"{name!r} is not a taskguard setting; known are {', '.join(names)}")
        _warn_of_misspelt(environ, names)
        merged: dict[str, Any] = {}
        for name in names:
            for value in (given.get(name), conf.get(f"{PREFIX}{name}"), environ.get(f"TASKGUARD_{name.upper()}")):
                if value is not None:
                    merged[name] = value
                    break
        return cls(**merged)


def _warn_of_misspelt(environ: Mapping[str, str], names: Sequence[str]) -> None:
    for variable in environ:
        name = variable.lower().removeprefix(PREFIX)
        if not variable.startswith(PREFIX.upper()) or name in names:
            continue
        for meant in get_close_matches(name, names, n=1, cutoff=0.8):
            logger.warning("%s is no setting and has no effect; is TASKGUARD_%s meant?", variable, meant.upper())


def _count(name: str, value: object) -> int:
    if str(value).strip().isdecimal() and int(str(value)) >= 1:
        return int(str(value))
    raise ConfigurationError(f"{name}: {value!r} is not a whole number, 1 or more")


def _boolean(name: str, value: object) -> bool:
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ConfigurationError(f"{name}: {value!r} is neither true nor false")
