"""The scenes of the crash points: for each operation, a message on whose way it lies, and how that way must end.

A scene gets a crew and a point, arms the point, sends the message, and says how often the task must have been started:
once more only where the crash fell between the start of the body and the operation that ends the run.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from celery import chain, chord
from celery.result import AsyncResult
from kombu.serialization import dumps

from taskguard.envelope import record_id
from taskguard.record import Reason, State
from tests.integration.crashpoints import Point
from tests.integration.crew import Crew, gate

Play = Callable[[Crew, Point], None]
DEAD, DISCARDED, DONE = State.DEAD, State.DISCARDED, State.DONE
GOOD_BODY = dumps([[], {}, {}], serializer="json")[2].encode()


@dataclass(frozen=True)
class Scene:
    """What is played, at which operation the crash comes, and whether a relay alone is needed."""

    operation: str
    play: Play
    relay_alone: bool = False

    def __str__(self) -> str:
        return f"{self.operation}, {self.play.__name__.replace('_', ' ')}"


SCENES: list[Scene] = []


def dies_at(operation: str, *, relay_alone: bool = False) -> Callable[[Play], Play]:
    """The scene's crash comes before or after *operation*."""

    def register(play: Play) -> Play:
        SCENES.append(Scene(operation, play, relay_alone))
        return play

    return register


def before(point: Point) -> int:
    """One where the crash comes before the operation, so that the body runs once more; else 0."""
    return int(point.side == "before")


# -- custody -----------------------------------------------------------------------------------------------------------


@dies_at("MessageStore.claim")
def a_task(crew: Crew, point: Point) -> None:
    result = crew.send_armed(point, "work", 1)
    crew.wait_fired(point)
    crew.assert_ended(result, "work", DONE, starts=1)


@dies_at("Message.ack")
def a_task_that_has_ended(crew: Crew, point: Point) -> None:
    with crew.kept_by_the_broker("work", id := str(uuid.uuid4())):
        result = crew.send_armed(point, "work", 1, task_id=id)
        crew.wait_fired(point)
    if point.side == "before":
        crew.wait(lambda: crew.told("replayed", result), "the redelivery")
    crew.assert_ended(result, "work", DONE, starts=1)


@dies_at("MessageStore.complete")
def a_task_that_completes(crew: Crew, point: Point) -> None:
    result = crew.send_armed(point, "work", 2)
    crew.wait_fired(point)
    crew.assert_ended(result, "work", DONE, starts=1 + before(point))
    assert result.result == 2


@dies_at("MessageStore.rest")
def a_retry(crew: Crew, point: Point) -> None:
    result = crew.send_armed(point, "retried", 0.1)
    crew.wait_fired(point)
    record = crew.assert_ended(result, "retried", DONE, starts=2 + before(point))
    assert record.crashes == before(point)


@dies_at("MessageStore.rest")
def a_deferral(crew: Crew, point: Point) -> None:
    result = crew.send_armed(point, "deferring")
    crew.wait_fired(point)
    crew.assert_ended(result, "deferring", DONE, starts=2)


@dies_at("MessageStore.bury")
def a_task_that_fails(crew: Crew, point: Point) -> None:
    result = crew.send_armed(point, "failing")
    crew.wait_fired(point)
    crew.assert_ended(result, "failing", DEAD, starts=1 + before(point))
    assert "no such card" in str(result.result)


@dies_at("MessageStore.discard")
def a_task_that_ignores(crew: Crew, point: Point) -> None:
    result = crew.send_armed(point, "ignoring")
    crew.wait_fired(point)
    crew.wait(lambda: crew.told("discarded", result), "an event")
    crew.assert_ended(result, "ignoring", DISCARDED, starts=1 + before(point), shown="REVOKED")


@dies_at("MessageStore.discard")
def a_task_that_is_late(crew: Crew, point: Point) -> None:
    result = crew.send_armed(point, "fleeting", headers=late_headers())
    crew.wait_fired(point)
    crew.assert_ended(result, "fleeting", DISCARDED, starts=0, shown="REVOKED")


