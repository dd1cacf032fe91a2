"""Dead letters: what an operator can do with them.

Everything here is a read or one state change of the store; nothing publishes. A requeued letter is a due message like
any other, so a crash between the decision and the broker loses nothing, and a paced requeue only books later moments:
it keeps its pace after the operator's terminal is closed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from taskguard import headers
from taskguard.envelope import Envelope
from taskguard.errors import MessageError, UnknownRecord
from taskguard.idempotency import check_key
from taskguard.letter import EVERYTHING, JSON_TYPE, Arguments, DeadLetter, Filter
from taskguard.lifecycle import PUBLISHED_RETENTION
from taskguard.ports import MessageStore
from taskguard.record import State


@dataclass(slots=True, kw_only=True)
class Tally:
    """Letters counted together, the first that was met as a sample. Instants are epoch seconds."""

    sample: DeadLetter
    count: int = 0
    oldest_at: float = float("inf")
    newest_at: float = 0.0

    def add(self, letter: DeadLetter) -> None:
        """Count one more."""
        self.count += 1
        self.oldest_at = min(self.oldest_at, letter.dead_at)
        self.newest_at = max(self.newest_at, letter.dead_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Requeued:
    """What became of one requeue: due at ``due_at``, or not requeued because of ``problem``."""

    id: str
    letter: DeadLetter | None
    due_at: float | None
    problem: str = ""


class DeadLetters:
    """The dead letters of a store."""

    def __init__(self, store: MessageStore) -> None:
        self._store = store

    def select(self, wanted: Filter = EVERYTHING) -> Iterator[DeadLetter]:
        """The letters meant by *wanted*, the oldest first."""
        now = self._store.now()
        letters = (DeadLetter.of(record) for record in self._store.scan(State.DEAD))
        return (letter for letter in letters if wanted.matches(letter, now=now))

    def find(self, id: str) -> DeadLetter | None:
        """The dead letter with exactly this id."""
        record = self._store.find(id)
        return DeadLetter.of(record) if record is not None and record.state is State.DEAD else None

    def resolve(self, names: Sequence[str]) -> list[str]:
        """The ids meant by ids, by unique beginnings of ids, or by task ids, each once.

        Raises UnknownRecord for a name that means no letter, or more than one.
        """
        meant: dict[str, set[str]] = {name: {name} if self.find(name) else set() for name in names}
        open_names = [name for name, ids in meant.items() if not ids]
        if open_names:
            for record in self._store.scan(State.DEAD):
                for name in open_names:
                    if name and (record.id.startswith(name) or record.task_id == name):
                        meant[name].add(record.id)
        for name, ids in meant.items():
            if not ids:
                raise UnknownRecord(f"no dead letter has the id {name!r}; `taskguard dlq list` shows those there are")
            if len(ids) > 1:
                raise UnknownRecord(f"{len(ids)} dead letters are meant by {name!r}; write more of the id")
        return list(dict.fromkeys(id for ids in meant.values() for id in ids))

    def groups(self, wanted: Filter = EVERYTHING) -> list[Tally]:
        """The letters by cause, the most frequent first."""
        return _tallied(self.select(wanted), lambda letter: letter.group)

    def stats(self, wanted: Filter = EVERYTHING) -> list[Tally]:
        """The letters by task and reason, the most frequent first."""
        return _tallied(self.select(wanted), lambda letter: (letter.record.task, letter.failure.reason))

    def requeue(
        self, ids: Iterable[str], *, rate: float | None = None, deadline: float | None = None, dry_run: bool = False
    ) -> Iterator[Requeued]:
        """Make letters due again with all their chances back, lazily, one answer for each id.

        rate: letters per second; each is due at its own moment, so the relay publishes no faster.
        deadline: seconds each has from the moment it is due. Without one, a deadline that will have passed is removed.
        dry_run: answer, change nothing.
        """
        start, booked = self._store.now(), 0
        for id in ids:
            due_at = start + booked / rate if rate else start
            letter = self.find(id)
            problem = "is no dead letter any more"
            if letter is not None:
                problem = "holds no readable message"
                if letter.envelope is not None:
                    envelope = reborn(letter.envelope, due_at=due_at, deadline=deadline)
                    if dry_run or self._store.requeue(id, envelope, due_at=due_at):
                        booked += 1
                        yield Requeued(id=id, letter=letter, due_at=due_at)
                        continue
            yield Requeued(id=id, letter=letter, due_at=None, problem=problem)

    def edit(
        self,
        id: str,
        *,
        args: list[Any] | None = None,
        kwargs: dict[str, Any] | None = None,
        key: str | None = None,
        deadline: float | None = None,
    ) -> bool:
        """Requeue a letter as a new attempt with other arguments or another key; what is None stays as it was.

        Returns False when it is no dead letter any more. Raises MessageError when it cannot be edited so, and
        ConfigurationError for a key that cannot be one.
        """
        letter = self.find(id)
        if letter is None:
            return False
        if key is not None and letter.record.primary and key != letter.record.key:
            raise MessageError(
                f"letter {id} was run under the key {letter.record.key!r}, which holds its history; "
                "a new key is for letters that never ran, such as key_reused"
            )
        now = self._store.now()
        envelope = reborn(edited(letter, args=args, kwargs=kwargs, key=key), due_at=now, deadline=deadline)
        return self._store.requeue(id, envelope, due_at=now)

    def purge(self, ids: Iterable[str]) -> Iterator[tuple[str, bool]]:
        """Forget letters, lazily; each with whether it was there. Old copies in a queue stay dead for seven days."""
        return ((id, self._store.purge(id, retention=PUBLISHED_RETENTION)) for id in ids)


def _tallied(letters: Iterable[DeadLetter], name: Callable[[DeadLetter], Hashable]) -> list[Tally]:
    tallies: dict[Hashable, Tally] = {}
    for letter in letters:
        tallies.setdefault(name(letter), Tally(sample=letter)).add(letter)
    return sorted(tallies.values(), key=lambda tally: (-tally.count, tally.oldest_at))


def reborn(envelope: Envelope, *, due_at: float, deadline: float | None) -> Envelope:
    """The message as requeued: no retry used, and no deadline that will have passed when it is due."""
    if deadline is not None:
        envelope = headers.with_deadline(envelope, due_at + deadline)
    elif envelope.deadline_at is None or envelope.deadline_at <= due_at:
        envelope = headers.with_deadline(envelope, None)
    return headers.next_attempt(envelope, retries=0)


def edited(
    letter: DeadLetter, *, args: list[Any] | None = None, kwargs: dict[str, Any] | None = None, key: str | None = None
) -> Envelope:
    """The letter's message with other arguments, as JSON, or another key. Its sequence is not advanced.

    Raises MessageError when the old arguments are needed and cannot be decoded.
    """
    envelope = letter.envelope
    if envelope is None:
        raise MessageError(f"letter {letter.id} holds no readable message; purge it")
    if key is not None:
        envelope = envelope.replace(key=check_key(key, task=envelope.task))
    if args is None and kwargs is None:
        return envelope
    before = letter.arguments
    if before is None and (args is None or kwargs is None):
        raise MessageError(
            f"letter {letter.id} has a body that is not plain JSON ({envelope.content_type}); give both args and kwargs"
        )
    before = before or Arguments([], {})
    after = Arguments(before.args if args is None else args, before.kwargs if kwargs is None else kwargs, before.embed)
    plain = {name: value for name, value in envelope.headers.items() if name != "compression"}
    return envelope.replace(
        body=after.to_body(),
        content_type=JSON_TYPE,
        content_encoding="utf-8",
        fingerprint="",  # made by the worker, which knows the task's signature
        headers=plain | {"argsrepr": repr(tuple(after.args))[:1024], "kwargsrepr": repr(after.kwargs)[:1024]},
    )
