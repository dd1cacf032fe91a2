"""Several real processes at one store, by the server's clock: one key has one holder, one message one relay."""

from __future__ import annotations

import multiprocessing
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest

from taskguard.custody import Claimed, Completed, Dropped, Hold, InProgress, Unique
from taskguard.ports import MessageStore
from taskguard.record import State
from taskguard.stores import open_store
from tests.contracts.messages import DAY, ask, attempt, existing, message, run

PROCESSES = 4
ROUNDS = 10
PATIENCE = 60

Racer = Callable[[MessageStore, int, Barrier], list[Any]]


@pytest.fixture(params=["redis", "sqlite", "postgresql", "mariadb"])
def store_url(request: pytest.FixtureRequest) -> str:
    """The URL of each backend that processes can share."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def store(store_url: str, namespace: str) -> Iterator[MessageStore]:
    """An empty store that goes by its server's clock."""
    with closing(open_store(store_url, namespace=namespace, timeout=30)) as store:
        store.ping()
        yield store


class Racers:
    """Four processes that live through many races, because starting them costs more than a race."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._start = context.Barrier(PROCESSES, timeout=PATIENCE)
        self._pipes, self._processes = [], []
        for number in range(PROCESSES):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(number, self._start, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, racer: Racer, url: str, namespace: str) -> list[list[Any]]:
        """Run *racer* in every process at once. Returns what each of them saw."""
        for pipe in self._pipes:
            pipe.send((racer, url, namespace))
        seen = [pipe.recv() for pipe in self._pipes]
        self._start.reset()
        for outcome in seen:
            if isinstance(outcome, str):
                pytest.fail(f"a racer failed:\n{outcome}")
        return seen

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(PATIENCE)
            process.kill()


def _serve(number: int, start: Barrier, pipe: Connection) -> None:
    while True:
        try:
            racer, url, namespace = pipe.recv()
        except EOFError:
            return
        try:
            with closing(open_store(url, namespace=namespace, timeout=30)) as store:
                store.ping()
                seen = racer(store, number, start)
        except BaseException:
            start.abort()
            seen = traceback.format_exc()
        pipe.send(seen)


@pytest.fixture(scope="module")
def racers() -> Iterator[Racers]:
    """The processes, for all races of this module."""
    with closing(Racers()) as racers:
        yield racers


def claim_keys(store: MessageStore, number: int, start: Barrier) -> list[Any]:
    """The same message is delivered to every process."""
    answers = []
    for n in range(ROUNDS):
        start.wait()
        answers.append(ask(store, message(f"key-{n}"), f"worker-{number}/{n}"))
    return answers


def test_one_of_many_processes_is_given_a_new_key(
    store: MessageStore, store_url: str, namespace: str, racers: Racers
) -> None:
    """Exactly one is told Claimed; all others that the message runs."""
    for answers in zip(*racers.run(claim_keys, store_url, namespace), strict=True):
        assert Counter(type(answer) for answer in answers) == {Claimed: 1, InProgress: PROCESSES - 1}
        (granted,) = [answer for answer in answers if isinstance(answer, Claimed)]
        assert granted.crashes == 0
    assert store.depths()[State.RUNNING].count == ROUNDS


def claim_duplicates(store: MessageStore, number: int, start: Barrier) -> list[Any]:
    """Every process has a message of its own with the same key, and completes what it is given."""
    completions = []
    for n in range(ROUNDS):
        duplicate = message(f"key-{n}", task_id=f"task-{number}")
        start.wait()
        answer = ask(store, duplicate, f"worker-{number}/{n}")
        if isinstance(answer, Claimed):
            done = store.complete(duplicate.id, answer.token, result=b"%d" % number, retention=DAY)
            completions.append((n, number, done))
        else:
            assert isinstance(answer, InProgress | Completed), answer
    return completions


def test_one_of_many_duplicates_completes(store: MessageStore, store_url: str, namespace: str, racers: Racers) -> None:
    """However claims and completions interleave, a key is completed once, and keeps the result of that run."""
    completions = [each for seen in racers.run(claim_duplicates, store_url, namespace) for each in seen]
    assert sorted(n for n, _, _ in completions) == list(range(ROUNDS))
    for n, number, done in completions:
        assert done
        assert existing(store, message(f"key-{n}").id).result == b"%d" % number


def test_one_of_many_processes_takes_a_lapsed_run_over(
    store: MessageStore, store_url: str, namespace: str, racers: Racers
) -> None:
    """The crash is counted once, and the lost run's token is worth nothing."""
    stale = {}
    for n in range(ROUNDS):
        answer = store.claim(message(f"key-{n}"), holder="dead/0", lease=0, max_crashes=9)
        assert isinstance(answer, Claimed)
        stale[n] = answer.token
    for n, answers in enumerate(zip(*racers.run(claim_keys, store_url, namespace), strict=True)):
        assert Counter(type(answer) for answer in answers) == {Claimed: 1, InProgress: PROCESSES - 1}
        (granted,) = [answer for answer in answers if isinstance(answer, Claimed)]
        assert granted.crashes == 1
        assert granted.token > stale[n]
        assert not store.complete(message(f"key-{n}").id, stale[n], result=b"", retention=DAY)


