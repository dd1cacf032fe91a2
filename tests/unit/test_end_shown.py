"""The end of a task in the result backend, where RETRY was written over it from outside the run."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery, states

from taskguard import ReliableTask, install
from taskguard.celery.publishing import capturing
from taskguard.celery.settle import show_end_again
from taskguard.custody import Claimed
from taskguard.envelope import Envelope
from taskguard.record import Failure, Reason


@pytest.fixture
def app(namespace: str) -> Celery:
    app = Celery(broker="memory://", backend="cache+memory://", set_as_current=False)
    install(app, store="memory://", namespace=namespace)

    @app.task(name="work", base=ReliableTask, shared=False)
    def work() -> None:
        """Nothing."""

    return app


def taken(app: Celery) -> tuple[Envelope, int]:
    """A message of the task, and the token of its run."""
    with capturing() as captured:
        app.tasks["work"].apply_async()
    (envelope,) = captured.envelopes
    claimed = app.taskguard.store.claim(envelope, holder="worker-1/a", lease=15.0, max_crashes=3)
    assert isinstance(claimed, Claimed)
    return envelope, claimed.token


def shown(app: Celery, envelope: Envelope) -> Any:
    task = app.tasks["work"]
    task.backend.store_result(envelope.task_id, OSError("child lost"), states.RETRY)
    show_end_again(app.taskguard, task, envelope)
    return app.AsyncResult(envelope.task_id)


def test_the_result_of_a_completed_run_comes_back(app: Celery) -> None:
    """Celery looks for SUCCESS and writes RETRY in two steps; the run that completes in between is not hidden."""
    envelope, token = taken(app)
    app.taskguard.store.complete(envelope.id, token, result=b"application/json\n[7]", retention=60.0)
    result = shown(app, envelope)
    assert (result.state, result.result) == (states.SUCCESS, [7])


def test_the_failure_of_a_dead_letter_comes_back(app: Celery) -> None:
    """Celery guards SUCCESS alone."""
    envelope, token = taken(app)
    failure = Failure.of(Reason.PERMANENT_ERROR, ValueError("no such order"))
    app.taskguard.store.bury(envelope.id, token, failure=failure, attempt=None)
    result = shown(app, envelope)
    assert (result.state, repr(result.result)) == (states.FAILURE, "ValueError('no such order')")


def test_a_run_that_goes_on_is_left_to_show_its_own_end(app: Celery) -> None:
    """It will do so later, and over RETRY."""
    envelope, _ = taken(app)
    assert shown(app, envelope).state == states.RETRY
