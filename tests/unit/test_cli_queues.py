"""``taskguard queues``: pausing, resuming and listing, as an operator types it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from taskguard.cli import cli
from taskguard.ports import PermitStore
from taskguard.stores import open_permits
from taskguard.stores.sql import administration

Run = Callable[..., Result]


@pytest.fixture
def run(sqlite_url: str, namespace: str) -> Run:
    """Type a ``taskguard queues`` command that must end with *status*."""

    administration.create(sqlite_url)  # a worker has used it

    def typed(*words: str, status: int = 0) -> Result:
        where = ("--store", sqlite_url, "--namespace", namespace)
        result = CliRunner().invoke(cli, ["queues", *words, *where], env={"COLUMNS": "100"}, prog_name="taskguard")
        assert result.exit_code == status, result.output
        return result

    return typed


@pytest.fixture
def permits(run: Run, sqlite_url: str, namespace: str) -> PermitStore:
    """The permits the commands talk to."""
    return open_permits(sqlite_url, namespace=namespace, timeout=5)


def test_a_queue_is_paused_until_it_is_resumed(run: Run, permits: PermitStore) -> None:
    """With who and why, for whoever looks."""
    assert run("pause", "mail", "--why", "the provider moves").output == "Paused mail until taskguard queues resume.\n"
    until, who, why = permits.paused()["mail"]
    assert (until, why) == (None, "the provider moves")
    assert who
    assert run("resume", "mail").output == "Resumed mail.\n"
    assert permits.paused() == {}


def test_a_pause_may_have_an_end(run: Run, permits: PermitStore) -> None:
    """Counted by the store's clock."""
    assert run("pause", "mail", "sms", "--for", "10m").output == "Paused mail for 10m.\nPaused sms for 10m.\n"
    now = permits.now()
    for until, _, _ in permits.paused().values():
        assert until is not None
        assert now + 590 < until <= now + 600


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("",), "'' is no name"),
        (("mail", " \t"), "is no name"),
        (("mail", "--for", "0s"), "'0s' ends before it begins"),
    ],
)
def test_what_cannot_be_paused_is_told_in_one_line(
    run: Run, permits: PermitStore, words: tuple[str, ...], complaint: str
) -> None:
    """And nothing is."""
    said = run("pause", *words, status=2).stderr
    assert complaint in said
    assert len(said.strip().splitlines()) == 1
    assert permits.paused() == {}


def test_resuming_what_was_not_paused_says_so(run: Run) -> None:
    """It is no error: the queue is consumed, as was asked for."""
    assert run("resume", "mail").output == "mail was not paused.\n"
    assert json.loads(run("resume", "mail", "--json").output) == [{"queue": "mail", "resumed": False}]


def test_the_paused_are_listed(run: Run, permits: PermitStore) -> None:
    """A circuit that paused a queue is told from a person; what a name holds cannot move the cursor."""
    assert run("list").output == "No queue is paused.\n"
    permits.pause("sms\x1b[2J", until=permits.now() + 90, who="circuit bank", why="9 of 10 calls failed")
    permits.pause("mail", until=None, who="ann", why="")
    lines = run("list").output.splitlines()
    assert lines[0].split() == ["queue", "for", "by", "why"]
    assert lines[2].split() == ["mail", "until", "resumed", "ann"]
    assert "1m" in lines[3]
    assert "circuit bank" in lines[3]
    assert "\x1b" not in "".join(lines)
    told = json.loads(run("list", "--json").output)
    assert [each["queue"] for each in told] == ["mail", "sms\x1b[2J"]
    assert told[0] == {"queue": "mail", "until": None, "who": "ann", "why": ""}
    paused = json.loads(run("pause", "fax", "--for", "1h", "--json").output)
    assert paused[0]["until"] is not None
