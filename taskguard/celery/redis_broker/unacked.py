"""What was taken and not acknowledged: kombu's hash and index, under tags that say who took it.

A tag is ``<owner>:<number>`` and is never used twice, so a late acknowledgement cannot remove another worker's copy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from kombu.utils.json import dumps, loads

from taskguard.celery.redis_broker.scripts import run
from taskguard.celery.redis_broker.stock import redis as stock
from taskguard.celery.redis_broker.stock import virtual

OWNER = "tg-"
"""How the names of owners begin."""
BATCH = 100


def number_of(tag: str) -> int:
    """The number in a tag."""
    return int(tag.rpartition(":")[2])


def give_back(channel: Any, tags: Sequence[str], *, front: bool = True) -> int:
    """Put these messages back into their queues, in their order. Returns how many nobody else had put back.

    *front*: at the end that is consumed; otherwise behind all others. Raises what redis-py raises.
    """
    hash_key, index_key = channel.key(channel.unacked_key), channel.key(channel.unacked_index_key)
    client, given = channel.plain_client, 0
    # The last one back at the front is the first one out again.
    ordered = sorted(tags, key=number_of, reverse=front)
    for start in range(0, len(ordered), BATCH):
        batch = ordered[start : start + BATCH]
        keys = [hash_key, index_key]
        arguments: list[str | bytes] = ["RPUSH" if front else "LPUSH"]
        for tag, entry in zip(batch, client.execute_command("HMGET", hash_key, *batch), strict=True):
            queue, item = (hash_key, b"") if entry is None else _destination(channel, entry)
            keys.append(queue)
            arguments += [tag, item]
        given += run(client, "give_back", keys, *arguments)
    return given


def _destination(channel: Any, entry: bytes) -> tuple[str, bytes]:
    item, _, rest = entry[1:-1].rpartition(b', "", ')
    queue = json.loads(rest)
    try:
        payload = loads(item.decode())
        for marked in (payload.get("headers"), payload["properties"].get("delivery_info")):
            if isinstance(marked, dict):
                marked["redelivered"] = True
        priority = channel._get_message_priority(payload, reverse=False)
        return channel.key(channel._q_for_pri(queue, priority)), dumps(payload).encode()
    except Exception:  # noqa: BLE001 (kombu's JSON raises what the types it rebuilds raise)
        return channel.key(queue), item  # what is no message goes back as it came


class QoS(stock.QoS):  # type: ignore[misc]
    """kombu's account of what is unacknowledged. What the channel took by script is written down already."""

    def _ours(self, tag: Any) -> bool:
        return isinstance(tag, str) and tag.startswith(self.channel.taker.prefix)

    def append(self, message: Any, delivery_tag: str) -> None:
        """A message is handed over."""
        if self._ours(delivery_tag):
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Let it go, with the next request."""
        if self._ours(delivery_tag):
            virtual.QoS.ack(self, delivery_tag)
            self.channel.taker.settle(delivery_tag)
        else:
            super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Let it go, or put it back behind the others, as kombu does."""
        if requeue or not self._ours(delivery_tag):
            super().reject(delivery_tag, requeue)
        else:
            self.ack(delivery_tag)

    def restore_by_tag(self, tag: str | bytes, client: Any = None, leftmost: bool = False) -> None:
        """Put one back, whoever took it."""
        name = tag.decode() if isinstance(tag, bytes) else tag
        if name.startswith(OWNER):
            give_back(self.channel, [name], front=not leftmost)
        else:
            super().restore_by_tag(tag, client, leftmost)

    def restore_unacked(self, client: Any = None) -> None:
        """Put all back that this channel holds, so that they are delivered in the order they were."""
        self._flush()
        tags = list(self._delivered)
        ours = [tag for tag in tags if self._ours(tag)]
        for tag in reversed(tags):
            if not self._ours(tag):
                self.restore_by_tag(tag, client=client)
        give_back(self.channel, ours)
        self._delivered.clear()
