"""``taskguard schema``: the tables of the SQL message store, which are the outbox's too."""

from __future__ import annotations

import click

from taskguard.cli.complaints import Complaint
from taskguard.cli.connection import connection_options
from taskguard.cli.places import databases


@click.group("schema")
def schema() -> None:
    """Tables of the SQL message store and the outbox: create them, print their DDL, check them."""


@schema.command("create")
@connection_options
@click.pass_context
def create(ctx: click.Context) -> None:
    """Create the tables, or bring those of an older version up to date. Repeating it does nothing."""
    from taskguard.stores.sql import administration

    for url in databases(ctx):
        done = administration.create(url)
        click.echo("\n".join(done) if done else "Nothing to do: the tables are there and up to date.")


@schema.command("sql")
@click.option("--kind", metavar="NAME", help="postgresql, mysql or sqlite; without it, that of the store.")
@click.option("--from", "since", type=int, default=0, show_default=True, help="Version of the tables that are there.")
@connection_options
@click.pass_context
def sql(ctx: click.Context, kind: str | None, since: int) -> None:
    """Print the DDL, for a database administrator or a migration. Connects to nothing."""
    from taskguard.stores.sql import administration

    name = kind or databases(ctx)[0].partition("://")[0].partition("+")[0]
    for statement in administration.ddl("postgresql" if name == "postgres" else name, since=since):
        click.echo(f"{statement};\n")


@schema.command("check")
@connection_options
@click.pass_context
def check(ctx: click.Context) -> None:
    """Say what the tables lack. Exit status 1 where they lack anything."""
    from taskguard.stores.sql import administration

    found = [line for url in databases(ctx) for line in administration.check(url)]
    for line in found:
        click.echo(line)
    if found:
        raise Complaint("the tables do not fit this taskguard; run `taskguard schema create` with the same options")
    click.echo("The tables fit.")
