"""More scenes of the crash points: relays, in a worker and alone, producers, and operators."""

from __future__ import annotations

import json
import uuid

from taskguard.envelope import record_id
from tests.integration.crashpoints import Point
from tests.integration.crashscenes import DEAD, DISCARDED, DONE, SCENES, before, dies_at
from tests.integration.crew import OFFICE, Crew, gate

__all__ = ["SCENES"]


# -- the relay ---------------------------------------------------------------------------------------------------------


def a_delayed_task(crew: Crew, point: Point) -> None:
    result = crew.send_armed(point, "work", 5, countdown=0.2)
    if point == Point("MessageStore.take_due", "before"):
        crew.armoury.arm(point)
    crew.wait_fired(point)
    crew.assert_ended(result, "work", DONE, starts=1, cut=1)  # what it published may run in the worker that dies


def a_sweep(crew: Crew, point: Point) -> None:
    crew.armoury.arm(point)
    crew.wait_fired(point)
    result = crew.send("work", 6, countdown=0.2)
    crew.assert_ended(result, "work", DONE, starts=1)


def a_task_that_is_late_at_rest(crew: Crew, point: Point) -> None:
    result = crew.send_armed(point, "fleeting", countdown=0.2, deadline=0.1)
    crew.wait_fired(point)
    crew.assert_ended(result, "fleeting", DISCARDED, starts=0, shown="REVOKED")


def a_start(crew: Crew, point: Point) -> None:
    crew.armoury.arm(point)
    crew.kill_all()
    crew.wait_fired(point)
    result = crew.send("work", 7, countdown=0.2)
    crew.assert_ended(result, "work", DONE, starts=1)


for _alone in (False, True):
    for _operation in ("MessageStore.take_due", "Publisher.publish", "Producer.publish", "MessageStore.remove"):
        dies_at(_operation, relay_alone=_alone)(a_delayed_task)
    dies_at("MessageStore.expire", relay_alone=_alone)(a_sweep)
for _operation in ("MessageStore.claim", "MessageStore.discard", "Backend.store_result", "MessageStore.remove"):
    dies_at(_operation, relay_alone=True)(a_task_that_is_late_at_rest)
dies_at("MessageStore.ping")(a_start)


# -- producers and operators -------------------------------------------------------------------------------------------


@dies_at("MessageStore.schedule")
def a_producer_of_a_delayed_task(crew: Crew, point: Point) -> None:
    task_id = str(uuid.uuid4())
    crew.arm(point, "work", task_id)
    crew.produce("send", "work", task_id, "[8]", json.dumps({"countdown": 0.3}), dies=True)
    crew.wait_fired(point)
    result = crew.app.AsyncResult(task_id)
    if point.side == "before":  # never accepted
        assert crew.record(result, "work") is crew.store.find(record_id("work", task_id, task_id)) is None
    else:
        crew.assert_ended(result, "work", DONE, starts=1)


@dies_at("MessageStore.schedule")
@dies_at("Producer.publish")
@dies_at("MessageStore.remove")
def a_producer_of_a_unique_task(crew: Crew, point: Point) -> None:
    task_id, key = str(uuid.uuid4()), f"named:{(n := gate())}"
    crew.arm(point, "named", task_id, key=key)
    crew.produce("send", "named", task_id, json.dumps([n]), "{}", dies=True)
    crew.wait_fired(point)
    result = crew.app.AsyncResult(task_id)
    if point == Point("MessageStore.schedule", "before"):  # never accepted: another may have the name
        assert crew.send("named", n, task_id=task_id).id == task_id
    crew.assert_ended(result, "named", DONE, starts=1, key=key)


@dies_at("MessageStore.revoke")
def an_operator_who_revokes(crew: Crew, point: Point) -> None:
    task_id = str(uuid.uuid4())
    crew.arm(point, "work", task_id)
    crew.produce("revoke", task_id, dies=True)
    crew.wait_fired(point)
    result = crew.send("work", 9, task_id=task_id)
    revoked = point.side == "after"
    crew.assert_ended(
        result, "work", DISCARDED if revoked else DONE, starts=int(not revoked), shown="REVOKED" if revoked else ""
    )


@dies_at("MessageStore.scan")
@dies_at("MessageStore.now")
@dies_at("MessageStore.find")
@dies_at("MessageStore.requeue")
def an_operator_who_requeues(crew: Crew, point: Point) -> None:
    result = crew.send("failing")
    record = crew.assert_ended(result, "failing", DEAD, starts=1)
    crew.arm(point, "failing", result.id, role=OFFICE)
    if point.operation.rpartition(".")[2] in ("scan", "now"):
        crew.armoury.arm(point, role=OFFICE)
    crew.operate("dlq", "requeue", result.id, dies=True)
    crew.wait_fired(point)
    crew.expected.pop()
    if point != Point("MessageStore.requeue", "after"):
        crew.assert_ended(result, "failing", DEAD, starts=1)
        crew.expected.pop()
        crew.operate("dlq", "requeue", record.id, dies=False)
    crew.wait_started(result, 2)
    crew.assert_ended(result, "failing", DEAD, starts=2)


@dies_at("MessageStore.purge")
def an_operator_who_purges(crew: Crew, point: Point) -> None:
    result = crew.send("failing")
    crew.assert_ended(result, "failing", DEAD, starts=1)
    crew.arm(point, "failing", result.id, role=OFFICE)
    crew.operate("dlq", "purge", result.id, "--yes", dies=True)
    crew.wait_fired(point)
    assert len(crew.letters(result.id)) == before(point)


@dies_at("MessageStore.depths")
@dies_at("MessageStore.due_in")
@dies_at("MessageStore.close")
def an_operator_who_looks(crew: Crew, point: Point) -> None:
    crew.armoury.arm(point, role=OFFICE)
    crew.operate("status", dies=True)
    crew.wait_fired(point)
    assert "pending" in crew.operate("status", dies=False)
