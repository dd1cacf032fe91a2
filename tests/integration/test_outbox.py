"""From a producer's commit to a worker's run: canvases, options and delays, on every database with every broker."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
from celery import chain, chord, group
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from taskguard.outbox import Outbox
from tests.integration.conftest import pairs
from tests.integration.site import Site

pytestmark = pytest.mark.parametrize(
    "site", pairs(*product(("redis", "rabbitmq"), ("postgresql", "mariadb", "sqlite"))), indirect=True
)


@pytest.fixture
def session(site: Site) -> Iterator[Session]:
    """A session in the business database; the site's worker relays."""
    site.worker()
    engine = create_engine(site.store_url)
    with Session(engine) as session:
        yield session
    engine.dispose()


def test_a_commit_sends_and_a_rollback_does_not(site: Site, session: Session) -> None:
    """The committed one runs once; the other never, though it was first."""
    work = site.app.tasks["work"]
    lost = work.delay_with(session, 1)
    session.rollback()
    kept = work.delay_with(session, 2)
    assert not site.started(kept), "not before the commit"
    session.commit()
    site.assert_done_once(kept, "work", starts=1)
    assert kept.result == 2
    assert not site.started(lost)


def test_a_canvas_comes_to_its_end(site: Site, session: Session) -> None:
    """Chain, group and chord, sent in one transaction, with Celery's own results."""
    work, outbox = site.app.tasks["work"], Outbox(session)
    last = outbox.send(chain(work.si(1), work.si(2), work.s()))
    several = outbox.send(group(work.s(n) for n in range(4)))
    session.commit()
    assert last.get(timeout=60) == 2
    assert several.get(timeout=60) == [0, 1, 2, 3]
    joined = outbox.send(chord([work.s(n) for n in range(4)], work.s()))
    session.commit()
    assert joined.get(timeout=60) == [0, 1, 2, 3]


def test_a_chord_that_is_rolled_back_leaves_nothing(site: Site, session: Session) -> None:
    """No size of it in the result backend, no message."""
    joined = Outbox(session).send(chord([site.app.tasks["work"].s(n) for n in range(3)], site.app.tasks["work"].s()))
    session.rollback()
    group_id = joined.parent.id
    client = site.app.backend.client
    assert not client.exists(site.app.backend.get_key_for_group(group_id, ".s"))
    assert not any(site.started(child) for child in joined.parent.children)


def test_a_delay_is_kept_to_and_counts_from_the_send(site: Site, session: Session) -> None:
    """Not before its moment."""
    before = site.store.now()
    result = site.app.tasks["work"].apply_async((3,), session=session, countdown=1.0)
    session.commit()
    site.wait_started(result)
    [entry] = site.started(result)
    assert entry.at - before >= 0.95
    site.wait_state(result, "SUCCESS")


def test_what_is_late_when_it_is_committed_never_runs(site: Site, session: Session) -> None:
    """Its deadline passed inside the transaction: a dead letter, and a state that everybody sees."""
    result = site.app.tasks["work"].apply_async((4,), session=session, deadline=0.01)
    site.wait_past(site.store.now() + 0.05)
    session.commit()
    site.wait_state(result, "FAILURE")
    assert not site.started(result)
    assert site.letter(result.id).record.task_id == result.id


def test_priorities_and_queues_reach_the_broker(site: Site, session: Session) -> None:
    """A message with a priority runs like any other."""
    result = site.app.tasks["work"].apply_async((5,), session=session, priority=6, headers={"trace": "x"})
    session.commit()
    site.assert_done_once(result, "work", starts=1)
