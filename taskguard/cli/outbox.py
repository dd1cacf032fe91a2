"""``taskguard outbox``: what producers' transactions left in a database, and the relay that publishes it."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from taskguard.cli.complaints import Complaint
from taskguard.cli.connection import celery_app, connection_options, named_settings
from taskguard.cli.output import confirm, json_option, print_json, yes_option
from taskguard.cli.parameters import duration, lasting
from taskguard.cli.places import outbox_store, settings_of
from taskguard.cli.text import age, plural
from taskguard.clock import iso
from taskguard.errors import TaskguardError

if TYPE_CHECKING:
    from taskguard.relay import Relay

PROGRESS_EVERY = 0.25


@click.group("outbox")
def outbox() -> None:
    """The outbox: messages that transactions wrote and a relay publishes."""


@outbox.command("status")
@click.option("--watch", is_flag=True, help="Go on, with the rate of each second, until Ctrl-C.")
@click.option("--max-lag", callback=lasting, metavar="AGE", help="Exit status 1 where the oldest has waited longer.")
@connection_options
@json_option
@click.pass_context
def status(ctx: click.Context, watch: bool, max_lag: float | None, as_json: bool) -> None:
    """How many messages wait, how long the oldest has, and how many were refused. A health check with --max-lag."""
    rows = outbox_store(ctx).outbox
    now = rows.status()
    if as_json:
        found = {name: round(value, 3) for name, value in asdict(now).items()}
        print_json([{**found, "namespace": settings_of(ctx).namespace}])
        _complain_of_lag(now.lag, max_lag)
        return
    from taskguard.cli.screen import console, table

    shown = table()
    shown.expand = False
    for name in ("waiting", "lag", "later", "retrying", "dead", "ordering keys"):
        shown.add_column(name, justify="right", min_width=8)
    shown.add_row(
        f"{now.waiting:,}", age(now.lag), f"{now.later:,}", f"{now.retrying:,}", f"{now.dead:,}", f"{now.keys:,}"
    )
    screen = console()
    screen.print(shown)
    screen.print(f"namespace {settings_of(ctx).namespace}", style="dim")
    _complain_of_lag(now.lag, max_lag)
    with suppress(KeyboardInterrupt):
        while watch:
            before, since = now.waiting, time.monotonic()
            time.sleep(1.0)
            now = rows.status()
            change = (now.waiting - before) / (time.monotonic() - since)
            click.echo(f"{now.waiting:,} wait, the oldest for {now.lag:.1f} s, {change:+,.0f} a second")
            _complain_of_lag(now.lag, max_lag)


def _complain_of_lag(lag: float, most: float | None) -> None:
    if most is not None and lag > most:
        raise Complaint(
            f"the oldest message of the outbox has waited {age(lag)}, longer than {age(most)}; "
            "see that a relay runs (taskguard relay, or any worker) and reaches the broker"
        )


@outbox.command("peek")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True)
@connection_options
@json_option
@click.pass_context
def peek(ctx: click.Context, limit: int, as_json: bool) -> None:
    """The next messages, the longest due first."""
    store = outbox_store(ctx)
    records = store.outbox.peek(limit)
    if as_json:
        print_json(
            {
                "id": record.id,
                "task": record.task,
                "task_id": record.task_id,
                "key": record.key,
                "queue": record.queue,
                "due_at": iso(record.due_at),
                "refused": record.crashes,
                "bytes": len(record.wire or b""),
            }
            for record in records
        )
        return
    from taskguard.cli.screen import cell, console, table

    shown = table()
    for name in ("due", "task", "task id", "queue"):
        shown.add_column(name)
    shown.add_column("refused", justify="right")
    now = store.now()
    for record in records:
        late = now - record.due_at
        due = f"{age(late)} ago" if late >= 0 else f"in {age(-late)}"
        tries = str(record.crashes) if record.crashes else ""
        shown.add_row(due, cell(record.task), cell(record.task_id), cell(record.queue), tries)
    console().print(shown)


@outbox.command("relay")
@click.option("--batch", type=click.IntRange(min=1), default=500, show_default=True, help="Messages at once.")
@click.option(
    "--poll", callback=duration, default="1s", show_default=True, metavar="AGE", help="Between looks when idle."
)
@click.option("--once", is_flag=True, help="Publish what is due now, then end; status 1 where some of it is left.")
@connection_options
@click.pass_context
def relay(ctx: click.Context, batch: int, poll: float, once: bool) -> None:
    """Publish the outbox until SIGTERM or Ctrl-C. Any number of relays share the work."""
    app = celery_app(ctx)
    if app is None:
        raise Complaint("a relay publishes with an app's broker settings; name the app with -A, such as -A workers.app")
    from taskguard.celery.install import install
    from taskguard.celery.runtime import runtime_of
    from taskguard.celery.worker import make_relay

    runtime, given = runtime_of(app), named_settings(ctx)
    if "namespace" in given:
        runtime = install(app, **{**runtime.settings.arguments(), "namespace": given["namespace"]})
    if runtime.refusal is not None:
        raise runtime.refusal
    store = outbox_store(ctx, creates=True)
    relaying = make_relay(app, store=store, outbox_batch=batch, poll=poll)
    if once:
        done = _drain(relaying, store.outbox)
        if complaint := _complaint(done, store.outbox.status().waiting):
            raise complaint
        click.echo(f"Published {plural(done.sent, 'message')}.")
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    click.echo(f"Relaying the outbox of {app.main or app}; Ctrl-C ends it.", err=True)
    relaying.run(stop)


@dataclass(slots=True)
class _Drained:
    """What ``--once`` did: how many were published or settled, how many were not, and the broker's error."""

    sent: int = 0
    kept: int = 0
    away: Exception | None = None


