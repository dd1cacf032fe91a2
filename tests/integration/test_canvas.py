"""Workflows: every one gives with `ReliableTask` what it gives with Celery's Task, also when messages come twice."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests import services
from tests.integration import workshop as workshop_module
from tests.integration.workflows import (
    WORKFLOWS,
    Workflow,
    a_chain_with_a_retry,
    a_chord_in_a_chain,
    a_replacement_in_a_chord,
    assert_still,
    compare,
)
from tests.integration.workshop import Workshop

pytestmark = pytest.mark.xdist_group("canvas")


def open_workshop(broker: str, directory: Path, namespace: str, **env: str) -> Workshop:
    redis = services.require("redis")
    return Workshop(broker=broker, notes=redis, store=redis, namespace=namespace, directory=directory, **env)


@pytest.fixture(scope="module")
def on_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """A worker for all workflows, on Redis."""
    namespace = f"t{uuid.uuid4().hex[:16]}"
    redis = services.require("redis")
    with closing(open_workshop(redis, tmp_path_factory.mktemp("canvas"), namespace)) as workshop:
        workshop.start(concurrency=3)
        yield workshop
        assert_still(workshop)
    services.delete_redis_keys(redis, f"*{namespace}*")


@pytest.fixture(scope="module")
def on_rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """A worker for one workflow of everything, on RabbitMQ."""
    namespace = f"t{uuid.uuid4().hex[:16]}"
    redis = services.require("redis")
    with services.rabbitmq_vhost(services.require("rabbitmq"), namespace) as broker:
        with closing(open_workshop(broker, tmp_path_factory.mktemp("canvas"), namespace)) as workshop:
            workshop.start(concurrency=3)
            yield workshop
            assert_still(workshop)
        services.delete_queue(broker, f"{namespace}.tasks")
    services.delete_redis_keys(redis, f"*{namespace}*")


@pytest.fixture(scope="module")
def stuttering(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """A producer and a worker that publish every message twice."""
    namespace = f"t{uuid.uuid4().hex[:16]}"
    redis = services.require("redis")
    with (
        closing(open_workshop(redis, tmp_path_factory.mktemp("canvas"), namespace, TEST_STUTTER="1")) as workshop,
        pytest.MonkeyPatch.context() as patch,
    ):
        workshop.start(concurrency=3)
        patch.setattr("kombu.messaging.Producer.publish", workshop_module.Producer.publish)
        workshop_module.stutter()
        yield workshop
        assert_still(workshop)
    services.delete_redis_keys(redis, f"*{namespace}*")


@pytest.mark.parametrize(
    "workflow",
    [pytest.param(each, marks=[pytest.mark.smoke] * (each is a_chord_in_a_chain)) for each in WORKFLOWS],
    ids=lambda workflow: workflow.__name__,
)
def test_a_workflow_is_as_in_plain_celery(workflow: Workflow, on_redis: Workshop) -> None:
    """Result and state of every task in it, and the bodies that ran."""
    compare(on_redis, workflow, "reliable")


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.__name__)
def test_a_workflow_with_keys_can_be_sent_twice(workflow: Workflow, on_redis: Workshop) -> None:
    """The second time its tasks are duplicates with other ids: they give the stored results, and it goes on."""
    for _ in range(2):
        compare(on_redis, workflow, "keyed", bodies_too=False)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.__name__)
def test_a_workflow_whose_every_message_comes_twice_is_the_same(workflow: Workflow, stuttering: Workshop) -> None:
    """No task runs twice, no link fires twice, no chord counts a member twice."""
    compare(stuttering, workflow, "reliable")


@pytest.mark.parametrize(
    "workflow",
    [a_chord_in_a_chain, a_replacement_in_a_chord, a_chain_with_a_retry],
    ids=lambda workflow: workflow.__name__,
)
def test_a_workflow_on_rabbitmq_is_as_in_plain_celery(workflow: Workflow, on_rabbitmq: Workshop) -> None:
    """The broker makes no difference."""
    compare(on_rabbitmq, workflow, "reliable")