@dies_at("MessageStore.bury")
def a_task_that_is_late_and_kept(crew: Crew, point: Point) -> None:
    result = crew.send_armed(point, "work", headers=late_headers())
    crew.wait_fired(point)
    crew.assert_ended(result, "work", DEAD, starts=0)


def late_headers() -> dict[str, Any]:
    """What makes a message late from the beginning."""
    return {"taskguard": {"deadline_ms": 1000 * int((datetime.now(UTC) - timedelta(seconds=1)).timestamp())}}


@dies_at("MessageStore.holds")
def a_task_that_asks_for_its_custody(crew: Crew, point: Point) -> None:
    result = crew.send_armed(point, "asking")
    crew.wait_fired(point)
    crew.assert_ended(result, "asking", DONE, starts=2)
    assert result.result is False


@dies_at("MessageStore.crash")
@dies_at("MessageStore.find")
def a_task_whose_child_dies(crew: Crew, point: Point) -> None:
    result = crew.send_armed(point, "stumbling")
    crew.wait_fired(point)
    record = crew.assert_ended(result, "stumbling", DONE, starts=2)
    assert record.crashes == 1, "its own crash, and not its parent's too"


@dies_at("MessageStore.renew")
def a_long_task(crew: Crew, point: Point) -> None:
    result = crew.send_armed(point, "held", waits := gate())
    crew.wait_fired(point)
    crew.journal.open(waits)
    crew.assert_ended(result, "held", DONE, starts=2)


@dies_at("MessageStore.finish")
def a_long_task_that_ends(crew: Crew, point: Point) -> None:
    id = record_id("held", (result := crew.send_armed(point, "held", waits := gate())).id)
    crew.wait(lambda: (record := crew.store.find(id)) is not None and record.kept, "a renewed lease")
    crew.journal.open(waits)
    crew.wait_fired(point)
    crew.assert_ended(result, "held", DONE, starts=1)
    crew.wait(lambda: not crew.store.find(id).kept, "the message let go")  # type: ignore[union-attr]


@dies_at("MessageStore.release_unique")
def a_unique_task(crew: Crew, point: Point) -> None:
    key = f"named:{(n := gate())}"
    result = crew.send_armed(point, "named", n, key=key)
    crew.wait_fired(point)
    crew.assert_ended(result, "named", DONE, starts=1, key=key)
    crew.wait(lambda: crew.send("named", n).id != result.id, "the name free again")
    crew.wait_settled()


# -- duplicates and what cannot run ------------------------------------------------------------------------------------


@dies_at("MessageStore.schedule")
def a_duplicate_that_waits(crew: Crew, point: Point) -> None:
    first = crew.send("held", waits := gate(), idempotency_key=waits)
    crew.wait_started(first)
    second = crew.send_armed(point, "held", waits, idempotency_key=waits, key=waits)
    crew.wait_fired(point)
    crew.wait(lambda: crew.told("deferred", second), "the duplicate at rest")
    crew.journal.open(waits)
    crew.assert_ended(first, "held", DONE, starts=1, key=waits)
    crew.assert_ended(second, "held", DONE, starts=0, key=waits)


@dies_at("MessageStore.bury_message")
def a_key_used_for_something_else(crew: Crew, point: Point) -> None:
    first = crew.send("work", 1, idempotency_key=(key := gate()))
    crew.assert_ended(first, "work", DONE, starts=1, key=key)
    second = crew.send_armed(point, "work", 2, idempotency_key=key, key=key)
    crew.wait_fired(point)
    record = crew.assert_ended(second, "work", DEAD, starts=0, key=key)
    assert Reason.KEY_REUSED in record.failure


def foreign(crew: Crew, point: Point, headers: dict[str, Any], body: bytes = GOOD_BODY) -> AsyncResult:
    """A message for the armed point from a producer that is not ours."""
    headers = {"id": str(uuid.uuid4()), "lang": "py", **headers}
    crew.arm(point, headers["task"], headers["id"])
    crew.publish_raw(body, headers)
    return crew.app.AsyncResult(headers["id"])


