"""One database: its connections, its clock, and what is done when it fails.

Work is a function of a connection that may be run again, because every operation of a store may be repeated. A
deadlock, a lock not given or two inserts of one row have it run again while the timeout lasts. A lost connection has it
run once more on a new one, which is free where nothing fails, unlike a ping at each checkout; not where that was found
so late that the timeout is half over, for a silent server would take it twice. A missing table is created. Every other
error becomes one line with the way out.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, TypeVar, assert_never

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.sql.dml import UpdateBase

from taskguard.clock import Clock, wall_clock
from taskguard.errors import StoreError, StoreUnavailable
from taskguard.stores.sql import migrations
from taskguard.stores.sql.dialect import Dialect, Fault
from taskguard.stores.sql.prompt import Lane, Prompt
from taskguard.stores.sql.schema import metadata

T = TypeVar("T")

OFFSET_LIFE = 60.0
"""Seconds the server's clock is derived from ours before it is asked again."""
OFFSET_TOLERANCE = 0.05
"""Seconds our wall clock may step against the monotonic one, as it does after a sleep, before the server is asked.

Also how exact its answer should be: a round trip of twice as long is asked again.
"""
OFFSET_TRIES = 3
"""Times the server is asked at most for one exact answer; a network that is always slow gives the best of them."""


