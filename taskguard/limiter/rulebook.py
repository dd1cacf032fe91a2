"""The rules as this process knows them: always at hand, refreshed in the background, never older than before.

A match costs no round trip. One thread per book listens to the store, is told at once of a change where the store can
push, and looks twice a second where it cannot or where the telling was lost; so a changed rule is in effect in every
process within a second. A version is only ever followed by a larger one: a replica that lags, a store that was emptied
and two servers that disagree change nothing (monotonic reads). A store that is away leaves the rules that are known. A
forked child listens for itself.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from typing import Self

from taskguard.downstream.tending import begins_anew
from taskguard.errors import ConfigurationError, StoreError
from taskguard.events import Event, Observer
from taskguard.forks import undisturbed
from taskguard.ports import RuleStore
from taskguard.rules import Rule, RuleSet

logger = logging.getLogger(__name__)

REST = 0.5
"""Seconds before it listens again after something unforeseen."""


class RuleBook:
    """The cache of one `RuleStore`. It begins to listen when it is first read, and ends with `close` or when it is
    forgotten. *notify* is told of each new version."""

    def __init__(self, store: RuleStore, *, notify: Observer | None = None) -> None:
        self._store = store
        self._notify = notify
        self._set = RuleSet()
        self._known = False
        self._complaint = ""
        self._closed = False
        self.after_fork()
        begins_anew(self)

    def after_fork(self) -> None:
        """A child has its parent's rules, and no thread."""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._since = 0.0
        self._catching_up = False
        self._loaded = threading.Event()
        if self._known:
            self._loaded.set()

    def rules(self, *, patience: float = 0.0) -> RuleSet | None:
        """The rules. Until they were read: None, and those who ask in the first *patience* seconds wait until then."""
        if self._thread is None:
            self._listen()
        if self._loaded.is_set():
            return self._set
        left = self._since + patience - time.monotonic()
        return self._set if left > 0 and self._loaded.wait(left) else None

    @property
    def version(self) -> int:
        """The version that is in effect in this process."""
        return self._set.version

    def saw(self, version: int) -> None:
        """A permit's answer, or another process, speaks of this version: catch up if it is newer. Never waits."""
        if version <= self._set.version or self._catching_up or self._closed:
            return
        self._catching_up = True
        threading.Thread(target=self._catch_up, args=(version,), name="taskguard-rules-refresh", daemon=True).start()

    def wait_for(self, version: int, timeout: float) -> bool:
        """Whether at least *version* is in effect, within *timeout* seconds."""
        self.rules()
        with self._changed:
            return self._changed.wait_for(lambda: self._set.version >= version, timeout)

    def close(self) -> None:
        """Listen no more. The rules stay as they are."""
        self._closed = True

    def _listen(self) -> None:
        with self._changed:
            if self._thread is None and not self._closed:
                self._since = time.monotonic()
                # The thread holds the book weakly, so that one that nobody uses any more is not kept by it.
                given = (weakref.ref(self), self._store)
                self._thread = threading.Thread(target=_listening, args=given, name="taskguard-rules", daemon=True)
                self._thread.start()

    def _catch_up(self, version: int) -> None:
        try:
            with undisturbed:
                self.told(version)
        finally:
            self._catching_up = False

    def told(self, version: int) -> None:
        """The store has this version."""
        if self._loaded.is_set() and version <= self._set.version:
            return
        try:
            found = self._store.rules(self._set.version) if version > self._set.version else None
        except StoreError:
            return
        except (ConfigurationError, ValueError, TypeError, KeyError) as exc:
            # A newer taskguard wrote them, or a stranger did: what is known goes on.
            self._complain(f"version {version} cannot be read ({exc}); version {self._set.version} stays in effect")
            return
        if found is not None:
            self._take(found)
        self._known = True
        self._loaded.set()

    def _take(self, found: RuleSet) -> None:
        with self._changed:
            before = self._set
            if found.version <= before.version:
                return
            self._set = found
            self._complaint = ""
            self._changed.notify_all()
        if self._notify is not None:
            what = found.changes_since(before)
            self._notify(Event(name="rules_changed", detail=f"version {found.version}: {what}"))

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            self._complaint = complaint
            logger.warning("rules: %s", complaint)

    @property
    def closed(self) -> bool:
        """Whether it listens no more."""
        return self._closed


class FixedRules:
    """Rules written down in code, in the place of a `RuleBook`."""

    def __init__(self, *rules: Rule) -> None:
        self._set = RuleSet.of(*rules)
        self.version = 0

    def rules(self, *, patience: float = 0.0) -> RuleSet | None:
        """They."""
        return self._set

    def saw(self, version: int) -> None:
        """They never change."""

    @classmethod
    def of(cls, rules: RuleSet) -> Self:
        """A set that is there already."""
        return cls(*rules.rules)


def _listening(book: weakref.ref[RuleBook], store: RuleStore) -> None:
    mine = threading.current_thread()

    def stop() -> bool:
        listener = book()
        return listener is None or listener.closed or listener._thread is not mine

    def changed(version: int) -> None:
        if (listener := book()) is not None:
            listener.told(version)

    while not stop():
        try:
            store.watch(changed, stop=stop)
        except Exception:
            logger.exception("rules: cannot listen; tried again in %.1f s", REST)
            threading.Event().wait(REST)
