"""Django's transactions, through Django's own cursor. Django is imported when the adapter is used, and not before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from sqlalchemy.dialects import mysql, postgresql, sqlite

from taskguard.celery.composing import Composed
from taskguard.errors import ConfigurationError
from taskguard.outbox.place import Place
from taskguard.outbox.transactions import Transaction, missing, rows
from taskguard.stores.sql.outgoing import Spelling, family, is_missing_table

_DIALECTS: dict[str, Any] = {"postgresql": postgresql.dialect, "mysql": mysql.dialect, "sqlite": sqlite.dialect}


class DjangoTransaction(Transaction):
    """*source*: ``django.db.transaction`` (the default connection), or one of ``django.db.connections``."""

    def __init__(self, source: Any) -> None:
        self._source = source

    @property
    def _connection(self) -> Any:
        if hasattr(self._source, "in_atomic_block"):
            return self._source
        from django.db import connection

        return connection

    def check(self, place: Place) -> None:
        """See `Transaction`."""
        connection = self._connection
        if not connection.in_atomic_block:
            raise ConfigurationError(
                f"session: Django's connection {connection.alias!r} has no transaction open, so a rollback would not "
                "take the message back; send inside transaction.atomic()"
            )
        differs = place.differs(connection.vendor, str(connection.settings_dict.get("NAME") or ""))
        if differs:
            raise ConfigurationError(
                f"session: Django's connection {connection.alias!r} is another database, {differs}, and the outbox is "
                f"{place.shown}; give the connection of that one, or set outbox to this one"
            )

    def write(self, place: Place, composed: Sequence[Composed]) -> None:
        """See `Transaction`."""
        connection = self._connection
        kind = family(connection.vendor)
        given = rows(place, composed, kind)
        try:
            with connection.cursor() as cursor:
                for number, row in enumerate(given):
                    spelling = _spelling(kind, tells=number == len(given) - 1)
                    cursor.execute(spelling.text, spelling.arguments(row))
        except Exception as exc:
            if is_missing_table(exc):
                raise missing(place, exc) from exc
            raise


@cache
def _spelling(kind: str, *, tells: bool) -> Spelling:
    """The statement with Django's ``%s``."""
    return Spelling(kind, _DIALECTS[kind](paramstyle="format"), tells=tells)
