"""Crash points: every operation of every port, and the instant before and after it.

The lists are read from the code. A run's: the protocols of `taskguard.ports`, the message a broker hands out, and what
Celery does at the end of a run. An operation on many (``claim_many``) is the same point as the operation on one. A
relay's, of the outbox: the protocols of `taskguard.handover`, and what stands behind them. A transactional run's: its
transaction, and what that does in the database.

`install` wraps the operations in a process that has ``TEST_CRASH_POINTS`` set, to its role. A test arms a point in
Redis for the messages it means; the process that gets there first, child, parent or relay, disarms it, writes "fired"
to the journal and kills itself. The second time the operation passes.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple

import kombu
from billiard.process import current_process
from celery import Celery
from kombu.message import Message
from redis import Redis

from taskguard import handover, ports
from taskguard.celery.broker import BrokerPublisher
from taskguard.errors import StoreUnavailable
from taskguard.permits import Ask, CircuitAsk, RateAsk, Slot, SlotAsk
from tests.integration.journal import Journal

ENABLED = "TEST_CRASH_POINTS"
BATCH = "_many"
DEPTH = 4
"""How deep in the arguments of an operation a message is looked for."""

Side = Literal["before", "after"]
Action = Literal["die", "die each", "fall", "refuse", "refuse each"]
"""Die once; in a pool's children once for each message; take the whole worker along; have the store refuse, once or
until it is disarmed."""


class Point(NamedTuple):
    """An instant at which a process may die."""

    operation: str
    side: Side

    def __str__(self) -> str:
        return f"{self.side} {self.operation}"


def operations() -> dict[str, list[str]]:
    """The operations a run depends on, by who offers them."""
    found = {name: _public(port) for name, port in _classes(ports).items()}
    found["Message"] = _public(Message)
    found["Producer"] = ["publish"]
    found["Backend"] = ["store_result", "on_chord_part_return"]
    return found


def points() -> list[Point]:
    """Every point, once."""
    names = {f"{owner}.{name.removesuffix(BATCH)}": None for owner, several in operations().items() for name in several}
    return [Point(name, side) for name in names for side in ("before", "after")]


def relay_steps() -> dict[str, tuple[Any, str]]:
    """What a relay does with the rows of an outbox, and where each step is made."""
    from taskguard.celery import confirming, dispatching
    from taskguard.relay import Relay
    from taskguard.stores.sql import handing
    from taskguard.stores.sql.outbox import SQLOutbox

    behind = {"Relay": Relay, "handing": handing, "dispatching": dispatching}
    behind |= _classes(dispatching) | _classes(confirming)
    made = {**behind, "Outbox": SQLOutbox, "Dispatcher": BrokerPublisher}
    read = {**behind, **{name: each for name, each in _classes(handover).items() if _is_protocol(each)}}
    return {f"{owner}.{name}": (made.get(owner), name) for owner, kind in read.items() for name in _public(kind)}


def transaction_steps() -> dict[str, tuple[Any, str]]:
    """What the transaction of a run does, and where; with what it calls of a session, and what no port names."""
    from sqlalchemy.orm import Session

    from taskguard.celery import effects, transactional
    from taskguard.outbox.transactions import SessionTransaction, Transaction
    from taskguard.stores.sql import SQLStore
    from taskguard.stores.sql.transactional import RunTransaction

    bodies = [getattr(each, "fget", each) for each in vars(RunTransaction).values()]
    called = {name for body in bodies if inspect.isfunction(body) for name in body.__code__.co_names}
    told = [*_public(effects), *_classes(effects)]
    found = {
        "Transaction": (SessionTransaction, _public(Transaction)),
        "RunTransaction": (RunTransaction, _public(RunTransaction, or_is=property)),
        "SQLStore": (SQLStore, [name for name in _public(SQLStore) if not hasattr(ports.MessageStore, name)]),
        "Session": (Session, [name for name in _public(Session) if name in called]),
        "effects": (transactional, [name for name in told if hasattr(transactional, name)]),
    }
    return {f"{owner}.{name}": (made, name) for owner, (made, names) in found.items() for name in names}


def overlooked(found: Iterable[str], played: Iterable[str], spared: Iterable[str]) -> set[str]:
    """The operations that are neither played nor spared, or both, or that there are not."""
    met = [*set(played), *set(spared)]
    return set(found).symmetric_difference(met) | {name for name in met if met.count(name) > 1}


def _classes(module: ModuleType) -> dict[str, type]:
    """The public classes that *module* defines."""
    return {
        name: each
        for name, each in vars(module).items()
        if isinstance(each, type) and each.__module__ == module.__name__ and not name.startswith("_")
    }


def _is_protocol(kind: type) -> bool:
    return bool(getattr(kind, "_is_protocol", False))


def _public(owner: type | ModuleType, *, or_is: type | None = None) -> list[str]:
    """The functions of a class, or those that a module defines; and what else is of the type *or_is*."""
    return [
        name
        for name, each in inspect.getmembers(owner)
        if not name.startswith("_")
        and (inspect.isfunction(each) or (or_is is not None and isinstance(each, or_is)))
        and (isinstance(owner, type) or each.__module__ == owner.__name__)
    ]


def install(app: Celery, environ: Mapping[str, str], journal: Journal) -> None:
    """Wrap every operation as it is implemented for *app*. Does nothing where crash points are not enabled."""
    if ENABLED not in environ:
        return
    armoury = Armoury(environ["TEST_JOURNAL"], environ["TASKGUARD_NAMESPACE"], environ[ENABLED])
    implementations = {
        "MessageStore": type(app.taskguard.store),
        "PermitStore": type(app.taskguard.permits),
        "Publisher": BrokerPublisher,
        "Message": Message,
        "Producer": kombu.Producer,
        "Backend": type(app.backend),
    }
    for owner, kind in implementations.items():
        for name in operations()[owner]:
            point = f"{owner}.{name.removesuffix(BATCH)}"
            setattr(kind, name, wrapped(getattr(kind, name), point, armoury, journal))
    joint = app.taskguard.joined_with(app.taskguard.permits)
    if joint is not None:  # one step, and both operations
        both = wrapped(type(joint).claim, "MessageStore.claim", armoury, journal)
        type(joint).claim = wrapped(both, "PermitStore.admit", armoury, journal)
    app.taskguard.store.close()
    app.taskguard.permits.close()


def install_steps(steps: Mapping[str, tuple[Any, str]], environ: Mapping[str, str], journal: Journal) -> None:
    """As `install`, for *steps*: of `transaction_steps`, say."""
    if ENABLED not in environ:
        return
    armoury = Armoury(environ["TEST_JOURNAL"], environ["TASKGUARD_NAMESPACE"], environ[ENABLED])
    for point, (made, name) in steps.items():
        was = inspect.getattr_static(made, name)
        if isinstance(was, property):
            assert was.fget is not None
            setattr(made, name, property(wrapped(was.fget, point, armoury, journal)))
        else:
            setattr(made, name, wrapped(was, point, armoury, journal))


def wrapped(operation: Callable[..., Any], name: str, armoury: Armoury, journal: Journal) -> Callable[..., Any]:
    """*operation*, at which a process may die when *armoury* has it armed under *name*."""
    owner = name.partition(".")[0]

    def reached(side: Side, *what: Any) -> None:
        action = armoury.fires(Point(name, side), what)
        if action not in (None, "refuse each"):
            journal.write("fired", name=str(Point(name, side)), detail=action)
        if action in ("die", "die each", "fall"):
            os.kill(-os.getpgrp() if action == "fall" else os.getpid(), signal.SIGKILL)
            time.sleep(60)  # the signal may take an instant: nothing more must happen here
        if action in ("refuse", "refuse each"):
            raise StoreUnavailable(f"the test refuses {name}")

    def read(pages: Iterator[Any]) -> Iterator[Any]:
        yield from pages
        reached("after")

    @functools.wraps(operation)
    def call(*args: Any, **kwargs: Any) -> Any:
        subject = _subject(owner, args, kwargs)
        reached("before", *subject)
        answer = operation(*args, **kwargs)
        if inspect.isgenerator(answer):
            return read(answer)
        reached("after", *subject, answer)
        return answer

    return call


def _subject(owner: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
    """What of a call says which message it is about. A message's body may name those that follow it.

    Permits are asked for without a word of the message: there it is the names of limits, places and circuits.
    """
    match owner:
        case "PermitStore":
            return _permit_names([*args[1:], *kwargs.values()])
        case "Message":
            return [args[0].headers]
        case "Producer":
            return [kwargs.get("headers")]
        case "Backend":
            return [*args[1:2], kwargs.get("task_id")]
        case _:
            return [*args[1:], *kwargs.values()]


def _permit_names(args: Iterable[Any]) -> list[str]:
    names: list[str] = []
    for each in args:
        match each:
            case str():
                names.append(each)
            case Ask():
                names += _permit_names([*each.rates, each.slot, each.circuit])
            case list() | tuple():
                names += _permit_names(each)
            case RateAsk() | SlotAsk() | CircuitAsk() | Slot():
                names.append(each.name)
    return names


class Armoury:
    """The armed points, in Redis, so that whoever fires one has disarmed it."""

    def __init__(self, url: str, namespace: str, role: str = "") -> None:
        self._role = role
        self._redis = Redis.from_url(url, decode_responses=True)
        self._key = f"{namespace}:armed"

    def arm(self, point: Point, ids: Iterable[str] = (), *, action: Action = "die", role: str = "") -> None:
        """Fire at *point*, once: when a message with one of *ids* passes it, or any where none is given.

        At a point of the permits *ids* are names of limits, places and circuits.
        """
        self._redis.hset(self._key, str(point), json.dumps({"ids": list(ids), "action": action, "role": role}))

    def armed(self) -> list[str]:
        """The points that have not fired yet."""
        return self._redis.hkeys(self._key)

    def disarm(self, point: Point) -> None:
        """Fire at *point* no more."""
        self._redis.hdel(self._key, str(point))

    def clear(self) -> None:
        """Disarm all."""
        self._redis.delete(self._key)

    def fires(self, point: Point, what: Sequence[Any]) -> Action | None:
        """What to do at *point* for *what*; None: go on."""
        plan = self._redis.hget(self._key, str(point))
        if plan is None:
            return None
        wanted: dict[str, Any] = json.loads(plan)
        if wanted["role"] not in ("", self._role):
            return None
        if wanted["ids"] and not mentions(what, wanted["ids"]):
            return None
        action: Action = wanted["action"]
        if action == "refuse each":
            return action
        if action == "die each":
            if current_process().name == "MainProcess":
                return None
            first = self._redis.sadd(f"{self._key}:each", f"{point} {_name(what)}")
        else:
            first = self._redis.hdel(self._key, str(point))
        return action if first else None  # another process was faster

    def close(self) -> None:
        """Give the connections back."""
        self._redis.close()


def _name(what: Sequence[Any]) -> str:
    """The message that a call is about, by the first name in it."""
    for each in what:
        match each:
            case str():
                return each
            case Mapping():
                return str(each.get("id"))
        if isinstance(named := getattr(each, "id", None), str):
            return named
    return ""


def mentions(what: object, ids: Sequence[str], depth: int = DEPTH) -> bool:
    """Whether one of *ids* is in *what*: a string, bytes, a container, an object of ours or of Celery's."""
    match what:
        case None | int() | float():
            return False
        case str():
            return what in ids
        case bytes():
            return any(each.encode() in what for each in ids)
        case Mapping():
            return any(mentions(each, ids, depth - 1) for each in what.values()) if depth else False
        case list() | tuple() | set() | frozenset():
            return any(mentions(each, ids, depth - 1) for each in what) if depth else False
    if not depth:
        return False
    named = (getattr(what, name, None) for name in ("id", "task_id", "wire", "hold", "holds", "envelope"))
    return any(mentions(each, ids, depth - 1) for each in named)