def _drain(relaying: Relay, rows: Any) -> _Drained:
    """Publish until nothing is due or the broker is away; with a bar where stderr is a terminal."""
    if not sys.stderr.isatty():
        return _drained(relaying, lambda sent: None)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("publishing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:,.0f}/s"))
    started, drawn = time.monotonic(), 0.0
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("publishing", total=rows.status().waiting, rate=0.0)

        def draw(sent: int) -> None:
            nonlocal drawn
            now = time.monotonic()
            if now - drawn >= PROGRESS_EVERY:
                drawn = now
                bar.update(task, completed=sent, rate=sent / (now - started))

        return _drained(relaying, draw)


def _drained(relaying: Relay, draw: Callable[[int], None]) -> _Drained:
    done = _Drained()
    try:
        while True:
            handed = relaying.hand_over_batch()
            done.sent += handed.published
            done.kept += handed.taken - handed.published
            done.away = handed.away
            if handed.away is not None:
                break
            stepped = 0 if handed.taken else relaying.step()
            done.sent += stepped
            if not handed.taken and not stepped:
                break
            draw(done.sent)
    except TaskguardError:
        raise
    except Exception as exc:  # noqa: BLE001 (a broker's errors are its transport's)
        done.away = exc
    return done


def _complaint(done: _Drained, waiting: int) -> Complaint | None:
    """What to say of a drain that left something."""
    published = f"published {plural(done.sent, 'message')}"
    if done.away is not None:
        why = f"{type(done.away).__name__}: {done.away}"
        return Complaint(
            f"the broker is away, {waiting:,} still due, {published}; when it is back, run this again ({why})"
        )
    if waiting or done.kept:
        left = f"{waiting:,} still due, {done.kept:,} refused or held back"
        return Complaint(f"{left}, {published}; `taskguard outbox peek` shows what is left")
    return None


@outbox.command("requeue")
@connection_options
@click.pass_context
def requeue(ctx: click.Context) -> None:
    """Try what the broker refused again, now. Dead letters among them are requeued with `taskguard dlq requeue`."""
    click.echo(f"Due now: {plural(outbox_store(ctx).outbox.requeue(), 'message')}.")


@outbox.command("purge")
@click.option("--task", metavar="NAME", help="Only messages of this task.")
@click.option("--older-than", callback=duration, default="0s", metavar="AGE", help="Only messages at least so old.")
@yes_option
@connection_options
@click.pass_context
def purge(ctx: click.Context, task: str | None, older_than: float, yes: bool) -> None:
    """Delete messages that were never published. Their tasks will never run."""
    rows = outbox_store(ctx).outbox
    what = f"of {task}" if task else "of all tasks"
    confirm(f"Delete the unpublished messages {what}?", yes=yes)
    click.echo(f"Deleted: {plural(rows.purge(task=task, older_than=older_than), 'message')}.")
