"""The transaction of one run: what its body writes, what it sends, and its completion, committed together.

The fence is the completion itself: an update of the run's row, by its token, as the last statement before the commit.
It locks the row, and where the token is stale it changes nothing and all is rolled back. Rejected: locking the row when
the transaction begins. The heartbeat would wait behind user code, and with it every other run of the worker.

A commit whose reply was lost is asked for under the row's lock, which waits until the server has ended the transaction.

What is undone stays undone: the end of a run may be repeated, and a transaction that began again would complete the run
without what its body wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from taskguard import lifecycle
from taskguard.errors import ConfigurationError
from taskguard.record import Record, State
from taskguard.stores.records import Unit
from taskguard.stores.sql.dialect import Dialect

if TYPE_CHECKING:
    from taskguard.stores.sql.messages import SQLStore

Step = Callable[[Record, float], Record]


@dataclass(frozen=True, slots=True)
class End:
    """How the run's record ends: a step of `lifecycle`. *result*: of a completion, which has a statement of its own."""

    step: Step
    retention: float
    result: bytes | None = None

    @classmethod
    def completed(cls, result: bytes, retention: float) -> Self:
        """With a result."""

        def step(record: Record, now: float) -> Record:
            return lifecycle.complete(record, result=result, retention=retention, now=now)

        return cls(step, retention, result)

    @classmethod
    def discarded(cls, reason: str, retention: float) -> Self:
        """Without one."""

        def step(record: Record, now: float) -> Record:
            return lifecycle.discard(record, reason=reason, retention=retention, now=now)

        return cls(step, retention)


def engine_for_runs(dialect: Dialect, timeout: float) -> Engine:
    """Connections for the bodies of runs: each statement takes as long as it takes, and what is committed is seen.

    As many as there are runs at once in the process. Under SQLite a session takes the one writer's place when it
    begins: a transaction that had read first could not write any more after anybody else had.
    """
    options: dict[str, Any] = {"max_overflow": -1, "pool_pre_ping": True, "isolation_level": "READ COMMITTED"}
    kind = dialect.url.get_backend_name()
    match kind:
        case "postgresql":
            options["connect_args"] = {"connect_timeout": max(2, round(timeout)), "application_name": "taskguard-run"}
            options["use_native_hstore"] = False
        case "mysql":
            options["connect_args"] = {"connect_timeout": timeout}
        case _:
            options = {"max_overflow": -1, "connect_args": {"timeout": timeout}}
    engine = create_engine(dialect.url, **options)
    if kind == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    event.listen(engine, "handle_error", _leave_interrupted)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver would begin on its own, and too late
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _leave_interrupted(context: Any) -> None:
    """A soft time limit, say, in the middle of an answer: what comes next on this connection is not ours."""
    driver = context.dialect.loaded_dbapi.Error
    if not isinstance(context.original_exception, driver):
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False


