"""A worker's parent forks whenever a child has died, while its own threads use the store."""

from __future__ import annotations

import pytest

from taskguard.record import Reason
from tests.integration.conftest import pairs
from tests.integration.site import Site


@pytest.mark.parametrize("site", pairs(("redis", "sqlite"), ("rabbitmq", "postgresql")), indirect=True, scope="module")
def test_no_child_is_born_with_a_lock_that_nobody_will_release(site: Site) -> None:
    """Children die and are born by the dozen beside the relay: every one of them can still use the store."""
    worker = site.worker()
    poison = [site.send("poison") for _ in range(12)]
    for result in poison:
        site.wait_state(result, "FAILURE")
        assert site.letter(result.id).failure.reason is Reason.POISON
        assert len(site.started(result)) == 3
    site.assert_done_once(site.send("work"), "work", starts=1)
    assert worker.alive
