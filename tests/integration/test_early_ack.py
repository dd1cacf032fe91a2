"""From the first renewal on, the store's record is the only copy of a running message: it must be as good as one."""

from __future__ import annotations

import uuid

import psutil
import pytest
from celery import chain
from celery.result import AsyncResult

from tests.integration.conftest import pairs
from tests.integration.site import Site

pytestmark = pytest.mark.parametrize(
    "site", pairs(("redis", "redis"), ("rabbitmq", "postgresql")), indirect=True, scope="module"
)

HASTY = {"visibility_timeout": 2, "unacked_restore_interval": 0.5, "unacked_restore_throttle": 1}


def _wait_kept(site: Site, result: AsyncResult, task: str) -> None:
    """Wait until the broker's copy of a running message is acknowledged."""

    def kept() -> bool:
        record = site.record(result, task)
        return record is not None and record.kept

    site.wait(kept, "the first renewal")


def test_a_long_run_leaves_the_broker_and_is_rescued_with_its_worker_dead(no_workers: Site) -> None:
    """After a third of the lease the broker holds nothing, and the run is completed all the same."""
    site = no_workers
    site.start_worker()
    result = site.send("held", gate := uuid.uuid4().hex)
    site.wait_started(result)
    _wait_kept(site, result, "held")
    if site.broker.startswith("redis"):
        site.wait(lambda: site.unacknowledged() == 0, "the acknowledgement")
    site.kill_all()
    assert site.queued() == 0, "the broker has no copy to give back"
    site.journal.open(gate)
    site.start_worker()
    site.assert_done_once(result, "held", starts=2)


def test_a_chain_goes_on_whose_first_task_lost_its_worker(no_workers: Site) -> None:
    """The rescued message carries the rest of its chain."""
    site = no_workers
    site.start_worker()
    gate = uuid.uuid4().hex
    last = chain(site.app.tasks["held"].s(gate), site.app.tasks["add"].s("tail")).apply_async()
    site.wait_started(last.parent)
    _wait_kept(site, last.parent, "held")
    site.kill_all()
    site.journal.open(gate)
    site.start_worker()
    site.assert_done_once(last, "add", starts=1)
    assert last.result == f"{gate}+tail"
    assert len(site.told("completed", last.parent)) == 1


@pytest.mark.parametrize("kept", [False, True], ids=["at the broker", "in the store alone"])
@pytest.mark.parametrize("victim", ["child", "worker"])
def test_a_chain_goes_on_when_the_first_task_dies_completed(no_workers: Site, victim: str, kept: bool) -> None:
    """Killed between the store's completion and the publishing of the next step: no second run, and no lost step."""
    site = no_workers
    worker = site.start_worker(transport=HASTY, TASKGUARD_EARLY_ACK=str(int(kept)))
    gate = uuid.uuid4().hex
    last = chain(site.app.tasks["abrupt"].s(victim, gate), site.app.tasks["add"].s("tail")).apply_async()
    first = last.parent
    run = site.wait_started(first)
    if kept:
        _wait_kept(site, first, "abrupt")
    site.journal.open(gate)
    site.wait(lambda: site.told("completed", first), "the completion")
    site.wait(lambda: not psutil.pid_exists(run.pid), "the death of the run's process")
    if victim == "worker":
        assert worker.wait_end() == -9
        site.start_worker(transport=HASTY)
    site.assert_done_once(last, "add", starts=1)
    site.assert_done_once(first, "abrupt", starts=1)
    assert site.told("replayed", first), "a second delivery was told the stored result"
    assert last.result == f"{victim}+tail"
