"""The house: opens a stage, lets rows of the same setup share it, and leaves nothing on the servers."""

from __future__ import annotations

import json
import uuid
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from tests import services
from tests.integration.servers import PrivateRedis
from tests.proof.outcome import Outcome
from tests.proof.rabbitmq import PrivateRabbitMQ
from tests.proof.rows import Contestant, Place, Row
from tests.proof.stage import Stage


class House:
    """One a process. Rows of the same setup on the same place share a stage, and with it the workers that live.

    They are played one after the other: a stage is closed when a row needs another, for its workers hold connections.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self._open: tuple[str, Stage, ExitStack] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()
        self._stack.close()

    def play(self, row: Row, contestant: Contestant, place: Place) -> Outcome:
        """Play *row*. A scenario that fails raises, and its stage is not used again."""
        assert row.scenario is not None
        if row.alone or row.private or contestant == "stock":
            with ExitStack() as stack:
                return self._act(self._make(stack, row, contestant, place))
        stage = self._shared(row, contestant, place)
        stage.row = row
        try:
            return self._act(stage)
        except BaseException:
            self._close()
            raise

    def _shared(self, row: Row, contestant: Contestant, place: Place) -> Stage:
        key = stage_key(row, place)
        if self._open is not None and self._open[0] == key:
            return self._open[1]
        self._close()
        with ExitStack() as stack:
            stage = self._make(stack, row, contestant, place)
            self._open = key, stage, stack.pop_all()
        return stage

    def _act(self, stage: Stage) -> Outcome:
        stage.faults.clear()
        assert stage.row.scenario is not None
        outcome = stage.row.scenario(stage)
        assert stage.faults, f"row {stage.row.number} never asserted that its fault fired"
        return outcome

    def _close(self) -> None:
        shut, self._open = self._open, None
        if shut is not None:
            shut[2].close()

    @cached_property
    def _rabbitmq(self) -> str:
        """A virtual host of this process."""
        url = services.require("rabbitmq")
        return self._stack.enter_context(services.rabbitmq_vhost(url, f"t{uuid.uuid4().hex[:16]}"))

    def _make(self, stack: ExitStack, row: Row, contestant: Contestant, place: Place) -> Stage:
        namespace = f"t{uuid.uuid4().hex[:16]}"
        directory = self._directory / namespace
        directory.mkdir(parents=True)
        shared = services.require("redis")
        stack.callback(services.delete_redis_keys, shared, f"*{namespace}*")
        servers: dict[str, Any] = {}
        for name in row.private:
            server = (
                PrivateRabbitMQ(directory / name, **row.rabbitmq_settings)
                if name == "broker" and place.broker == "rabbitmq"
                else PrivateRedis(directory / name, *row.redis_options)
            )
            servers[name] = stack.enter_context(server)
        if "broker" in servers:
            broker = servers["broker"].url
        elif place.broker == "redis":
            broker = shared
        elif row.alone:
            broker = stack.enter_context(services.rabbitmq_vhost(services.require("rabbitmq"), namespace))
        else:
            broker = self._rabbitmq
            stack.callback(services.delete_queue, broker, f"{namespace}.tasks")
        if "store" in servers:
            store = servers["store"].url
        elif place.store == "sqlite":
            store = f"sqlite:///{directory / 'taskguard.sqlite3'}"
        else:
            store = services.require(place.store)
            if place.store != "redis":
                stack.callback(services.delete_rows, store, namespace)
        stage = Stage(
            row,
            contestant,
            place,
            servers=servers,
            backend=servers["backend"].url if "backend" in servers else shared,
            broker=broker,
            store=store,
            journal=shared,
            namespace=namespace,
            directory=directory,
        )
        stack.callback(stage.close)
        return stage


def stage_key(row: Row, place: Place) -> str:
    """Equal for rows whose taskguard may share a stage there."""
    setup = row.setup("taskguard")
    told = [setup.options, setup.conf, setup.transport, setup.queue, setup.env, row.concurrency, row.lease]
    return f"{place} {json.dumps([dict(each) if hasattr(each, 'keys') else each for each in told], sort_keys=True)}"
