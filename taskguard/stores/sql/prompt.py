"""A statement that every run needs: compiled once, and sent without being prepared for anything else.

SQLAlchemy writes the SQL and converts the values, as it would each time; what is left out is the machinery around an
execution (contexts, result objects, caches), which costs several times what such a statement costs the database. So
does taking a connection out of the pool and giving it back, and one stays out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.dml import UpdateBase

Converter = Callable[[Any], Any]


class Lane:
    """Connections of *engine* for prompt statements. With *keeps*, one stays here from one statement to the next."""

    def __init__(self, engine: Engine, *, keeps: bool) -> None:
        self.engine = engine
        self._keeps = keeps
        self._kept: deque[Any] = deque()

    def take(self) -> Any:
        """A connection in autocommit mode, for nobody else until it is given back."""
        try:
            return self._kept.pop()
        except IndexError:
            return self.engine.raw_connection()

    def give_back(self, connection: Any) -> None:
        """Whatever became of it."""
        if self._keeps and not self._kept and connection.is_valid:
            self._kept.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Give to the pool what is kept."""
        with suppress(IndexError):  # and not while there are some: another thread may take the last
            while True:
                self._kept.pop().close()


class Prompt:
    """An insert, update or delete with named values, in the words of *engine*'s database."""

    def __init__(self, statement: UpdateBase, engine: Engine) -> None:
        dialect = engine.dialect
        compiled: Any = statement.compile(dialect=dialect, compile_kwargs={"render_postcompile": True})
        self.text: str = compiled.string
        self._order: tuple[str, ...] | None = tuple(compiled.positiontup) if compiled.positional else None
        self._converters: list[tuple[str, Converter]] = []
        for parameter, name in compiled.bind_names.items():
            convert = parameter.type.dialect_impl(dialect).bind_processor(dialect)
            if convert is not None and not parameter.literal_execute:
                self._converters.append((name, convert))

    def execute(self, lane: Lane, values: Mapping[str, Any]) -> int:
        """Do it by itself, on a connection in autocommit mode. Returns how many rows it changed.

        A row in the way of an insert leaves it undone: 0. Raises DBAPIError as SQLAlchemy does.
        """
        given: dict[str, Any] = dict(values)
        for name, convert in self._converters:
            given[name] = convert(given[name])
        parameters = given if self._order is None else [given[name] for name in self._order]
        engine = lane.engine
        dbapi: Any = engine.dialect.dbapi
        connection = None
        try:
            connection = lane.take()
            cursor = connection.cursor()
            cursor.execute(self.text, parameters)
            changed = int(cursor.rowcount)
            cursor.close()
        except dbapi.IntegrityError:
            changed = 0
        except dbapi.Error as exc:
            lost = engine.dialect.is_disconnect(exc, connection and connection.driver_connection, None)
            if lost and connection is not None:
                connection.invalidate(exc)
                lane.close()
                engine.dispose()  # the others are not likely to have fared better
            raise DBAPIError.instance(
                self.text, None, exc, dbapi.Error, connection_invalidated=lost, dialect=engine.dialect
            ) from exc
        except BaseException:
            # A soft time limit, say, in the middle of an answer: what comes next on this connection is not ours.
            if connection is not None:
                connection.invalidate()
            raise
        finally:
            if connection is not None:
                lane.give_back(connection)
        return changed
