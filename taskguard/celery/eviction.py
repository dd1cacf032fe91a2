"""A broker that evicts: what makes a full Redis throw whole queues away, and why nothing is published to such a one."""

from __future__ import annotations

from typing import Any

from taskguard.errors import ConfigurationError


def check_broker(producer: Any) -> bool:
    """Raise ConfigurationError where a full broker would drop queues without a word. Returns whether it was asked.

    A broker that is away is told by the publish that follows, and a server that may not be asked is trusted.
    """
    try:
        evicting = _evicts_queues(producer)
    except Exception:  # noqa: BLE001 (transports raise what their drivers raise)
        return False
    if evicting:
        raise ConfigurationError(
            f"the Redis broker has maxmemory-policy {evicting}: when it is full it throws queues away without a word; "
            "set noeviction there, or use another Redis as the broker"
        )
    return True


def _evicts_queues(producer: Any) -> str:
    """The policy that does; none otherwise."""
    if producer.connection.transport.driver_type != "redis":
        return ""
    channel = producer.channel
    try:
        memory = channel.client.info("memory")
    except channel.ResponseError:  # an access list, or a command taken away
        return ""
    policy = str(memory.get("maxmemory_policy", ""))
    # The volatile policies evict only what has an expiry, which queues have not.
    return policy if memory.get("maxmemory") and policy.startswith("allkeys") else ""
