"""``taskguard status``: the depth of each state."""

from __future__ import annotations

import click

from taskguard.cli.connection import with_store
from taskguard.cli.output import json_option, print_json
from taskguard.cli.text import age
from taskguard.clock import iso
from taskguard.ports import MessageStore


@click.command("status")
@with_store
@json_option
def status(store: MessageStore, as_json: bool) -> None:
    """How many messages are in each state, and how old the oldest is."""
    depths, now = store.depths(), store.now()
    if as_json:
        print_json(
            {
                "state": state.value,
                "count": depth.count,
                "oldest_at": None if depth.oldest_at is None else iso(depth.oldest_at),
                "oldest_age": None if depth.oldest_at is None else round(max(0.0, now - depth.oldest_at), 3),
            }
            for state, depth in depths.items()
        )
        return
    due_in = store.due_in()
    from taskguard.cli.screen import console, table

    rows = table()
    rows.expand = False
    rows.add_column("state", min_width=10)
    rows.add_column("count", justify="right", min_width=8)
    rows.add_column("oldest", justify="right", min_width=8)
    for state, depth in depths.items():
        oldest = "-" if depth.oldest_at is None else age(now - depth.oldest_at)
        rows.add_row(state.value, f"{depth.count:,}", oldest, style="" if depth.count else "dim")
    screen = console()
    screen.print(rows)
    screen.print("What waits in the broker's queues is not counted: no worker has taken it yet.", style="dim")
    if due_in is not None:
        late = due_in <= 0
        screen.print(f"the longest due has waited {age(-due_in)}" if late else f"the next is due in {age(due_in)}")