class RunTransaction:
    """One run's. *opened* makes its session, *checked* refuses one that is of another database."""

    def __init__(
        self, store: SQLStore, id: str, token: int, *, opened: Callable[[], Session], checked: Callable[[Session], None]
    ) -> None:
        self._store = store
        self._id = id
        self._token = token
        self._open = opened
        self._check = checked
        self._session: Session | None = None
        self._committing = False
        self._closed = False
        self._unsure: BaseException | None = None
        self._undone: BaseException | None = None
        self._answer: bool | None = None

    @property
    def begun(self) -> bool:
        """Whether there is anything to commit."""
        return self._session is not None

    @property
    def session(self) -> Session:
        """The session, which begins when it is first asked for."""
        if self._session is None:
            session = self._open()
            if not isinstance(session, Session):
                raise ConfigurationError(
                    f"session_factory: it made a {type(session).__name__}; give a sessionmaker of SQLAlchemy"
                )
            try:
                self._check(session)
            except BaseException:
                session.close()
                raise
            event.listen(session, "before_commit", self._refuse_commit)
            event.listen(session, "after_transaction_end", self._note_end)
            event.listen(session, "after_rollback", self._note_rollback)
            self._session = session
        return self._session

    def commit(self, end: End) -> bool:
        """End the run's record by *end* and commit. False: custody was lost, and nothing of it remains.

        Raises what the database raises, and nothing remains: repeated, it raises the same. StoreUnavailable where the
        reply of the commit was lost and the store does not say what came of it: call it again then.
        """
        if self._undone is not None:
            raise self._undone
        if self._unsure is not None:
            return self._asked(end, self._unsure)
        if self._answer is not None:  # whoever was to hear it was interrupted
            return self._answer
        session = self._session
        if session is None:
            raise RuntimeError("a run's transaction that has not begun has nothing to commit")
        try:
            if self._closed:
                raise ConfigurationError(
                    "self.session: the body has closed it, which undid what it wrote; leave that to the end of the run"
                )
            session.flush()
            if not self._store.end_in(session.connection(), self._id, self._token, end):
                self._answer = False
                self.undo()
                return False
            self._committing = True
            session.commit()
            self._answer = True
        except BaseException as exc:
            if not self._committing:
                self._undone = exc
                self.undo(broken=not isinstance(exc, SQLAlchemyError))
                raise
            self._unsure = exc
            self.undo(broken=True)
            return self._asked(end, exc)
        self._release()
        return True

    def _asked(self, end: End, failure: BaseException) -> bool:
        record, expected = self._store.seen(self._id, end)
        if record is not None and expected is not None and record.token == self._token:
            if record.state is expected:
                return True
            if lifecycle.owned(record, self._token):
                raise failure
        return False

    def undo(self, *, broken: bool = False) -> None:
        """Leave nothing of it. *broken*: its connection may be in the middle of an answer."""
        session = self._session
        if session is None:
            return
        if broken:
            with suppress(SQLAlchemyError):
                session.invalidate()
        else:
            try:
                session.rollback()
            except SQLAlchemyError:
                session.invalidate()
        self._release()

    def _release(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            event.remove(session, "before_commit", self._refuse_commit)
            event.remove(session, "after_transaction_end", self._note_end)
            event.remove(session, "after_rollback", self._note_rollback)
            with suppress(SQLAlchemyError):
                session.close()

    def _refuse_commit(self, session: Session) -> None:
        if not self._committing and not session.in_nested_transaction():  # a savepoint's end is not the transaction's
            raise ConfigurationError(
                "self.session: it is committed with the completion when the run ends, and not before; leave out "
                "commit() and `with self.session.begin()`, or use begin_nested() for a savepoint"
            )

    def _note_rollback(self, session: Session) -> None:
        if not session.in_nested_transaction():
            session.info["taskguard_rolled_back"] = True  # the body's own wish

    def _note_end(self, session: Session, transaction: Any) -> None:
        if transaction.parent is None and not self._committing:
            self._closed = not session.info.pop("taskguard_rolled_back", False)


def factory_of(engine: Engine) -> Callable[[], Session]:
    """Sessions on *engine* that keep what they loaded when the run is committed, for its result."""
    return sessionmaker(engine, expire_on_commit=False)


def ended(unit: Unit, id: str, token: int, end: End) -> bool:
    """In a unit of work: the record ends, if *token* holds it."""
    unit.lock([id])
    record = unit.get(id)
    if record is None or not lifecycle.owned(record, token):
        return False
    settled = end.step(record, unit.now)
    unit.put(settled)
    if settled.state in lifecycle.TERMINAL:
        unit.wake(id)
    return True


def seen(unit: Unit, id: str, end: End) -> tuple[Record | None, State | None]:
    """The record when whoever had locked it is done, and the state that *end* would have given it."""
    record = unit.get(id)
    return record, None if record is None else end.step(record, unit.now).state
