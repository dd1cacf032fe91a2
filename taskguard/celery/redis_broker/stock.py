"""kombu's own parts, as the untyped things they are: its annotations are few, and contradict each other."""

from __future__ import annotations

from typing import Any

from kombu.transport import redis as _redis
from kombu.transport import virtual as _virtual

redis: Any = _redis
virtual: Any = _virtual
