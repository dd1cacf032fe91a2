"""The taker: when a channel asks for messages, for how many, and what becomes of the replies.

It belongs to the event loop's thread. Other threads only call `settle`.
"""

from __future__ import annotations

import threading
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty
from time import monotonic, time
from typing import Any

from kombu.utils.json import dumps
from kombu.utils.scheduling import priority_cycle

from taskguard.celery.redis_broker.line import Line
from taskguard.celery.redis_broker.message import payload_of
from taskguard.celery.redis_broker.owner import Owner
from taskguard.celery.redis_broker.scripts import run, script
from taskguard.celery.redis_broker.stock import redis as stock
from taskguard.celery.redis_broker.unacked import OWNER, give_back

BATCH = 64
"""Messages in one request."""
SLICE = 0.01
"""Seconds of handing over, or since the event loop last asked, after which something else gets a chance."""
PAUSE = 1.0
"""Seconds a consumer without an event loop waits for one message."""
SELDOM = 3.0
"""Seconds after which an idle consumer looks by itself, should the broker not have told it."""
UNTOLD = 0.1
"""Seconds between two looks where the broker cannot tell of new messages."""
REFUSED = 1.0
"""Seconds until a broker that refuses is asked again."""
READ_PATIENCE = 2.0
"""Seconds a closing channel waits for a reply that is under way."""


@dataclass(slots=True)
class Request:
    """What was asked. Without a count it took nothing; *looked*: whether there is something; *tracks*: to be told."""

    acked: list[str]
    first: int
    wanted: int
    queues: list[str]
    looked: bool
    sent_at: float
    tracks: bool = False


