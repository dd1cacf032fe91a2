"""The process that a worker in rehearsal stands for, and its end.

What a crash leaves behind is decided by the steps that leave the process: calls that change the store, publishing,
acknowledging, and the task's own effects. Between two of these every instant is alike. So each of them is one crash
point, and the points of a task are not listed anywhere: a clean run names them as it comes by.
"""

from __future__ import annotations

import inspect
import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, cast

from taskguard.ports import MessageStore

READS = frozenset({"find", "scan", "depths", "now", "ping", "close", "due_in", "watch_due"})
"""Operations of a store that leave it as it is. All others are crash points, those that are still to come included."""

STEPS = {
    "claim": "before the message is claimed",
    "complete": "after the body, before its completion is stored",
    "rest": "after the body, before its next attempt is stored",
    "bury": "after the body, before its dead letter is stored",
    "discard": "after the body, before it is discarded",
    "acknowledge": "before the message is acknowledged",
}


class Crash(BaseException):
    """The end of a worker's process. No ``except Exception`` of a task's sees it, as none would see SIGKILL."""


class Process:
    """One worker process. It lives through any number of deliveries, and ends at one crash point if told to.

    points: the crash points that the deliveries of the watched task id came by, in order.
    """

    def __init__(self, *, watch: str = "", fatal: int | None = None) -> None:
        self.points: list[str] = []
        self.crashed = ""
        self.bodies = 0
        self._watch = watch
        self._fatal = fatal
        self._task_id = ""
        self._in_body = False
        self._ended = False

    @contextmanager
    def delivery(self, task_id: str) -> Iterator[None]:
        """While this is open a message is being delivered."""
        self._task_id, self._ended = task_id, False
        try:
            yield
        finally:
            self._task_id = ""

    def reach(self, step: str, what: str = "") -> None:
        """A step that leaves the process is about to be made. Raises Crash if it never is."""
        if not self._task_id:
            return
        if self._in_body:
            self._point(f"in the body, before {what or step}")
        else:
            self._point(STEPS.get(step) or f"after the body, before {what or step}")

    def _point(self, text: str) -> None:
        if self._ended:
            raise Crash(self.crashed)  # the body caught the first one; the dead do not go on
        if self._task_id == self._watch:
            self.points.append(text)
            if len(self.points) - 1 == self._fatal:
                self.crashed, self._ended = text, True
                raise Crash(text)

    @contextmanager
    def watching(self, task: Any, effects: Callable[[], Any]) -> Iterator[None]:
        """Count the runs of a task's body, and make a crash point of every line after which *effects* has changed."""
        own, body = task.__dict__.get("run"), task.run
        code = getattr(inspect.unwrap(body), "__code__", None)

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._task_id != self._watch:
                return body(*args, **kwargs)
            self.bodies += 1
            self._point("before the body")
            lookout = _Lookout(code, effects, self._point)
            self._in_body = True
            try:
                with lookout:
                    value = body(*args, **kwargs)
                lookout.look()
                return value
            finally:
                self._in_body = False

        task.run = run
        try:
            yield
        finally:
            if own is None:
                del task.run
            else:
                task.run = own


class _Lookout:
    """Follows a body line by line, and tells when the effects have changed."""

    def __init__(self, code: CodeType | None, effects: Callable[[], Any], tell: Callable[[str], None]) -> None:
        self._code = code
        self._effects = effects
        self._tell = tell
        self._seen = effects()
        self._line = 0

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        if self._code is not None:
            sys.settrace(self._called)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _called(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._stepped if frame.f_code is self._code else None

    def _stepped(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.look()
            self._line = frame.f_lineno
        return self._stepped

    def look(self) -> None:
        """Tell if there is something new."""
        now = self._effects()
        if now != self._seen:
            self._seen = now
            text = linecache.getline(self._code.co_filename, self._line).strip() if self._code and self._line else ""
            self._tell(f"in the body, after line {self._line}, `{text}`" if text else "in the body, after an effect")


def watched(store: MessageStore, process: Process) -> MessageStore:
    """The *store*, every change of it a crash point of *process*."""
    return cast(MessageStore, _Watched(store, process))


class _Watched:
    def __init__(self, store: MessageStore, process: Process) -> None:
        self._store = store
        self._process = process

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._store, name)
        if name.startswith("_") or name in READS or not callable(operation):
            return operation

        def step(*args: Any, **kwargs: Any) -> Any:
            self._process.reach(name, f"`{name}` in the store")
            return operation(*args, **kwargs)

        return step
