"""The draw of a short run: where each row is played, by a seed."""

from __future__ import annotations

import os
import random
import zlib

from tests.proof.rows import BROKERS, MORE_STORES, POOLS, STORES, Place, Row

VARIABLE = "PROOF_SEED"


def seed() -> int:
    """``PROOF_SEED``; without one, the same for all processes of one pytest run."""
    if given := os.environ.get(VARIABLE):
        return int(given)
    if run := os.environ.get("PYTEST_XDIST_TESTRUNUID"):
        return zlib.crc32(run.encode()) % 10_000
    os.environ[VARIABLE] = str(random.SystemRandom().randrange(10_000))
    return int(os.environ[VARIABLE])


def plays_all() -> bool:
    """Whether ``PROOF_ALL`` asks for every place instead of those drawn."""
    return os.environ.get("PROOF_ALL", "") not in ("", "0")


class Draw:
    """One store and one pool for each broker, and for each row a broker: few places, so that rows share workers."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        self._hand = {broker: (chance.choice(STORES + MORE_STORES), chance.choice(POOLS)) for broker in BROKERS}
        self._seed = seed

    def place(self, row: Row) -> Place:
        """Where *row* is played. What the row cannot be played on is replaced by the first that it can.

        A draw knows more stores than the full run.
        """
        broker = random.Random(self._seed * 100 + row.number).choice(row.brokers)
        store, pool = self._hand[broker]
        return Place(
            broker,
            store if store in row.stores or row.stores == STORES else row.stores[0],
            pool if pool in row.pools else row.pools[0],
        )
