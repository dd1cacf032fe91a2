"""Hearing from PostgreSQL that a transaction has left rows in the outbox, on a connection of its own.

It is an accelerator only: where the connection is lost, or a pooler between swallows notifications, the relay still
looks by itself.
"""

from __future__ import annotations

import os
import select
import time
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection

from taskguard.stores.sql.database import Database

RECONNECT = 1.0
"""Seconds until a connection that was lost is made again."""


class Listener:
    """Listens on one channel, from the first wait on. Not safe for threads."""

    def __init__(self, database: Database, channel: str) -> None:
        self._database = database
        self._channel = channel
        self._connection: Connection | None = None
        self._pid = 0
        self._try_at = 0.0

    def wait(self, seconds: float) -> bool:
        """Until something is told, or so many seconds are over."""
        raw = self._raw()
        if raw is None:
            time.sleep(seconds)
            return False
        try:
            if raw.pgconn.notifies() is None and not select.select([raw.fileno()], [], [], seconds)[0]:
                return False
            for _ in raw.notifies(timeout=0):
                pass
        except Exception:  # noqa: BLE001 (the driver's errors: all of them mean that nothing will be heard here)
            self.close()
        return True

    def _raw(self) -> Any:
        if self._connection is not None and self._pid == os.getpid():
            return self._connection.connection.driver_connection
        if time.monotonic() < self._try_at:
            return None
        self._try_at, self._pid, self._connection = time.monotonic() + RECONNECT, os.getpid(), None
        try:
            connection = self._database.connect()
            connection.exec_driver_sql(f'LISTEN "{self._channel}"')
        except Exception:  # noqa: BLE001 (the relay's next look says what is wrong)
            return None
        self._connection = connection
        return connection.connection.driver_connection

    def close(self) -> None:
        """Stop listening."""
        connection, self._connection = self._connection, None
        if connection is not None and self._pid == os.getpid():
            with suppress(Exception):
                connection.invalidate()
                connection.close()
