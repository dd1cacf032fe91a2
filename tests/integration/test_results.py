"""Celery's result written with the store's completion: the same bytes as Celery's own, without its round trips.

Store and result backend are on one Redis server of the tests' own, whose every command is watched.
"""

from __future__ import annotations

import gc
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from celery import chain, chord, group
from celery.result import AsyncResult
from redis import Redis

from tests import services
from tests.integration import resultapp
from tests.integration.servers import PrivateRedis
from tests.integration.site import PATIENCE, Site

IDS = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Variant:
    """How results are kept. *expires* is what a stored one then has left, in seconds; -1 is for ever."""

    conf: dict[str, Any]
    database: int
    expires: int


VARIANTS = {
    "as Celery does by default": Variant({}, 0, 86400),
    "extended, for ever, prefixed, in another database": Variant(
        {
            "result_extended": True,
            "result_expires": 0,
            "result_backend_transport_options": {"global_keyprefix": "shop:"},
        },
        3,
        -1,
    ),
    "pickled, compressed, without an expiry": Variant(
        {
            "result_serializer": "pickle",
            "result_accept_content": ["pickle", "json"],
            "result_compression": "zlib",
            "result_expires": None,
        },
        0,
        -1,
    ),
}


class Office(Site):
    """A site whose results are on the server of its store."""

    program = resultapp.__name__
    _make_app = staticmethod(resultapp.make_app)
    variant: Variant
    results: Redis

    def kind(self, name: str) -> SimpleNamespace:
        """The plain tasks, or the reliable ones."""
        prefix = f"{name}."
        return SimpleNamespace(**{n.removeprefix(prefix): t for n, t in self.app.tasks.items() if n.startswith(prefix)})

    def key(self, result: AsyncResult) -> bytes:
        """Where a result is."""
        key: bytes | str = self.app.backend.get_key_for_task(result.id)
        return key.encode() if isinstance(key, str) else key

    def rest(self) -> None:
        """See everything done that was sent before, by the one child that the worker has."""
        for kind in resultapp.KINDS:
            last = self.kind(kind).echo.delay("last")
            self.wait_state(last, "SUCCESS")
        self.wait_settled()