class Database:
    """Connections to one database. Safe for threads and after a fork, where the child gets its own."""

    _inherited: ClassVar[list[Lane]] = []
    """Those of the parent process: never used, and never freed, because a freed connection would be closed."""

    def __init__(self, dialect: Dialect, *, timeout: float, clock: Clock | None, creates: bool = True) -> None:
        self.dialect = dialect
        self.dialect.creates = creates
        self.timeout = timeout
        self._clock = clock if clock is not None or dialect.now is not None else wall_clock
        self._pid = os.getpid()
        self._lane = self._new_lane()
        self._offset = (0.0, 0.0, 0.0)

    def run(self, work: Callable[[Connection], T], *, transaction: bool = False) -> T:
        """Do *work*, in one transaction or each statement by itself. Raises StoreUnavailable or StoreError."""
        return self._done(lambda: self._attempt(work, transaction))

    def run_prompt(self, prompt: Prompt, values: Callable[[float], Mapping[str, object]]) -> int:
        """Do one statement by itself, with its *values* at the store's instant. Returns how many rows it changed.

        Raises as `run`.
        """

        def attempt() -> int:
            self._leave_inherited()
            with self.dialect.in_use:
                now = self._carried_on()
                if now is None:
                    with self._pool().connect() as connection:
                        now = self.now(connection)
                return prompt.execute(self._lane, values(now))

        return self._done(attempt)

    def prompt(self, statement: UpdateBase) -> Prompt:
        """This statement, made ready for `run_prompt`."""
        return Prompt(statement, self.engine)

    def _done(self, attempt: Callable[[], T]) -> T:
        started, tries, lost, created = time.monotonic(), 0, False, not self.dialect.creates
        if not self.dialect.creates and not self.dialect.is_there():
            raise StoreError(f"store {shown(self.dialect.url)}: there is no such file; check the URL")
        while True:
            try:
                return attempt()
            except SQLAlchemyError as exc:
                fault = self.dialect.diagnose(exc)
                passed = time.monotonic() - started
                match fault:
                    case Fault.BUSY if passed < self.timeout:
                        tries += 1
                        time.sleep(random.uniform(0.0, min(0.002 * 2**tries, 0.2)))
                    case Fault.LOST if not lost and passed <= self.timeout / 2:
                        lost = True
                    case Fault.NO_TABLE if not created:
                        created = True
                        self._create_tables()
                    case Fault.BUSY | Fault.LOST | Fault.MUTE:
                        raise StoreUnavailable(self._explain(fault, exc)) from exc
                    case Fault.NO_TABLE | Fault.BROKEN:
                        raise StoreError(self._explain(fault, exc)) from exc
                    case _:
                        assert_never(fault)

    def now(self, connection: Connection) -> float:
        """The store's instant, epoch seconds: the clock's if there is one, else the server's.

        The server is asked once a minute, and its answer carried on by our monotonic clock: exact to half a round trip,
        and without one. An answer that was long under way, or was read late, is not carried on where a quicker one can
        be had. A wrong instant cannot break custody, which hangs on tokens, only move the end of a lease.
        """
        carried_on = self._carried_on()
        if carried_on is not None:
            return carried_on
        server_minus_monotonic = self._measured_offset(connection)
        now = time.monotonic()
        self._offset = (now, server_minus_monotonic, time.time() - now)
        return now + server_minus_monotonic

    def _carried_on(self) -> float | None:
        """The store's instant, where the server need not be asked for it."""
        if self._clock is not None:
            return self._clock()
        asked_at, server_minus_monotonic, wall_minus_monotonic = self._offset
        now = time.monotonic()
        stepped = abs(time.time() - now - wall_minus_monotonic) > OFFSET_TOLERANCE
        return None if stepped or not asked_at or now - asked_at > OFFSET_LIFE else now + server_minus_monotonic

    def _measured_offset(self, connection: Connection) -> float:
        assert self.dialect.now is not None
        answers: list[tuple[float, float]] = []
        while len(answers) < OFFSET_TRIES:
            asked = time.monotonic()
            server = connection.exec_driver_sql(self.dialect.now).scalar_one() / 1000
            answered = time.monotonic()
            answers.append((answered - asked, server - (asked + answered) / 2))
            if answered - asked <= 2 * OFFSET_TOLERANCE:
                break
        return min(answers)[1]

    @property
    def told_time(self) -> float | None:
        """The instant of the clock that was given, None where the server's own counts."""
        return self._clock() if self._clock is not None else None

    def connect(self) -> Connection:
        """A connection of the caller's own, in autocommit mode, to keep and to close."""
        self._leave_inherited()
        return self._pool().connect()

    def close(self) -> None:
        """Give the connections back; the next call opens new ones."""
        self._leave_inherited()
        with self.dialect.in_use:
            self._pool().dispose()

    @property
    def engine(self) -> Engine:
        """This process's."""
        return self._lane.engine

    def _pool(self) -> Engine:
        """The engine, to be used for what is no prompt statement. Who makes one at a time needs one connection."""
        self._lane.close()
        return self._lane.engine

    def _new_lane(self) -> Lane:
        return Lane(self.dialect.engine(self.timeout), keeps=self.dialect.keeps)

    def _leave_inherited(self) -> None:
        if self._pid != os.getpid():
            self._inherited.append(self._lane)
            self._lane = self._new_lane()
            self._pid = os.getpid()

    def _attempt(self, work: Callable[[Connection], T], transaction: bool) -> T:
        self._leave_inherited()
        with self.dialect.in_use, self._pool().connect() as connection:
            try:
                if not transaction:
                    return work(connection)
                with self._transaction(connection):
                    return work(connection)
            except SQLAlchemyError:
                raise
            except BaseException:
                # A soft time limit, say, in the middle of an answer: what comes next on this connection is not ours.
                connection.invalidate()
                raise

    @contextmanager
    def _transaction(self, connection: Connection) -> Iterator[None]:
        for statement in self.dialect.begin:
            connection.exec_driver_sql(statement)
        try:
            yield
            for statement in self.dialect.commit:
                connection.exec_driver_sql(statement)
        except SQLAlchemyError:
            try:
                if not connection.invalidated:
                    connection.exec_driver_sql("ROLLBACK")
            except SQLAlchemyError:
                connection.invalidate()
            raise

    def _create_tables(self) -> None:
        """Create what is missing. Whoever loses a race against another process finds that table there the next time."""
        for tries_left in reversed(range(len(metadata.tables) + 4)):  # MySQL may lose the race for each table anew
            try:
                with self.dialect.in_use, self._pool().connect() as connection, self._transaction(connection):
                    migrations.upgrade(connection)
                return
            except DBAPIError as exc:
                if not tries_left:
                    raise StoreError(self._explain(Fault.NO_TABLE, exc)) from exc

    def _explain(self, fault: Fault, exc: SQLAlchemyError) -> str:
        cause = exc.orig if isinstance(exc, DBAPIError) and exc.orig is not None else exc
        text = " ".join(str(cause.args[-1] if cause.args else cause).split())[:300].rstrip(".") or type(cause).__name__
        if self.dialect.url.password:
            text = text.replace(str(self.dialect.url.password), "***")
        match fault:
            case Fault.BUSY:
                way_out = f"other transactions held the rows for {self.timeout:g} s; try again"
            case Fault.NO_TABLE if not self.dialect.creates:
                way_out = (
                    "no taskguard of this version has used this database; check the URL, or run taskguard schema create"
                )
            case Fault.NO_TABLE:
                way_out = "let this user create tables, or have them created: taskguard schema create"
            case _:
                way_out = self.dialect.advice()
        return f"store {shown(self.dialect.url)}: {text}; {way_out}"


def shown(url: URL) -> str:
    """The URL for people: without the password, and without the query, which may hold another."""
    return url.set(query={}).render_as_string(hide_password=True)
