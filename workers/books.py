"""The bank's books in SQLite: every call it was asked, counted apart from every charge it made."""

from __future__ import annotations

import sqlite3
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, order_id TEXT NOT NULL, key TEXT, caller TEXT NOT NULL, status INTEGER
);
CREATE TABLE IF NOT EXISTS charges (
    id TEXT PRIMARY KEY, at REAL NOT NULL, order_id TEXT NOT NULL, amount INTEGER NOT NULL, key TEXT UNIQUE,
    refunded_at REAL
);
"""


class KeyMismatch(ValueError):
    """An idempotency key came back with another order or amount."""


@dataclass(frozen=True, slots=True)
class Charge:
    """One charge. ``replayed``: it was made by an earlier call with the same idempotency key."""

    id: str
    order_id: str
    amount: int
    replayed: bool


class Books:
    """Opened by one process, which may use them from many threads; anyone may read them with SQLite meanwhile."""

    def __init__(self, path: Path | str) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(SCHEMA)

    def open_call(self, order_id: str, *, key: str | None, caller: str) -> int:
        """Write down that somebody called. Returns the call's number; its status is NULL until `close_call`."""
        with self._lock:
            row = self._db.execute(
                "INSERT INTO calls (at, order_id, key, caller) VALUES (?, ?, ?, ?) RETURNING id",
                (time.time(), order_id, key, caller),
            ).fetchone()
        return int(row[0])

    def close_call(self, call: int, status: int) -> None:
        """Write down how the call was answered."""
        with self._lock:
            self._db.execute("UPDATE calls SET status = ? WHERE id = ?", (status, call))

    def charge(self, order_id: str, amount: int, *, key: str | None) -> Charge:
        """Charge the order; with a key that was seen before, return the charge it made then.

        Raises KeyMismatch when the key was used for something else.
        """
        with self._lock:
            known = (
                key and self._db.execute("SELECT id, order_id, amount FROM charges WHERE key = ?", (key,)).fetchone()
            )
            if known:
                if known[1:] != (order_id, amount):
                    raise KeyMismatch(f"key {key!r} was used to charge {known[2]} for order {known[1]!r}")
                return Charge(str(known[0]), order_id, amount, replayed=True)
            charge = Charge(uuid.uuid4().hex, order_id, amount, replayed=False)
            self._db.execute(
                "INSERT INTO charges (id, at, order_id, amount, key) VALUES (?, ?, ?, ?, ?)",
                (charge.id, time.time(), order_id, amount, key),
            )
            return charge

    def refund(self, charge_id: str) -> bool:
        """Give a charge back, once. False when there is no such charge."""
        with self._lock:
            self._db.execute(
                "UPDATE charges SET refunded_at = ? WHERE id = ? AND refunded_at IS NULL", (time.time(), charge_id)
            )
            return self._db.execute("SELECT 1 FROM charges WHERE id = ?", (charge_id,)).fetchone() is not None

    def totals(self) -> dict[str, int]:
        """How many calls, charges, charged orders and refunds."""
        with self._lock:
            calls = self._db.execute("SELECT count(*) FROM calls").fetchone()[0]
            charges, orders, refunds = self._db.execute(
                "SELECT count(*), count(DISTINCT order_id), count(refunded_at) FROM charges"
            ).fetchone()
        return {"calls": calls, "charges": charges, "orders": orders, "refunds": refunds}

    def close(self) -> None:
        """Write everything back to the one file."""
        with self._lock:
            self._db.close()