def take_batches(store: MessageStore, number: int, start: Barrier) -> list[Any]:
    """Every process is a relay, and takes what is due until nothing is."""
    start.wait()
    taken: list[str] = []
    while leased := store.take_due(limit=7, lease=600):
        taken += [item.id for item in leased]
        assert store.remove(leased[::2]) == len(leased[::2])
    return taken


def test_no_message_is_leased_to_two_relays(
    store: MessageStore, store_url: str, namespace: str, racers: Racers
) -> None:
    """Several relays share the work: each due message is taken once, and none is left."""
    due = {message(f"key-{n}", task_id=f"task-{n}").copy_id for n in range(200)}
    for n in range(200):
        store.schedule(message(f"key-{n}", task_id=f"task-{n}"), due_at=0.0)
    seen = racers.run(take_batches, store_url, namespace)
    taken = [id for ids in seen for id in ids]
    assert len(taken) == len(set(taken))
    # A relay may have passed over rows that another was reading and stopped; whoever comes next finds them.
    taken += [item.id for item in store.take_due(limit=200, lease=600)]
    assert sorted(taken) == sorted(due)


def hold_names(store: MessageStore, number: int, start: Barrier) -> list[Any]:
    """Every process queues a message of its own under the same unique name."""
    holders = []
    for n in range(ROUNDS):
        mine = message(f"key-{n}", task_id=f"task-{number}")
        start.wait()
        holders.append(store.schedule(mine, due_at=9e9, unique=Unique(f"name-{n}", 600)))
    return holders


def test_one_of_many_producers_holds_a_unique_name(
    store: MessageStore, store_url: str, namespace: str, racers: Racers
) -> None:
    """All are told the same task id, and only that task's message is kept."""
    for holders in zip(*racers.run(hold_names, store_url, namespace), strict=True):
        assert len(set(holders)) == 1
    assert store.depths()[State.PENDING].count == ROUNDS


def end_or_wait(store: MessageStore, number: int, start: Barrier) -> list[Any]:
    """One process completes a run while the others, told that it is in progress, go to wait for it."""
    for n in range(ROUNDS):
        running = message(f"key-{n}")
        token = run(store, running) if number == 0 else 0
        start.wait()
        if number == 0:
            assert store.complete(running.id, token, result=b"", retention=DAY)
        else:
            waiting = message(f"key-{n}", task_id=f"task-{number}-{n}")
            store.schedule(waiting, due_at=9e9, waits_on=running.id)
    return []


def test_no_duplicate_sleeps_through_the_outcome_it_waits_for(
    store: MessageStore, store_url: str, namespace: str, racers: Racers
) -> None:
    """Whether a message began to wait just before or just after the run ended, it is due now."""
    racers.run(end_or_wait, store_url, namespace)
    leased = store.take_due(limit=1000, lease=600)
    assert len(leased) == ROUNDS * (PROCESSES - 1)


def settle_against_rescue(store: MessageStore, number: int, start: Barrier) -> list[Any]:
    """The worker of a lapsed run completes it, a parent reports its crash, and two relays rescue it, all at once."""
    wins: list[Any] = []
    for n in range(ROUNDS):
        lapsed = message(f"key-{n}")
        start.wait()
        match number:
            case 0:
                token = existing(store, lapsed.id).token
                wins.append(store.complete(lapsed.id, token, result=b"", retention=DAY))
            case 1:
                wins.append(store.crash(Hold(lapsed.id, f"worker/{n}"), lapsed, attempt=attempt("crash")))
            case _:
                wins.append(lapsed.id in [item.id for item in store.take_due(limit=1000, lease=600)])
    return wins


def test_a_lapsed_run_is_either_completed_or_rescued(
    store: MessageStore, store_url: str, namespace: str, racers: Racers
) -> None:
    """Never both, never neither, and never counted as two crashes."""
    for n in range(ROUNDS):
        store.claim(message(f"key-{n}"), holder=f"worker/{n}", lease=0, max_crashes=9)
    racers.run(settle_against_rescue, store_url, namespace)
    for n in range(ROUNDS):
        record = existing(store, message(f"key-{n}").id)
        match record.state:
            case State.DONE:
                assert (record.crashes, record.wire) == (0, None)
            case State.PENDING:
                assert record.crashes == 1
                assert record.wire is not None
            case _:
                pytest.fail(f"neither completed nor rescued: {record}")


def revoke_while_claiming(store: MessageStore, number: int, start: Barrier) -> list[Any]:
    """An operator revokes a task while workers claim it."""
    answers: list[Any] = []
    for n in range(ROUNDS):
        start.wait()
        if number == 0:
            store.revoke([f"task-{n}"], retention=DAY)
        else:
            answers.append(ask(store, message(f"key-{n}", task_id=f"task-{n}"), f"worker-{number}/{n}"))
    return answers


def test_a_revocation_comes_before_a_claim_or_after_it(
    store: MessageStore, store_url: str, namespace: str, racers: Racers
) -> None:
    """A task runs once or is dropped; the record says the same as the answers did."""
    seen = [answers for answers in racers.run(revoke_while_claiming, store_url, namespace) if answers]
    for n, answers in enumerate(zip(*seen, strict=True)):
        kinds = Counter(type(answer) for answer in answers)
        state = existing(store, message(f"key-{n}").id).state
        if kinds[Claimed]:
            assert (kinds[Claimed], state) == (1, State.RUNNING)
        else:
            assert (kinds, state) == ({Dropped: PROCESSES - 1}, State.DISCARDED)
