"""``taskguard relay``: a relay without a worker."""

from __future__ import annotations

import logging
import signal
import threading

import click

from taskguard.cli.complaints import Complaint
from taskguard.cli.connection import celery_app, connection_options, named_settings
from taskguard.cli.parameters import duration
from taskguard.cli.text import plural


@click.command("relay")
@click.option("--batch", type=click.IntRange(min=1), default=100, show_default=True, help="Messages leased at once.")
@click.option(
    "--poll", callback=duration, default="250ms", show_default=True, metavar="AGE", help="Between looks when idle."
)
@click.option("--once", is_flag=True, help="Publish what is due now, then end.")
@connection_options
@click.pass_context
def relay(ctx: click.Context, batch: int, poll: float, once: bool) -> None:
    """Publish messages as they come due, until SIGTERM or Ctrl-C. Any number of relays share the work."""
    app = celery_app(ctx)
    if app is None:
        raise Complaint("a relay publishes with an app's broker settings; name the app with -A, such as -A workers.app")
    from taskguard.celery.install import install
    from taskguard.celery.runtime import runtime_of
    from taskguard.celery.worker import make_relay

    runtime, given = runtime_of(app), named_settings(ctx)
    if given:
        runtime = install(app, **{**runtime.settings.arguments(), **given})
    runtime.check_worker(shared_memory=False)
    relaying = make_relay(app, batch=batch, poll=poll)
    if once:
        sent = 0
        while moved := relaying.step():
            sent += moved
        click.echo(f"Published {plural(sent, 'message')}.")
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    stop = threading.Event()

    def end(*_: object) -> None:
        stop.set()
        relaying.ring()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    click.echo(f"Relaying for {app.main or app}; Ctrl-C ends it.", err=True)
    relaying.run(stop)
