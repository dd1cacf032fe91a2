"""Rules on a SQL database. Whoever changes them holds the version's row; whoever reads them sees one committed set."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Self

from sqlalchemy import Connection, delete, insert, select, update

from taskguard.clock import Clock, to_ms
from taskguard.errors import ConfigurationError, StoreError
from taskguard.forks import undisturbed
from taskguard.rules import RuleChange, RuleSet
from taskguard.stores.revisions import LOG, LOOK, RevisedRules, read_set
from taskguard.stores.sql.database import Database
from taskguard.stores.sql.dialect import dialect_of
from taskguard.stores.sql.schema import NAMESPACE_LENGTH, rule_changes, rule_versions
from taskguard.stores.sql.schema import rules as rows


class SQLRules(RevisedRules):
    """A `RuleStore` on PostgreSQL, MySQL or MariaDB, or SQLite. It cannot push: watchers look each half second."""

    def __init__(self, database: Database, *, namespace: str) -> None:
        if len(namespace) > NAMESPACE_LENGTH:
            raise ConfigurationError(
                f"namespace: {namespace!r} is too long for a SQL store; use {NAMESPACE_LENGTH} characters or less"
            )
        self._database = database
        self._namespace = namespace

    @classmethod
    def from_url(
        cls, url: str, *, namespace: str, timeout: float = 5.0, clock: Clock | None = None, creates: bool = True
    ) -> Self:
        """The rules in the database at *url*. Raises ConfigurationError for a URL that cannot be one."""
        return cls(Database(dialect_of(url), timeout=timeout, clock=clock, creates=creates), namespace=namespace)

    def rules(self, known: int = 0) -> RuleSet | None:
        def read(connection: Connection) -> RuleSet | None:
            while (version := self._version(connection)) != known:
                found = connection.execute(select(rows.c.rule).where(rows.c.namespace == self._namespace))
                texts = [row.rule for row in found]
                # Committed reads may see the rules of a change that came after the version: then they are read again.
                if self._version(connection) == version:
                    return read_set(version, texts)
            return None

        return self._database.run(read)

    def version(self) -> int:
        return self._database.run(self._version)

    def _version(self, connection: Connection, *, lock: bool = False) -> int:
        query = select(rule_versions.c.version).where(rule_versions.c.namespace == self._namespace)
        found = connection.execute(query.with_for_update() if lock else query).scalar()
        return 0 if found is None else int(found)

    def changes(self, *, limit: int = 20) -> list[RuleChange]:
        c = rule_changes.c
        query = select(c.version, c.made_at, c.who, c.why, c.what).where(c.namespace == self._namespace)
        query = query.order_by(c.version.desc()).limit(max(0, limit))
        found = self._database.run(lambda connection: connection.execute(query).all())
        return [RuleChange(version=row[0], at=row[1] / 1000, who=row[2], why=row[3], what=row[4]) for row in found]

    def _write(
        self, after: RuleSet, put: Sequence[tuple[str, str]], gone: Sequence[str], *, who: str, why: str, what: str
    ) -> int | None:
        def write(connection: Connection) -> int | None:
            if self._version(connection, lock=True) != after.version:
                return None
            now = to_ms(self._database.now(connection))
            version = max(after.version + 1, now)
            mine = {"namespace": self._namespace}
            if after.version:
                held = update(rule_versions).where(rule_versions.c.namespace == self._namespace)
                connection.execute(held.values(version=version))
            else:  # whoever inserted it since we looked was first: the error has this run again
                connection.execute(insert(rule_versions), {**mine, "version": version})
            replaced = [*gone, *(id for id, _ in put)]
            connection.execute(delete(rows).where(rows.c.namespace == self._namespace, rows.c.id.in_(replaced)))
            if put:
                connection.execute(insert(rows), [{**mine, "id": id, "rule": text} for id, text in put])
            change = {**mine, "version": version, "made_at": now, "who": who, "why": why, "what": what}
            connection.execute(insert(rule_changes), change)
            self._forget(connection)
            return version

        return self._database.run(write, transaction=True)

    def _forget(self, connection: Connection) -> None:
        c = rule_changes.c
        newest = select(c.version).where(c.namespace == self._namespace).order_by(c.version.desc())
        oldest_kept = connection.execute(newest.offset(LOG - 1).limit(1)).scalar()
        if oldest_kept is not None:
            connection.execute(delete(rule_changes).where(c.namespace == self._namespace, c.version < oldest_kept))

    def watch(self, changed: Callable[[int], None], *, stop: Callable[[], bool]) -> None:
        while not stop():
            looked = time.monotonic()
            with undisturbed, suppress(StoreError):  # an outage: whoever watches keeps what it has
                changed(self.version())
            while not stop() and (left := looked + LOOK - time.monotonic()) > 0:
                time.sleep(min(left, 0.05))

    def close(self) -> None:
        self._database.close()
