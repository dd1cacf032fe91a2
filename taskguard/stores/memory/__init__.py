"""The stores in process memory: for tests, eager mode and single-process programs."""

from taskguard.stores.memory.messages import MemoryStore
from taskguard.stores.memory.permits import MemoryPermits

__all__ = ["MemoryPermits", "MemoryStore"]
