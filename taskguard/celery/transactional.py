"""Transactional tasks: a run's effects in the database, the tasks it sends and its completion, all or none of them.

What joins: everything written through ``self.session``, and every task that the body sends, whichever way. What Celery
sends after the body (links, the next step of a chain, a chord's body) is sent after the commit; their ids are fixed
before, and the run's completion is known, so that a crash in between sends them again and the claim knows them.

A run that neither touches its session nor sends anything opens no transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.exceptions import Ignore, SoftTimeLimitExceeded
from celery.utils.imports import symbol_by_name

from taskguard.celery.effects import carrying, concerns, recorded, tell
from taskguard.celery.publishing import Capture, capturing, sending
from taskguard.envelope import Envelope
from taskguard.errors import ConfigurationError
from taskguard.gate import Custody
from taskguard.settlement import Drop
from taskguard.transient import is_transient

if TYPE_CHECKING:
    from taskguard.celery.effects import Effect
    from taskguard.celery.task import ReliableTask
    from taskguard.outbox.place import Place
    from taskguard.stores.sql.transactional import RunTransaction

_UNWRITTEN = "taskguard_unwritten"


class Joined(Capture):
    """Writes what the body sends into the run's transaction, as it is sent."""

    def __init__(self, app: Celery, transaction: RunTransaction, place: Place) -> None:
        super().__init__()
        self._app = app
        self._transaction = transaction
        self._place = place
        self.effects: list[Effect] = []
        self._carried: set[int] = set()

    @property
    def left(self) -> list[Effect]:
        """What the result backend is to be told and no message carries: a group that is saved after it was sent."""
        return [effect for number, effect in enumerate(self.effects) if number not in self._carried]

    def add(self, envelope: Envelope, due_at: float | None, ordering: str) -> None:
        """See `Capture`."""
        from taskguard.celery.composing import composed
        from taskguard.outbox.transactions import SessionTransaction

        mine = {number for number, effect in enumerate(self.effects) if concerns(effect, envelope)}
        # The size of a chord whose parts are chains names none of their messages, of which this is the first.
        mine |= {n for n, effect in enumerate(self.effects) if n not in self._carried and effect[0] != "save_group"}
        self._carried |= mine
        envelope = carrying(envelope, [self.effects[number] for number in sorted(mine)])
        message = composed(self._app, envelope, due_at, ordering)
        SessionTransaction(self._transaction.session).write(self._place, [message])


def check(task: ReliableTask) -> None:
    """Refuse a transactional task whose store is no SQL database. Raises ConfigurationError."""
    store = task.guard.store
    if not hasattr(store, "transaction"):
        raise ConfigurationError(
            f"{task.name}: transactional=True needs the store in the database of its effects, and the store is "
            f"{task.guard.shown_store}; set the store to postgresql+psycopg://, mysql+pymysql:// or sqlite:///"
        )


def joined(task: ReliableTask, custody: Custody) -> AbstractContextManager[None]:
    """The body's block. What leaves it, other than a value or a replacement, undoes what was written in it."""
    # In eager mode a plain run may be inside another's body.
    return _joined(task, custody) if task.transactional else sending()


@contextmanager
def _joined(task: ReliableTask, custody: Custody) -> Iterator[None]:
    check(task)
    from taskguard.outbox.transactions import SessionTransaction

    request, settings = task.request, task.guard.settings
    place = _place(settings.store or "", settings.namespace)
    transaction = task.guard.store.transaction(  # type: ignore[attr-defined]
        custody.envelope.id,
        custody.token,
        factory=_factory(task),
        checked=lambda session: SessionTransaction(session).check(place),
    )
    request.taskguard_transaction = transaction
    sends = request.taskguard_sends = Joined(task.app, transaction, place)
    try:
        with capturing(sends), recorded(task.app) as sends.effects:
            yield
    except Ignore:
        if not getattr(request, "taskguard_replaced", False):
            transaction.undo()
        raise
    except BaseException as exc:
        transaction.undo(broken=_interrupted(exc))
        raise


