"""The tables' versions: made, brought up to date, checked, printed; by function and by ``taskguard schema``."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy import Engine, create_engine, inspect, text

from taskguard.cli import cli
from taskguard.errors import ConfigurationError
from taskguard.stores.sql import SQLStore, administration, migrations
from taskguard.stores.sql.schema import OUTBOX_COLUMNS, messages, metadata
from tests.contracts.messages import message


@pytest.fixture
def url(tmp_path: Path) -> str:
    """An empty database."""
    return f"sqlite:///{tmp_path / 'schema.sqlite3'}"


def make_version_1(url: str) -> Engine:
    """The tables as they were before the outbox, with a message at rest."""
    engine = create_engine(url)
    with engine.begin() as connection:
        metadata.create_all(connection)
        connection.execute(text("DROP TABLE taskguard_schema"))
        connection.execute(text("DROP INDEX taskguard_messages_ordering"))
        connection.execute(text("DROP INDEX taskguard_messages_listed"))
        connection.execute(text("CREATE INDEX taskguard_messages_state ON taskguard_messages (namespace, state)"))
        for column in OUTBOX_COLUMNS:
            connection.execute(text(f"ALTER TABLE taskguard_messages DROP COLUMN {column}"))
        row = {"namespace": "old", "id": "1", "task": "t", "task_id": "i", "message_key": "k", "state": "pending"}
        row |= dict.fromkeys(("fingerprint", "queue", "holder", "lease", "waits_on", "failure", "history"), "")
        names = ", ".join([*row, "is_primary", "sequence", "token", "crashes", "kept", "created_at", "updated_at"])
        values = ", ".join([*(f":{name}" for name in row), *["0"] * 7])
        connection.execute(text(f"INSERT INTO taskguard_messages ({names}) VALUES ({values})"), row)
    return engine


def test_an_empty_database_gets_everything_once(url: str) -> None:
    """The second time there is nothing to do."""
    assert administration.check(url)
    assert administration.create(url)[-1] == f"version {migrations.CURRENT}"
    assert administration.check(url) == []
    assert administration.create(url) == []


def test_older_tables_are_brought_up_to_date_with_what_is_in_them(url: str) -> None:
    """The old rows are no outbox rows; the index that version 3 replaced is gone."""
    engine = make_version_1(url)
    found = administration.check(url)
    assert f"the tables are of version 1, this taskguard needs {migrations.CURRENT}" in found
    assert "column taskguard_messages.ordering is missing" in found
    administration.create(url)
    assert administration.check(url) == []
    with engine.connect() as connection:
        row = connection.execute(messages.select()).one()
        indexes = {index["name"] for index in inspect(connection).get_indexes(messages.name)}
    assert "taskguard_messages_state" not in indexes
    assert (row.namespace, row.outbox, row.ordering, row.ordinal, row.deadline_at) == ("old", False, "", 0, None)
    engine.dispose()


def test_a_store_brings_its_own_tables_up_to_date(url: str) -> None:
    """As it makes them where there are none: a worker of the new version needs nobody."""
    make_version_1(url).dispose()
    store = SQLStore.from_url(url, namespace="new")
    store.schedule(message(), due_at=1.0)
    assert len(store.take_due(limit=5, lease=30)) == 1
    assert administration.check(url) == []
    store.close()


@pytest.mark.parametrize("since", [0, 1])
def test_the_printed_statements_do_the_same(since: int, url: str) -> None:
    """An administrator runs them, and the check is content."""
    if since:
        make_version_1(url).dispose()
    path = url.removeprefix("sqlite:///")
    with sqlite3.connect(path) as connection:
        for statement in administration.ddl("sqlite", since=since):
            connection.execute(statement)
    assert administration.check(url) == []


@pytest.mark.parametrize("kind", ["postgresql", "mysql", "mariadb", "sqlite"])
def test_every_kind_of_database_has_its_statements(kind: str) -> None:
    """For all that there is; unknown kinds and versions are refused with those there are."""
    statements = "\n".join(administration.ddl(kind, since=0))
    assert all(table.name in statements for table in metadata.sorted_tables)
    with pytest.raises(ConfigurationError, match="newest"):
        list(administration.ddl(kind, since=99))
    with pytest.raises(ConfigurationError, match="'oracle'"):
        list(administration.ddl("oracle", since=0))


def test_a_newer_database_says_so(url: str) -> None:
    """Somebody upgraded it before this process."""
    administration.create(url)
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE taskguard_schema SET version = 99"))
    assert administration.check(url) == [
        f"the tables are of version 99, this taskguard needs {migrations.CURRENT}; upgrade taskguard"
    ]
    engine.dispose()


# -- the command -------------------------------------------------------------------------------------------------------


def run(*words: str) -> tuple[int, str]:
    """Its exit status and what it said."""
    result = CliRunner().invoke(cli, words)
    return result.exit_code, result.output


def test_the_command_creates_checks_and_prints(url: str) -> None:
    """Status 1 until the tables fit."""
    status, said = run("schema", "check", "--store", url)
    assert status == 1
    assert "taskguard schema create" in said
    assert run("schema", "create", "--store", url)[0] == 0
    assert run("schema", "create", "--store", url) == (0, "Nothing to do: the tables are there and up to date.\n")
    assert run("schema", "check", "--store", url) == (0, "The tables fit.\n")
    status, said = run("schema", "sql", "--kind", "postgresql", "--from", "1")
    assert status == 0
    assert "ALTER TABLE taskguard_messages ADD COLUMN outbox BOOLEAN DEFAULT false NOT NULL;" in said


def test_without_a_sql_database_the_command_says_what_to_name() -> None:
    """One line."""
    status, said = run("schema", "create", "--store", "redis://localhost/0")
    assert status == 1
    assert "redis:// is no SQL database, and the outbox and its tables are in one; give --store" in said


def test_the_outbox_commands_answer_on_an_empty_outbox(url: str) -> None:
    """Counts of nothing, and nothing deleted without a yes."""
    assert run("schema", "create", "--store", url)[0] == 0
    assert run("outbox", "status", "--json", "--store", url)[1].startswith('[\n{"waiting": 0, "lag": 0.0')
    assert run("outbox", "peek", "--json", "--store", url) == (0, "[]\n")
    assert run("outbox", "requeue", "--store", url) == (0, "Due now: 0 messages.\n")
    status, said = run("outbox", "purge", "--store", url)
    assert status == 1
    assert "--yes" in said
    assert run("outbox", "purge", "--yes", "--store", url) == (0, "Deleted: 0 messages.\n")
    status, said = run("outbox", "relay", "--store", url)
    assert status == 1
    assert "-A" in said


def test_an_outbox_that_lags_is_not_healthy(url: str) -> None:
    """``outbox status --max-lag`` is a health check: its exit status says so, and what to look at."""
    make_version_1(url).dispose()
    administration.create(url)
    engine = create_engine(url)
    an_hour_ago = round((time.time() - 3600) * 1000)
    with engine.begin() as connection:
        connection.execute(messages.update().values(namespace="default", outbox=True, due_at=an_hour_ago))
    engine.dispose()
    check = ("outbox", "status", "--store", url)
    assert run(*check, "--max-lag", "2h")[0] == 0
    for more in ((), ("--json",)):
        status, said = run(*check, "--max-lag", "5m", *more)
        assert status == 1
        assert "the oldest message of the outbox has waited 1h, longer than 5m; see that a relay runs" in said
