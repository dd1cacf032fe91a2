"""Ownership: a lease of the channel on what it took, so that others give it back when the channel's process is gone.

A thread renews it, because the event loop may be blocked for longer than a lease, by the solo pool for one. It looks
for others' leases that have ended and gives back what they held, at the front of its queues and marked as redelivered.
An owner that was only slow loses its unstarted messages to others and may run them too: custody tells the copies apart,
so only workers whose tasks all have custody own anything. For the rest there is the visibility timeout.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

from kombu.log import get_logger

from taskguard.celery.redis_broker.scripts import run
from taskguard.celery.redis_broker.unacked import give_back
from taskguard.forks import undisturbed

logger = get_logger("taskguard.celery.redis_broker")

BEATS = 4
"""How often a lease is renewed, and others' are looked at, in one lease."""


class Owner:
    """One channel's ownership. The thread ends with `stop`, or with the channel."""

    def __init__(self, channel: Any, name: str, lease: float) -> None:
        self.name = name
        self._channel = weakref.ref(channel)
        self._lease = lease
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="taskguard-owner", daemon=True)

    def start(self) -> None:
        """Begin to renew."""
        self._thread.start()

    def stop(self) -> None:
        """Renew no more: the lease ends by itself, and what is still held is given back by others."""
        self._stopping.set()
        self._thread.join(timeout=1)

    def _run(self) -> None:
        while not self._stopping.is_set():
            channel = self._channel()
            if channel is None or channel.closed:
                return
            try:
                with undisturbed:
                    self.beat(channel)
            except Exception as exc:  # noqa: BLE001 (without its beat a worker's messages go to others, one by one)
                logger.warning("taskguard: the lease on unacknowledged messages was not renewed: %r", exc)
            del channel
            self._stopping.wait(self._lease / BEATS)

    def beat(self, channel: Any) -> None:
        """Renew, and give back what ended owners held."""
        for ended in run(channel.plain_client, "beat", [channel.owners_key], self.name, int(self._lease * 1000)):
            self._relieve(channel, ended.decode())

    def _relieve(self, channel: Any, ended: str) -> None:
        index, cursor, tags = channel.key(channel.unacked_index_key), 0, set[str]()
        while True:
            cursor, page = channel.plain_client.zscan(index, cursor, match=f"{ended}:*", count=1000)
            tags.update(tag.decode() for tag, _ in page)
            if not cursor:
                break
        given = give_back(channel, sorted(tags))
        run(channel.plain_client, "forget", [channel.owners_key], ended)
        if given:
            logger.warning("taskguard: gave back %d messages of a worker that is gone", given)
