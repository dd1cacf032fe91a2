"""The message store in Redis 7 or newer: every operation is one Lua script and one round trip."""

from taskguard.stores.redis.messages import RedisStore

__all__ = ["RedisStore"]