@pytest.fixture(
    scope="module",
    params=[pytest.param(v, id=name, marks=pytest.mark.xdist_group(name)) for name, v in VARIANTS.items()],
)
def office(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    """One worker with one child; its store and its results on one server."""
    variant: Variant = request.param
    namespace = f"t{uuid.uuid4().hex[:16]}"
    directory = tmp_path_factory.mktemp("office")
    shared = services.require("redis")
    with ExitStack() as stack:
        server = stack.enter_context(PrivateRedis(directory / "redis", "--appendonly", "no"))
        stack.callback(services.delete_redis_keys, shared, f"*{namespace}*")
        backend = server.url.removesuffix("/0") + f"/{variant.database}"
        office = Office(
            broker=shared,
            store=server.url,
            journal=shared,
            namespace=namespace,
            directory=directory,
            lease=600.0,  # a renewal in the middle of a run would be a call to the store too
            TEST_BACKEND=backend,
            TEST_CONF=json.dumps(variant.conf),
        )
        stack.callback(office.close)
        office.variant = variant
        office.results = stack.enter_context(Redis.from_url(backend))
        office.start_worker(concurrency=1)
        yield office
        # Results unsubscribe when they go, which must not be after their server.
        for pending in list(office.app.backend._pending_results.concrete.values()):
            for result in list(pending.values()) if isinstance(pending, dict) else [pending]:
                office.app.backend.remove_pending_result(result)
            del pending
        gc.collect()


@contextmanager
def watched(client: Redis) -> Iterator[list[dict[str, Any]]]:
    """Every command the server is told in the block, those of its scripts too; complete when the block is over."""
    commands: list[dict[str, Any]] = []
    begun, end = threading.Event(), uuid.uuid4().hex

    def listen() -> None:
        with client.monitor() as monitor:
            begun.set()
            for command in monitor.listen():
                if end in command["command"]:
                    return
                commands.append(command)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    assert begun.wait(PATIENCE)
    yield commands
    client.echo(end)
    listener.join(PATIENCE)
    assert not listener.is_alive()


Scene = Callable[[SimpleNamespace], list[AsyncResult]]

SCENES: dict[str, Scene] = {
    "values": lambda t: [t.echo.delay(v) for v in (None, 0, 1.5, "für Björn", [1, {"a": [None]}], {"b": "c"})],
    "arguments": lambda t: [t.echo.apply_async((1,), {"label": "x"})],
    "subtasks": lambda t: [t.parent.delay()],
    "nothing that can be serialised": lambda t: [t.opaque.delay()],
    "group": lambda t: list(group(t.add.s(n, n) for n in range(3)).apply_async().results),
    "chord": lambda t: _chord(chord([t.add.s(n, n) for n in range(3)])(t.total.s())),
    "chain": lambda t: _chain(chain(t.add.s(1, 2), t.add.s(3), t.add.s(4)).apply_async()),
    "group into chain": lambda t: _chord(chain(group(t.add.s(1, 2), t.add.s(3, 4)), t.total.s()).apply_async()),
    "link": lambda t: [t.add.apply_async((1, 2), link=t.add.s(5))],
    "link of a failure": lambda t: [t.add.apply_async((1, 2), link_error=t.echo.si("error"))],
    "retry": lambda t: [t.again.delay()],
    "replacement": lambda t: [t.delegate.delay()],
    "failure": lambda t: [t.broken.delay()],
    "stamps": lambda t: [t.add.si(1, 2).stamp(order="7").apply_async()],
    "wanted after all": lambda t: [t.quiet.apply_async((1,), ignore_result=False)],
}


def _chain(last: AsyncResult) -> list[AsyncResult]:
    return [last.parent.parent, last.parent, last]


def _chord(body: AsyncResult) -> list[AsyncResult]:
    return [*body.parent.results, body]


def stored(office: Office, results: list[AsyncResult]) -> list[dict[str, Any]]:
    """What the backend keeps for these tasks, without what must differ: instants, frames, ids, kinds."""
    names: dict[str, str] = {}

    def comparable(value: Any) -> Any:
        match value:
            case dict():
                own = {"date_done": "<instant>", "traceback": bool(value.get("traceback"))}
                return {name: own[name] if name in own else comparable(each) for name, each in value.items()}
            case list() | tuple():
                return [comparable(each) for each in value]
            case str():
                value = re.sub("^(plain|reliable)[.]", "", value)
                return IDS.sub(lambda id: names.setdefault(id[0], f"<id {len(names)}>"), value)
            case BaseException():
                return repr(value)
            case _:
                return value

    metas = []
    for result in results:
        key = office.key(result)
        assert office.results.ttl(key) in range(office.variant.expires - 120, office.variant.expires + 1)
        payload = office.results.get(key)
        assert payload is not None
        metas.append(comparable(office.app.backend.decode(payload)))
    return metas


@pytest.mark.parametrize("scene", SCENES)
def test_what_is_stored_is_what_celery_stores(office: Office, scene: str) -> None:
    """Field for field, with the same expiry, in the same place."""
    found = {}
    for kind in resultapp.KINDS:
        results = SCENES[scene](office.kind(kind))
        for result in results:
            office.wait(result.ready, f"{result.id} of {kind} ready")
        office.rest()
        found[kind] = stored(office, results)
    assert found["reliable"] == found["plain"]


@pytest.mark.parametrize(
    "send", [lambda t: t.quiet.delay(1), lambda t: t.echo.apply_async((1,), ignore_result=True)], ids=["task", "call"]
)
@pytest.mark.parametrize("kind", resultapp.KINDS)
def test_a_result_that_is_ignored_is_stored_by_nobody(
    office: Office, kind: str, send: Callable[[SimpleNamespace], AsyncResult]
) -> None:
    """Whether the task declares it or the call asks for it."""
    result = send(office.kind(kind))
    office.rest()
    assert not office.results.exists(office.key(result))


def told(commands: list[dict[str, Any]], key: bytes) -> list[tuple[str, str]]:
    """Who told the server what about this key, such as ("lua", "SETEX"); who waits for it, apart."""
    words = [(command["client_type"], *command["command"].split(" ", 2)) for command in list(commands)]
    about = [(who, name.upper()) for who, name, *rest in words if rest[:1] == [key.decode()]]
    return [(who, name) for who, name in about if not name.endswith("SUBSCRIBE")]


def test_nobody_writes_the_result_but_the_completing_script(office: Office) -> None:
    """One write and one message on its channel; the plain task beside it shows what Celery does, and is seen to."""
    results = {}
    with watched(office.results) as commands:
        for kind in resultapp.KINDS:
            results[kind] = office.kind(kind).add.delay(1, 2)
        office.rest()
    plain, reliable = (told(commands, office.key(results[kind])) for kind in resultapp.KINDS)
    write = "SETEX" if office.variant.expires > 0 else "SET"
    assert plain == [("tcp", "GET"), ("tcp", write), ("tcp", "PUBLISH")]
    assert reliable == [("lua", write), ("lua", "PUBLISH")]


def test_a_whole_run_costs_the_store_two_calls(office: Office) -> None:
    """The claim and the completion, which brings the result with it."""
    task = office.kind("reliable").add
    with watched(office.results) as commands:
        result = task.delay(1, 2)
        office.rest()
    calls = [c["command"] for c in commands if c["client_type"] == "tcp" and result.id in c["command"]]
    assert [c.split()[0] for c in calls if not c.startswith("SUBSCRIBE")] == ["EVALSHA", "EVALSHA"], calls


@pytest.mark.parametrize("kind", resultapp.KINDS)
def test_who_waits_is_woken_by_the_message(office: Office, kind: str) -> None:
    """``get`` asks once, subscribes, and is told; it never looks again."""
    gate = uuid.uuid4().hex
    result = office.kind(kind).held.delay(gate)
    key, got = office.key(result), list[Any]()
    with watched(office.results) as commands:
        waiting = threading.Thread(target=lambda: got.append(result.get(timeout=PATIENCE)), daemon=True)
        waiting.start()
        office.wait(lambda: ("tcp", "GET") in told(commands, key), "the first look")
        office.wait(lambda: dict(office.results.pubsub_numsub(key))[key], "the subscription")
        office.journal.open(gate)
        waiting.join(PATIENCE)
    assert got == [gate]
    looks = told(commands, key).count(("tcp", "GET"))
    assert looks == (1 if kind == "reliable" else 2), "Celery's worker looks before it writes"
