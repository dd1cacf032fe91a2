"""The matrix: what tests/proof does not show, on each broker with each message store, with real workers.

Each test asserts that its fault really fired, and that the message ended as section 4 of the design says. The tests of
one pair share a worker where the fault leaves it alive, and start another where it does not.
"""

from __future__ import annotations

import uuid

from taskguard.record import State
from tests.integration.site import Site

MAX_CRASHES = 3


def test_a_waiting_retry_outlives_every_worker(site: Site) -> None:
    """All workers die while a retry waits: a worker started later does it, and once."""
    site.worker()
    result = site.send("retried", 1.0)
    site.wait(lambda: site.told("retried", result), "the retry at rest")
    site.kill_all()
    record = site.record(result, "retried")
    assert record is not None
    assert record.state is State.PENDING
    assert record.due_at is not None
    site.wait_past(record.due_at)
    assert len(site.started(result)) == 1, "nobody is there to run it"
    site.start_worker()
    site.assert_done_once(result, "retried", starts=2)
    assert [run.crashes for run in site.started(result)] == [0, 0]


def test_a_second_copy_of_a_running_message_is_discarded(site: Site) -> None:
    """The same bytes are published again while the task runs: the running one stays the only one."""
    site.worker()
    gate = uuid.uuid4().hex
    result, again = site.send_repeatable("held", gate)
    site.wait_started(result)
    again()
    site.wait(lambda: site.told("discarded", result, "in_custody"), "the redelivery")
    site.journal.open(gate)
    site.assert_done_once(result, "held", starts=1)