class Taker:
    """One channel's."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self.name = OWNER + uuid.uuid4().hex[:16]
        self.prefix = f"{self.name}:"
        self._line: Line | None = None
        self._owner: Owner | None = None
        self._next = 1
        self._settled: deque[str] = deque()
        self._awaited: deque[Request] = deque()
        self._inbox: deque[tuple[str, str, bytes]] = deque()
        self._doubtful: list[str] = []
        self._keys: dict[tuple[str, ...], list[str]] = {}
        self._look_at = 0.0
        self._return_at = 0.0
        self._turned_at = 0.0
        self._heard_at = 0.0
        self._thread = 0
        self._called = False
        self._told = False
        self._closed = False
        self._timer: Any = None

    # -- asking -----------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Before every wait: send what is to be sent. One request at a time, so what piles up goes together."""
        self._called, self._turned_at, self._thread = False, monotonic(), threading.get_ident()
        if self._inbox and self._hub is not None:
            self.deliver()
        if self._line is not None:
            if self._line.lost or (self._overdue() and not self._came_late(self._line)):
                self._hang_up()
                raise stock.redis.exceptions.ConnectionError("Redis does not answer requests for messages any more")
            self._return_doubtful()
        if self._awaited:
            return
        wanted = self._wanted()
        if wanted or self._settled:
            self._ask(wanted)

    def _overdue(self) -> bool:
        patience = self._channel.health_check_interval
        if not patience or not self._awaited:
            return False
        return bool(self._turned_at - max(self._heard_at, self._awaited[0].sent_at) > patience + SELDOM)

    def _came_late(self, line: Line) -> bool:
        """Whether it was this process that was late: the answer is there. It is read."""
        with self._hanging_up():
            if not line.more():
                return False
            self._take_in_all(line)
        if self._hub is not None:
            self.deliver()
        return True

    def _wanted(self) -> int:
        channel = self._channel
        if self._closed or not channel.takes or self._turned_at < self._look_at:
            return 0
        qos = channel.qos
        if not qos.can_consume():
            return 0
        free = BATCH
        # Celery's worker_disable_prefetch asks for each message. And a broker that goes on refusing is not to leave
        # more and more tags in doubt.
        if "can_consume" in vars(qos) or self._doubtful:
            free = 1
        if qos.prefetch_count:
            free = min(free, qos.prefetch_count - len(qos._delivered) + len(qos._dirty))
        return max(0, free - len(self._inbox))

    def _ask(self, wanted: int) -> None:
        line = self._open()
        channel = self._channel
        acked = self._drained()
        queues = channel._queue_cycle.consume(len(channel.active_queues)) if wanted else []
        keys = self._keys_of(queues) if wanted else []
        fair = not isinstance(channel._queue_cycle, priority_cycle)
        request = Request(acked, self._next, wanted, list(queues), False, monotonic())
        self._next += wanted
        self._awaited.append(request)
        line.send(
            (
                "EVALSHA", script("turn").sha, 3 + len(keys), *channel.entry_keys, *keys,
                len(acked), wanted, len(queues), int(fair), time(), self.name, int(channel.owner_lease * 1000),
                request.first, *acked, *(dumps(queue) for queue in queues),
            )
        )  # fmt: skip

    def _keys_of(self, queues: list[str]) -> list[str]:
        names = tuple(queues)
        keys = self._keys.get(names)
        if keys is None:
            channel = self._channel
            if len(self._keys) > BATCH:
                self._keys.clear()
            keys = [channel.key(channel._q_for_pri(queue, step)) for step in channel.priority_steps for queue in names]
            self._keys[names] = keys
        return keys

    def _look(self, line: Line, queues: list[str]) -> None:
        """Ask whether something is there; being asked, the broker tells when that changes."""
        self._told = False
        line.look(self._keys_of(queues))
        if line.tracked:
            self._awaited.append(Request([], self._next, 0, queues, False, monotonic(), tracks=True))
        self._awaited.append(Request([], self._next, 0, queues, True, monotonic()))

    def _open(self) -> Line:
        if self._line is None:
            self._line = line = Line(self._channel)
            self._channel.connection.cycle.attend(self._channel, line)
            if not line.tracked and self._hub is not None:
                self._timer = self._hub.call_repeatedly(UNTOLD, self.turn)
            if self._channel.owner_lease and self._owner is None:
                self._owner = Owner(self._channel, self.name, self._channel.owner_lease)
                self._owner.start()
            self._return_doubtful()
        return self._line

    def _return_doubtful(self) -> None:
        if not self._doubtful or monotonic() < self._return_at:
            return
        try:
            give_back(self._channel, self._doubtful)
        except stock.redis.exceptions.ResponseError as exc:
            stock.warning("taskguard: Redis refused to take messages back, and is asked again in a second: %s", exc)
            self._return_at = monotonic() + REFUSED
        else:
            self._doubtful.clear()

    @property
    def patience(self) -> float:
        """Seconds until it wants to look by itself."""
        return SELDOM if self._line is None or self._line.tracked else UNTOLD

    def _hang_up(self) -> None:
        """What the broker made of unanswered requests is unknown: acknowledge again, and give back what may be ours."""
        line, self._line = self._line, None
        for request in self._awaited:
            self._settled.extend(request.acked)
            self._doubt(request)
        self._awaited.clear()
        if self._timer is not None:
            self._timer.cancel()
        if line is not None:
            line.close()

    def _doubt(self, request: Request) -> None:
        self._doubtful += [f"{self.prefix}{request.first + offset}" for offset in range(request.wanted)]

    def look_soon(self) -> None:
        """There is a queue more, and nobody was told of what is in it."""
        self._look_at = 0.0
        self._call()

    # -- replies ----------------------------------------------------------------------------------------------------

    def read(self) -> bool:
        """A reply is there. Raises Empty when it brought no message."""
        line = self._line
        assert line is not None
        with self._hanging_up():
            self._take_in_all(line)
        if not self.deliver():
            raise Empty
        return True

    @contextmanager
    def _hanging_up(self) -> Iterator[None]:
        try:
            yield
        except (*self._channel.connection_errors, stock.redis.exceptions.ReadOnlyError):
            self._hang_up()
            raise

    def _take_in_all(self, line: Line) -> None:
        self._take_in(line)
        while self._awaited and line.more():
            self._take_in(line)

    def _take_in(self, line: Line) -> None:
        if not self._awaited:
            line.read()  # an idle connection has nothing to say but that it has ended
            raise stock.redis.exceptions.ConnectionError("the broker answered what was not asked")
        request = self._awaited[0]
        try:
            reply = line.read()
        except stock.redis.exceptions.ReadOnlyError:
            raise
        except stock.redis.exceptions.ResponseError as exc:
            self._awaited.popleft()
            if request.tracks:  # not any more: a new line finds out, and looks often
                raise stock.redis.exceptions.ConnectionError(f"Redis does not tell of new messages: {exc}") from exc
            self._refused(line, request, exc)
            return
        self._awaited.popleft()
        self._heard_at = monotonic()
        if request.looked:
            # What came right after the look may be told before its answer is read, and is not told twice. And a queue
            # that is consumed since was not looked into.
            is_idle = not reply and not self._told and set(request.queues) >= set(self._channel.active_queues)
            self._look_at = monotonic() + self.patience if is_idle else 0.0
        elif request.wanted:
            self._receive(request, reply)
            if len(reply) < 2 * request.wanted and not self._closed:
                self._look(line, request.queues)

    def _receive(self, request: Request, reply: list[Any]) -> None:
        for offset, (position, item) in enumerate(zip(reply[::2], reply[1::2], strict=True)):
            queue = request.queues[position % len(request.queues)]
            self._inbox.append((f"{self.prefix}{request.first + offset}", queue, item))
        if reply:
            self._channel._queue_cycle.rotate(queue)

    def _refused(self, line: Line, request: Request, exc: Exception) -> None:
        """Nothing was done, or something: the script may have been stopped after it had taken messages."""
        self._settled.extendleft(reversed(request.acked))
        if isinstance(exc, stock.redis.exceptions.NoScriptError) and not self._awaited:
            line.load()
            return
        self._doubt(request)
        stock.warning("taskguard: Redis refused to hand out messages, and is asked again in a second: %s", exc)
        self._look_at = monotonic() + REFUSED

    def hear(self) -> None:
        """A queue has grown, or some other key of that name has changed."""
        assert self._line is not None
        self._look_at, self._told = 0.0, True
        with self._hanging_up():
            self._line.hear()
        raise Empty

    def deliver(self) -> bool:
        """Hand over what has come; all of it in an event loop, if that takes no time, one message without."""
        delivered, until = False, monotonic() + (SLICE if self._hub is not None else 0)
        while self._inbox and not (delivered and monotonic() >= until):
            tag, queue, item = self._inbox[0]
            if queue not in self._channel._active_queues:
                self._return_cancelled()
                continue
            self._inbox.popleft()
            self._channel.hand_over(payload_of(item, tag, queue), queue, item)
            delivered = True
        if self._inbox:
            self._call()
        return delivered

    def _return_cancelled(self) -> None:
        active = self._channel._active_queues
        cancelled = [tag for tag, queue, _ in self._inbox if queue not in active]
        self._inbox = deque(entry for entry in self._inbox if entry[1] in active)
        try:
            give_back(self._channel, cancelled)
        except BaseException:
            self._doubtful += cancelled
            raise

    # -- letting go -------------------------------------------------------------------------------------------------

    @property
    def _hub(self) -> Any:
        return self._channel.connection.cycle.hub if self._channel.connection is not None else None

    def _call(self) -> None:
        if self._hub is not None and not self._called:
            self._called = True
            self._hub.call_soon(self.turn)

    def settle(self, tag: str) -> None:
        """A message is acknowledged. At once where no turn of an event loop is sure to come soon."""
        self._settled.append(tag)
        if self._hub is None or not self._channel._active_queues:
            self._settle_now()
        elif threading.get_ident() != self._thread:
            self._call()
        elif monotonic() - self._turned_at > SLICE or len(self._settled) >= BATCH:
            self._ask(0)

    def _drained(self) -> list[str]:
        drained: list[str] = []
        with suppress(IndexError):  # other threads settle and drain too
            while len(drained) < 1000:
                drained.append(self._settled.popleft())
        return drained

    def _settle_now(self) -> None:
        while tags := self._drained():
            try:
                run(
                    self._channel.plain_client, "turn", list(self._channel.entry_keys),
                    len(tags), 0, 0, 0, 0, self.name, 0, 0, *tags,
                )  # fmt: skip
            except BaseException:
                self._settled.extend(tags)
                raise

    def close(self) -> bool:
        """Take no more, acknowledge what is acknowledged, give back what was not handed over. False: it could not."""
        self._closed = True
        line, answered = self._line, True
        if line is not None:
            with suppress(*self._channel.connection_errors, self._channel.ResponseError):
                while self._awaited and not line.lost and line.more(READ_PATIENCE):
                    self._take_in(line)
            answered = not self._awaited
            self._hang_up()
        self._doubtful += [tag for tag, _, _ in self._inbox]
        self._inbox.clear()
        try:
            self._settle_now()
        except stock.redis.exceptions.TimeoutError:
            raise  # a broker that is silent is not waited for twice
        except Exception:
            give_back(self._channel, self._doubtful)
            self._doubtful.clear()
            raise
        give_back(self._channel, self._doubtful)
        self._doubtful.clear()
        return answered

    def retire(self, *, clean: bool) -> None:
        """The channel holds nothing any more; or, not *clean*, what it holds is left to others."""
        if self._owner is not None:
            self._owner.stop()
            if clean:
                self._channel.plain_client.zrem(self._channel.owners_key, self.name)

    def forget(self) -> None:
        """In a forked child: none of this is its own."""
        line, self._line = self._line, None
        if line is not None:
            line.abandon()
        self._awaited.clear()
        self._inbox.clear()
        self._settled.clear()
        self._doubtful.clear()
        self._owner = None
