"""The rows: what each fires, on which brokers, stores and pools, and how stock Celery is configured beside it."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from tests.proof.outcome import Outcome
    from tests.proof.stage import Stage

Contestant = Literal["taskguard", "stock"]
Scenario = Callable[["Stage"], "Outcome"]

CONTESTANTS: tuple[Contestant, ...] = ("taskguard", "stock")
BROKERS = ("redis", "rabbitmq")
STORES = ("redis", "postgresql")
MORE_STORES = ("mariadb", "sqlite")
"""Drawn for short runs, but no part of the full one."""
POOLS = ("prefork", "threads", "gevent")
PREFORK = POOLS[:1]
FETCHING = POOLS[:2]
"""The pools behind whose running tasks messages are fetched: gevent's is full then, and its consumer waits for it."""
FULL_PAIRS = (("redis", "redis"), ("rabbitmq", "postgresql"))
"""Where the full run plays the pools that are not prefork."""
THEMES = ("child_death", "worker_death", "delays", "limits", "messages", "publishing", "canvas", "operations")
"""Modules of this package in which rows are; one that is not there yet has none."""
LAST_ROW = 51


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What workers and producers are told. *options*: of every task; *conf*: of Celery; *transport*: of the broker.

    *queue* are the arguments the queue is declared with, *env* is the environment of every process.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    conf: Mapping[str, Any] = field(default_factory=dict)
    transport: Mapping[str, Any] = field(default_factory=dict)
    queue: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)

    def __or__(self, other: Setup) -> Setup:
        """Both; *other* wins."""
        return Setup(**{f.name: {**getattr(self, f.name), **getattr(other, f.name)} for f in fields(self)})


NOTHING = Setup()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row is played."""

    broker: str
    store: str
    pool: str

    def __str__(self) -> str:
        return f"{self.broker}-{self.store}-{self.pool}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One hazard of the catalogue.

    beyond_saving: the most tasks that may be lost with taskguard, because nobody but a broker that forgets has them.
    private: which servers ("broker", "store", "backend") the row may break, and so needs for itself. *redis_options*
    are for their command line, *rabbitmq_settings* for a private RabbitMQ.
    alone: its stage is not shared with other rows although its setup is equal. patience: seconds in which stock may
    end what was sent. smoke: as the pytest mark. belongs_to: why the row has no scenario yet, and where it will have
    one.
    """

    number: int
    name: str
    hazard: str = ""
    scenario: Scenario | None = None
    module: str = ""
    brokers: tuple[str, ...] = BROKERS
    stores: tuple[str, ...] = STORES
    pools: tuple[str, ...] = PREFORK
    both: Setup = NOTHING
    guarded: Setup = NOTHING
    stock: Setup = NOTHING
    concurrency: int = 4
    lease: float = 2.0
    patience: float = 10.0
    beyond_saving: int = 0
    private: tuple[str, ...] = ()
    redis_options: tuple[str, ...] = ()
    rabbitmq_settings: Mapping[str, int] = field(default_factory=dict)
    alone: bool = False
    smoke: bool = False
    belongs_to: str = ""

    @property
    def label(self) -> str:
        """``05-whole-worker-killed``."""
        return f"{self.number:02}-" + re.sub(r"[^A-Za-z0-9_]+", "-", self.name)

    def setup(self, contestant: Contestant) -> Setup:
        """What *contestant* is told."""
        return self.both | (self.guarded if contestant == "taskguard" else self.stock)

    def places(self) -> list[Place]:
        """Every combination the row can be played on."""
        return [Place(*each) for each in product(self.brokers, self.stores, self.pools)]

    def full_places(self, contestant: Contestant) -> list[Place]:
        """Those of a full run: prefork everywhere, other pools on two pairs. Stock has no store: once a broker."""
        places = []
        for place in self.places():
            full = (place.broker, place.store) in FULL_PAIRS or self.stores != STORES
            wanted = place.pool == "prefork" or full
            if contestant == "stock":
                wanted = place.store == self.stores[0]
            if wanted:
                places.append(place)
        return places


_rows: dict[int, Row] = {}


def row(number: int, name: str, **options: Any) -> Callable[[Scenario], Scenario]:
    """Declare a row. The docstring of its scenario is the promise; *options* are the fields of `Row`."""

    def declare(scenario: Scenario) -> Scenario:
        hazard = (scenario.__doc__ or "").strip()
        assert hazard, f"row {number} has no docstring"
        _add(Row(number=number, name=name, hazard=hazard, scenario=scenario, module=scenario.__module__, **options))
        return scenario

    return declare


def belongs(number: int, name: str, reason: str) -> None:
    """Declare a row that is shown elsewhere, and why."""
    _add(Row(number=number, name=name, belongs_to=reason))


def _add(new: Row) -> None:
    assert new.number not in _rows, f"row {new.number} is declared twice"
    _rows[new.number] = new


def all_rows() -> list[Row]:
    """Every row, by number."""
    for theme in THEMES:
        name = f"{__package__}.{theme}"
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    return [_rows[number] for number in sorted(_rows)]
