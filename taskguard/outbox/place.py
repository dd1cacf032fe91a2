"""Where an application's outbox is: the database, and the namespace in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL

from taskguard.errors import ConfigurationError
from taskguard.settings import Settings
from taskguard.stores.sql.database import shown
from taskguard.stores.sql.dialect import dialect_of
from taskguard.stores.sql.outgoing import FAMILIES, family


@dataclass(frozen=True, slots=True)
class Place:
    """The database at ``url``."""

    url: URL
    namespace: str

    @property
    def shown(self) -> str:
        """For people: no password."""
        return shown(self.url)

    def differs(self, dialect: str, database: str | None) -> str:
        """Why a connection to this kind of database, of this name, is to another one; empty where it may be the same.

        Hosts are not compared: a pooler or an alias has another name.
        """
        own = family(self.url.get_backend_name())
        if family(dialect) != own:
            return f"it is a {dialect} database"
        named = self.url.database
        if own == "sqlite":
            same = Path(named or "").absolute() == Path(database or "").absolute()
        else:
            same = not database or not named or database == named
        return "" if same else f"its database is {database!r}"


_places: dict[tuple[str, str], Place] = {}


def place_of(settings: Settings) -> Place:
    """The outbox of an application with these settings. Raises ConfigurationError where it has none."""
    url = settings.outbox or settings.store or ""
    known = _places.get((url, settings.namespace))
    if known is not None:
        return known
    scheme = url.partition("://")[0].partition("+")[0]
    if scheme not in (*FAMILIES, "postgres"):
        where = f"the store is {scheme}://, which is no SQL database" if url else "no store is configured"
        raise ConfigurationError(
            f"outbox: {where}; set TASKGUARD_OUTBOX, taskguard_outbox or taskguard.install(app, outbox=...) to the URL "
            "of the database whose transactions send tasks"
        )
    place = Place(dialect_of(url).url, settings.namespace)
    _places[(url, settings.namespace)] = place
    return place