@dies_at("MessageStore.schedule")
def a_delay_from_a_plain_producer(crew: Crew, point: Point) -> None:
    eta = datetime.now(UTC) + timedelta(seconds=0.5)
    result = foreign(crew, point, {"task": "work", "eta": eta.isoformat()})
    crew.wait_fired(point)
    crew.assert_ended(result, "work", DONE, starts=1)


@dies_at("MessageStore.bury_message")
@dies_at("Message.reject")
@dies_at("Backend.store_result")
def an_unknown_task(crew: Crew, point: Point) -> None:
    result = foreign(crew, point, {"task": "nobody.knows"})
    crew.wait_fired(point)
    crew.assert_ended(result, "nobody.knows", DEAD, starts=0)


@dies_at("Message.ack")
@dies_at("Backend.store_result")
def an_unreadable_message(crew: Crew, point: Point) -> None:
    result = foreign(crew, point, {"task": "work"}, b'{"order": ')
    crew.wait_fired(point)
    crew.assert_ended(result, "work", DEAD, starts=0)


@dies_at("Message.requeue")
def an_unreadable_message_while_the_store_is_away(crew: Crew, point: Point) -> None:
    refused = Point("MessageStore.bury_message", "before")
    crew.arm(refused, "work", id := str(uuid.uuid4()), action="refuse")
    result = foreign(crew, point, {"task": "work", "id": id}, b'{"order": ')
    crew.wait_fired(refused)
    crew.wait_fired(point)
    crew.assert_ended(result, "work", DEAD, starts=0)


@dies_at("Message.reject")
def a_message_given_back_after_its_run(crew: Crew, point: Point) -> None:
    child = Point("MessageStore.complete", "after")
    with crew.kept_by_the_broker("work", id := str(uuid.uuid4())):  # what it has no more cannot be given back
        crew.arm(point, "work", id)
        result = crew.send_armed(child, "work", 3, task_id=id)
        crew.wait_fired(child)
        crew.wait_fired(point)
    crew.assert_ended(result, "work", DONE, starts=1)


# -- what follows a run ------------------------------------------------------------------------------------------------


@dies_at("Backend.store_result")
def the_result_of_a_failure(crew: Crew, point: Point) -> None:
    result = crew.send_armed(point, "failing")
    crew.wait_fired(point)
    crew.assert_ended(result, "failing", DEAD, starts=1)


@dies_at("Producer.publish")
def the_next_step_of_a_chain(crew: Crew, point: Point) -> None:
    tasks = crew.app.tasks
    step = tasks["add"].s("c").set(task_id=str(uuid.uuid4()))
    crew.arm(point, "add", step.options["task_id"])
    last = chain(tasks["add"].s("a", "b"), step).apply_async()
    crew.wait_fired(point)
    assert crew.assert_ended(last, "add", DONE, starts=1)
    assert crew.assert_ended(last.parent, "add", DONE, starts=1)
    assert last.result == "a+b+c"


@dies_at("Backend.on_chord_part_return")
def a_part_of_a_chord(crew: Crew, point: Point) -> None:
    tasks = crew.app.tasks
    parts = [tasks["work"].s(n).set(task_id=str(uuid.uuid4())) for n in (1, 2)]
    crew.arm(point, "work", parts[1].options["task_id"])
    last = chord(parts)(tasks["total"].s())
    crew.wait_fired(point)
    crew.assert_ended(last, "total", DONE, starts=1)
    for part in parts:
        crew.assert_ended(crew.app.AsyncResult(part.options["task_id"]), "work", DONE, starts=1)
    assert last.result == 3


@dies_at("Producer.publish")
def the_body_of_a_chord(crew: Crew, point: Point) -> None:
    tasks = crew.app.tasks
    body = tasks["total"].s().set(task_id=str(uuid.uuid4()))
    crew.arm(point, "total", body.options["task_id"])
    last = chord([tasks["work"].s(n) for n in (1, 2)])(body)
    crew.wait_fired(point)
    crew.assert_ended(last, "total", DONE, starts=1)
    assert last.result == 3