@cache
def _place(url: str, namespace: str) -> Place:
    """The store's own: what a run sends is in the transaction that completes it, wherever producers' outbox is."""
    from taskguard.outbox.place import Place
    from taskguard.stores.sql.dialect import dialect_of

    return Place(dialect_of(url).url, namespace)


def session_of(task: ReliableTask) -> Any:
    """The run's session. Raises ConfigurationError outside the run of a transactional task."""
    transaction = getattr(task.request, "taskguard_transaction", None)
    if transaction is None:
        raise ConfigurationError(
            f"{task.name}: self.session is there while a transactional task runs under custody; declare "
            "transactional=True, and outside a worker call the task with apply()"
        )
    return transaction.session


def own_session(task: Any, session: Any) -> bool:
    """Whether *session* is that of the run which *task* (or None) is making: what is sent in it joins anyway."""
    transaction = getattr(getattr(task, "request", None), "taskguard_transaction", None)
    return transaction is not None and transaction.begun and transaction.session is session


def completing(task: ReliableTask, custody: Custody, result: bytes) -> Callable[[], bool] | None:
    """The step that commits the run with its completion; None where it has begun no transaction."""
    transaction = _begun(task)
    if transaction is None:
        return None
    from taskguard.stores.sql.transactional import End

    return _committing(task, transaction, End.completed(result, _retention(custody)))


def discarding(task: ReliableTask, custody: Custody, why: Drop) -> Callable[[], bool] | None:
    """As `completing`, for a run that another task replaces: what it wrote and the replacement go together."""
    transaction = _begun(task)
    if transaction is None:
        return None
    from taskguard.stores.sql.transactional import End

    return _committing(task, transaction, End.discarded(why, _retention(custody)))


def close(task: ReliableTask) -> None:
    """The run is over: undo what was not committed."""
    transaction = getattr(task.request, "taskguard_transaction", None) if task.transactional else None
    if transaction is not None:
        transaction.undo()


def failed_to_commit(exc: BaseException) -> bool:
    """Whether it was the commit of a run that failed, and may succeed later: a deadlock, a lost connection."""
    return bool(getattr(exc, _UNWRITTEN, False)) and is_transient(exc)


def _committing(task: ReliableTask, transaction: RunTransaction, end: Any) -> Callable[[], bool]:
    def commit() -> bool:
        try:
            _tell_left(task, transaction)
            return transaction.commit(end)
        except Exception as exc:
            setattr(exc, _UNWRITTEN, True)
            raise

    return commit


def _tell_left(task: ReliableTask, transaction: RunTransaction) -> None:
    """Before the commit: after it a crash would leave it untold, and told of what is never sent does no harm."""
    left = task.request.taskguard_sends.left
    if not left or not transaction.begun:  # where it has ended and is asked again, it was told
        return
    try:
        tell(task.app, left)
    except SoftTimeLimitExceeded:  # the step is repeated
        raise
    except Exception:
        transaction.undo()
        raise


def _begun(task: ReliableTask) -> RunTransaction | None:
    if not task.transactional:
        return None
    transaction: RunTransaction | None = getattr(task.request, "taskguard_transaction", None)
    return transaction if transaction is not None and transaction.begun else None


def _retention(custody: Custody) -> float:
    assert custody.terms is not None
    return custody.terms.retention


def _factory(task: ReliableTask) -> Callable[[], Any] | None:
    given = task.session_factory or task.guard.settings.session
    factory = symbol_by_name(given) if isinstance(given, str) else given
    if factory is not None and not callable(factory):
        raise ConfigurationError(f"{task.name}: session_factory={given!r} cannot be called; give a sessionmaker")
    return factory


def _interrupted(exc: BaseException | None) -> bool:
    while exc is not None:
        if isinstance(exc, SoftTimeLimitExceeded) or not isinstance(exc, Exception):
            return True
        exc = exc.__cause__ or exc.__context__
    return False
