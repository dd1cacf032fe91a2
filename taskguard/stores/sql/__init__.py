"""The message store on PostgreSQL, MySQL or MariaDB, and SQLite."""

from taskguard.stores.sql.messages import SQLStore
from taskguard.stores.sql.schema import metadata

__all__ = ["SQLStore", "metadata"]
