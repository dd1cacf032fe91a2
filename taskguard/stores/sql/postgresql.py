"""A psycopg connection that gives up on a server which keeps the connection and never answers."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from functools import partial
from threading import Thread
from time import monotonic
from typing import Any, Self, TypeVar

import psycopg

T = TypeVar("T")

SHORTEST = 2.0
"""Seconds: libpq waits no shorter for a connection, whatever ``connect_timeout`` says."""


class BoundedConnection(psycopg.Connection[Any]):
    """Every wait for the server ends after ``patience`` seconds, with an OperationalError and the connection closed.

    ``statement_timeout`` is the server's and does not help when the server hangs, or a network in between swallows the
    answer; ``tcp_user_timeout`` does not help when the machine lives and the process does not.
    """

    patience = 5.0

    @classmethod
    def connect(cls, conninfo: str = "", **options: Any) -> Self:
        """Connect within ``tcp_user_timeout`` milliseconds, also where that is less than libpq's shortest wait.

        The attempt is then made in a thread, which is left alone when the time is over and closes what it gets.
        """
        connect = partial(super().connect, conninfo, **options)
        patience = int(options.get("tcp_user_timeout", SHORTEST * 1000)) / 1000
        if patience >= SHORTEST:
            return connect()
        attempt: Future[Self] = Future()
        Thread(target=_try, args=(attempt, connect), name="taskguard-connect", daemon=True).start()
        try:
            finished = wait_for([attempt], patience).done
        except BaseException:
            attempt.add_done_callback(_close)
            raise
        if not finished:
            attempt.add_done_callback(_close)
            raise psycopg.OperationalError(f"no connection in {patience:g} s")
        return attempt.result()

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **kwargs: Any) -> T:
        return super().wait(self._bounded(gen), *args, **kwargs)

    def _bounded(self, gen: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        give_up_at = monotonic() + self.patience
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and monotonic() > give_up_at:
                    gen.close()
                    self.close()
                    raise psycopg.OperationalError(f"no answer in {self.patience:g} s")
                wanted = gen.send(ready)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]


def _try(attempt: Future[Any], connect: Callable[[], Any]) -> None:
    try:
        attempt.set_result(connect())
    except BaseException as exc:  # noqa: BLE001 (raised again by whoever waits for it)
        attempt.set_exception(exc)


def _close(attempt: Future[Any]) -> None:
    if attempt.exception() is None:
        attempt.result().close()
