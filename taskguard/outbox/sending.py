"""`Outbox`: the sends of one transaction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from taskguard.celery.composing import Composed, compose
from taskguard.celery.runtime import runtime_of
from taskguard.errors import ConfigurationError
from taskguard.outbox.place import Place, place_of
from taskguard.outbox.transactions import Transaction, transaction_of

T = TypeVar("T")


class Outbox:
    """Sends with a transaction. *session*: a SQLAlchemy Session or Connection, their async twins (see `send_async`),
    ``django.db.transaction``, or one of Django's ``connections``.

    Raises ConfigurationError where the session is of another database than the application's outbox.
    """

    def __init__(self, session: Any) -> None:
        self._transaction: Transaction = transaction_of(session)

    def send(self, signature: Any, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Send a task, a signature or a canvas, with the options of ``apply_async``, and ``ordering_key``: messages
        with the same one are published in the order in which they were written.

        Returns Celery's own result. A delay counts from now. Raises UnserialisableArgument, and StoreError where the
        database has no outbox; the transaction is then the caller's to roll back.
        """
        send = _sending(signature, args, kwargs, options)
        return send_in(self._transaction, signature.app, send)

    async def send_async(self, signature: Any, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """As `send`, in an AsyncSession or AsyncConnection."""
        send = _sending(signature, args, kwargs, options)
        app = signature.app
        place = place_of(runtime_of(app).settings)
        result, composed = compose(app, send)
        await self._transaction.write_async(place, composed)
        return result


def send_in(session: Any, app: Any, send: Callable[[Any], T]) -> T:
    """Do *send*, which is given a producer, and write what it would publish in the transaction of *session*."""
    transaction = session if isinstance(session, Transaction) else transaction_of(session)
    place: Place = place_of(runtime_of(app).settings)
    transaction.check(place)
    result, composed = compose(app, send)
    write(transaction, place, composed)
    return result


def write(transaction: Transaction, place: Place, composed: Sequence[Composed]) -> None:
    """Write these messages in the transaction."""
    if composed:
        transaction.write(place, composed)


def _sending(
    signature: Any, args: Any, kwargs: Mapping[str, Any] | None, options: Mapping[str, Any]
) -> Callable[[Any], Any]:
    apply = getattr(signature, "apply_async", None)
    if apply is None:
        raise ConfigurationError(
            f"{signature!r} is no task or signature; send task.s(...), a chain, a group or a chord"
        )
    if "session" in options:
        raise ConfigurationError("session= belongs to apply_async; an Outbox has its session already")
    return lambda producer: apply(args, kwargs, producer=producer, **options)
