"""``taskguard dlq`` as an operator types it, over stores in memory, in SQLite and in Redis."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len

from taskguard.ports import MessageStore
from taskguard.record import Reason, State
from taskguard.stores import open_store
from taskguard.stores.memory import MemoryStore
from tests.unit.letters import HOSTILE, bury, bury_run, failure, message
from tests.unit.terminal import Run, parsed

FIELDS = {"id", "task", "task_id", "key", "reason", "error", "attempts", "queue", "dead_at", "args", "kwargs"}


@pytest.fixture
def store(store_url: str, namespace: str) -> Iterator[MessageStore]:
    """The store that the commands are told to use."""
    store = open_store(store_url, namespace=namespace)
    yield store
    store.close()


def states(store: MessageStore) -> dict[State, int]:
    """How many records are in each state that has any."""
    return {state: depth.count for state, depth in store.depths().items() if depth.count}


class TestLooking:
    def test_list_has_every_field_as_json(self, run: Run, store: MessageStore) -> None:
        """A script needs nothing else."""
        id = bury(store, message())
        [letter] = parsed(run("dlq", "list", "--json"))
        assert letter.keys() >= FIELDS
        assert (letter["id"], letter["reason"], letter["error"]) == (id, "max_retries", "BankError: bank said 503")
        assert (letter["args"], letter["kwargs"]) == ([1], {"amount": 5})
        assert [attempt["outcome"] for attempt in letter["attempts"]] == ["retry"]

    @pytest.mark.parametrize("columns", [80, 200])
    def test_tables_fit_and_hold_whole_ids(self, run: Run, store: MessageStore, columns: int) -> None:
        """Ids are what the next command needs; long errors are cut, hostile text moves nothing."""
        reasons = list(Reason)
        for order in range(12):
            bury(
                store,
                message(order, key=f"charge:{order}", queue="a-queue-with-a-very-long-name-indeed"),
                failure(reasons[order % 8], HOSTILE * 5),
            )
        ids = [letter["id"] for letter in parsed(run("dlq", "list", "--json"))]
        for words in (("list",), ("search", "charge"), ("groups",), ("stats",), ("show", ids[0])):
            result = run("dlq", *words, columns=columns)
            assert all(cell_len(line) <= columns for line in result.output.splitlines()), words
            assert not {c for c in result.output if unicodedata.category(c) in {"Cc", "Cf", "Cs"}} - {"\n"}, words
        listed = run("dlq", "list", columns=columns).output
        assert all(id in listed for id in ids)
        assert "12 dead letters" in listed

    def test_a_long_list_says_how_much_more_there_is(self, run: Run, store: MessageStore) -> None:
        """A terminal is not flooded, and nothing is hidden in silence."""
        for order in range(3):
            bury(store, message(order))
        assert "2 of 3 dead letters" in run("dlq", "list", "--limit", "2").output
        assert len(parsed(run("dlq", "list", "--limit", "2", "--json"))) == 2
        assert "3 dead letters" in run("dlq", "list", "--limit", "0").output

    def test_filters_narrow(self, run: Run, store: MessageStore) -> None:
        """Every filter of the domain is an option."""
        bury(store, message(1))
        id = bury(store, message(2, task="mail.send", queue="mail"), failure(Reason.POISON, "killed", "PoisonedTask"))
        for words in (
            ("--task", "mail.*"),
            ("--reason", "poison"),
            ("--error", "KILLED"),
            ("--queue", "mail"),
            ("--text", "charge:2"),
            ("--newer-than", "1h", "--task", "mail.*"),
        ):
            assert [letter["id"] for letter in parsed(run("dlq", "list", "--json", *words))] == [id], words
        assert parsed(run("dlq", "list", "--json", "--older-than", "1h")) == []
        assert [letter["id"] for letter in parsed(run("dlq", "search", "charge:2", "--json"))] == [id]
        assert "No dead letter matches in the namespace" in run("dlq", "list", "--task", "nothing").output

    def test_show_takes_the_beginning_of_an_id(self, run: Run, store: MessageStore) -> None:
        """And shows all there is."""
        id = bury(store, message())
        shown = run("dlq", "show", id[:8]).output
        for part in (
            id,
            "shop.charge",
            "task-1",
            "charge:1",
            "max_retries",
            '{"amount": 5}',
            "celery@one",
            "Traceback",
        ):
            assert part in shown
        assert parsed(run("dlq", "show", "task-1", "--json"))[0]["id"] == id

    def test_a_pickle_is_shown_and_never_opened(self, run: Run, store: MessageStore, tmp_path: Path) -> None:
        """Looking at a letter executes nothing of it."""
        trap = tmp_path / "opened"
        body = f"cos\nsystem\n(S'touch {trap}'\ntR.".encode()
        bury(store, message(body=body, content_type="application/x-python-serialize"), failure(Reason.UNDECODABLE))
        assert "not decoded" in run("dlq", "show", "task-1").output
        assert "system" in parsed(run("dlq", "list", "--json"))[0]["body"]
        assert not trap.exists()

    def test_groups_and_stats_count(self, run: Run, store: MessageStore) -> None:
        """By cause, and by task and reason."""
        for order in (1, 2):
            bury(store, message(order), failure(text=f"order {order} refused"))
        bury(store, message(3), failure(text="timeout"))
        groups = parsed(run("dlq", "groups", "--json"))
        assert [group["count"] for group in groups] == [2, 1]
        assert {"group", "task", "reason", "error", "first_at", "last_at", "sample"} <= groups[0].keys()
        [row] = parsed(run("dlq", "stats", "--json"))
        assert (row["task"], row["reason"], row["count"]) == ("shop.charge", "max_retries", 3)

    def test_status_names_every_state(self, run: Run, store: MessageStore) -> None:
        """Empty ones too."""
        bury(store, message())
        rows = parsed(run("status", "--json"))
        assert {row["state"] for row in rows} == set(State)
        assert {row["state"]: row["count"] for row in rows if row["count"]} == {"dead": 1}
        assert "dead" in run("status").output


class TestRequeueing:
    def test_one_id_asks_nothing_and_says_who_sends_it(self, run: Run, store: MessageStore) -> None:
        """Requeueing changes the store alone."""
        id = bury_run(store, message())
        output = run("dlq", "requeue", id).output
        assert "Requeued 1 dead letter: 1 due now." in output
        assert "taskguard relay" in output
        assert states(store) == {State.PENDING: 1}

    def test_many_need_a_yes(self, run: Run, store: MessageStore) -> None:
        """Nobody can answer when stdin is no terminal: then nothing changes, and the way out is said."""
        for order in range(3):
            bury(store, message(order))
        refused = run("dlq", "requeue", "--all", status=1)
        assert refused.stderr == (
            "taskguard: Requeue 3 dead letters? stdin is no terminal, so nobody can answer; add --yes\n"
        )
        assert states(store) == {State.DEAD: 3}
        requeued = parsed(run("dlq", "requeue", "--all", "--yes", "--json"))
        assert [letter["requeued"] for letter in requeued] == [True] * 3
        assert states(store) == {State.PENDING: 3}

    def test_a_group_is_requeued_whole(self, run: Run, store: MessageStore) -> None:
        """One cause is mended, its letters go; the others stay."""
        for order in (1, 2):
            bury(store, message(order), failure(text=f"order {order} refused"))
        bury(store, message(3), failure(text="timeout"))
        group = parsed(run("dlq", "groups", "--json"))[0]["group"]
        run("dlq", "requeue", "--group", group, "--yes")
        assert states(store) == {State.PENDING: 2, State.DEAD: 1}

    def test_a_rate_books_later_moments(self, run: Run, store: MessageStore) -> None:
        """The pace is in the store, not in this process."""
        for order in range(3):
            bury(store, message(order))
        output = run("dlq", "requeue", "--all", "--yes", "--rate", "6/m").output
        assert "1 due now, the last in" in output
        due = sorted(record.due_at or 0.0 for record in store.scan(State.PENDING))
        assert [round(at - due[0]) for at in due] == [0, 10, 20]

    def test_a_dry_run_changes_nothing(self, run: Run, store: MessageStore) -> None:
        """And asks nothing."""
        for order in range(2):
            bury(store, message(order))
        assert "Would requeue 2 dead letters" in run("dlq", "requeue", "--all", "--dry-run").output
        [first, _] = parsed(run("dlq", "requeue", "--all", "--dry-run", "--json"))
        assert (first["requeued"], first["due_at"] is None) == (False, False)
        assert states(store) == {State.DEAD: 2}

    def test_a_reused_key_is_pointed_out(self, run: Run, store: MessageStore) -> None:
        """It would come back; the way out is an edit."""
        bury(store, message(), failure(Reason.KEY_REUSED))
        assert "--key NEW" in run("dlq", "requeue", "task-1").output

    def test_an_edit_is_a_new_attempt(self, run: Run, store: MessageStore) -> None:
        """With the arguments given, and the others as they were."""
        id = bury_run(store, message())
        [letter] = parsed(run("dlq", "edit", id[:10], "--kwargs", '{"amount": 7}', "--deadline", "60", "--json"))
        assert (letter["args"], letter["kwargs"], letter["requeued"]) == ([1], {"amount": 7}, True)
        record = store.find(id)
        assert record is not None
        assert (record.state, record.sequence) == (State.PENDING, 4)
        assert "new attempt" in run("dlq", "edit", bury(store, message(2)), "--args", "[3]").output


class TestPurging:
    def test_even_one_needs_a_yes(self, run: Run, store: MessageStore) -> None:
        """It cannot be undone."""
        id = bury(store, message())
        assert "add --yes" in run("dlq", "purge", id, status=1).stderr
        assert parsed(run("dlq", "purge", id, "--yes", "--json")) == [{"id": id, "purged": True}]
        assert states(store) == {}
        assert "No dead letter matches" in run("dlq", "purge", "--all").output


class TestFiles:
    def test_an_export_brings_everything_back(self, run: Run, store: MessageStore, tmp_path: Path) -> None:
        """Purge, import, and the letters are there again; a second import changes nothing."""
        for order in range(3):
            bury(store, message(order, body=b"\xff\x00"), failure(text=HOSTILE))
        file = str(tmp_path / "letters.jsonl")
        before = parsed(run("dlq", "list", "--json"))
        assert "Exported 3 dead letters" in run("dlq", "export", file).output
        run("dlq", "purge", "--all", "--yes")
        assert "Imported 3 dead letters." in run("dlq", "import", file).output
        assert "Imported 0 dead letters; 3 known already." in run("dlq", "import", file).output
        after = parsed(run("dlq", "list", "--json"))
        changing = {"dead_at"}
        kept = [{name: letter[name] for name in letter.keys() - changing} for letter in (*before, *after)]
        assert sorted(map(str, map(sorted, map(dict.items, kept[:3])))) == sorted(
            map(str, map(sorted, map(dict.items, kept[3:])))
        )

    def test_stdout_and_stdin_are_files_too(self, run: Run, store: MessageStore) -> None:
        """``dlq export | ssh … dlq import -``"""
        id = bury(store, message())
        lines = run("dlq", "export", "--reason", "max_retries").stdout
        assert parsed(run("dlq", "import", "--json", "-", input=lines)) == [{"id": id, "imported": False}]

    def test_a_bad_line_is_named(self, run: Run, store: MessageStore) -> None:
        """By its number, in one line."""
        bury(store, message())
        lines = run("dlq", "export").stdout + "garbage \x1b[2J\n"
        complaint = run("dlq", "import", status=1, input=lines).stderr
        assert complaint.startswith("taskguard: line 2: not a line of `taskguard dlq export`")
        assert complaint.count("\n") == 1


def test_revoked_tasks_are_dropped_when_claimed(run: Run, store: MessageStore) -> None:
    """The revocation is in the store, whatever happens to workers."""
    assert "Revoked 2 tasks for 7d" in run("revoke", "task-1", "task-2").output
    assert parsed(run("revoke", "task-3", "--json")) == [{"task_id": "task-3", "revoked": True}]
    assert str(store.claim(message(), holder="w", lease=15, max_crashes=3)) == "Dropped(reason='revoked')"


@pytest.mark.parametrize(
    ("answer", "left"), [(b"n\n", {State.DEAD: 2}), (b"y\n", {State.PENDING: 2})], ids=["no", "yes"]
)
def test_a_terminal_is_asked(sqlite_url: str, namespace: str, answer: bytes, left: dict[State, int]) -> None:
    """What the operator answers is what happens."""
    store = open_store(sqlite_url, namespace=namespace)
    store.ping()
    for order in range(2):
        bury(store, message(order))
    master, slave = pty.openpty()
    os.write(master, answer)
    words = ["--store", sqlite_url, "--namespace", namespace, "dlq", "requeue", "--all"]
    ended = subprocess.run(
        [sys.executable, "-c", "from taskguard.cli import main; main()", *words],
        stdin=slave,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(slave)
    os.close(master)
    assert "Requeue 2 dead letters?" in ended.stderr
    assert ended.returncode == (0 if answer == b"y\n" else 1)
    assert states(store) == left
    store.close()


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_what_cannot_be_requeued_is_told_apart(run: Run, store: MessageStore) -> None:
    """A letter without a readable message stays; when nothing could be requeued, the status says so."""
    assert isinstance(store, MemoryStore)
    broken = bury(store, message())
    store.records[broken] = replace(store.records[broken], wire=b"?")
    assert "holds no readable message" in run("dlq", "requeue", broken, status=1).stderr
    bury(store, message(2))
    result = run("dlq", "requeue", "--all", "--yes")
    assert "Requeued 1 dead letter" in result.stdout
    assert f"1 letter not requeued: {broken} holds no readable message" in result.stderr
    [outcome] = parsed(run("dlq", "requeue", broken, "--json"))
    assert (outcome["requeued"], outcome["problem"]) == (False, "holds no readable message")
