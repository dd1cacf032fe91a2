"""Rows 27-31: messages that no worker can run."""

from __future__ import annotations

import json
import pickle
import uuid
from collections.abc import Mapping, Sequence

from celery.result import AsyncResult
from kombu.serialization import dumps
from redis import Redis

from taskguard.deadletters import DeadLetters
from taskguard.letter import DeadLetter
from taskguard.record import Reason
from tests.proof.outcome import Outcome
from tests.proof.rows import POOLS, row
from tests.proof.stage import END_PATIENCE, Stage

JSON, PICKLE = "application/json", "application/x-python-serialize"
WRONG_SHAPE = json.dumps({"order": 1}).encode()
LINE_NOISE = b"no json \xff\x00"
_, _, _good = dumps([[], {}, {}], serializer="json")
GOOD_BODY = _good.encode()


def _headers(**changes: object) -> dict[str, object]:
    """Headers of a task that exists."""
    return {"id": str(uuid.uuid4()), "task": "work", "lang": "py", **changes}


def _publish(stage: Stage, body: bytes, headers: Mapping[str, object], content_type: str = JSON) -> AsyncResult:
    encoding = "utf-8" if content_type == JSON else "binary"
    stage.publish_raw(body, headers, content_type=content_type, content_encoding=encoding)
    return stage.app.AsyncResult(str(headers.get("id") or uuid.uuid4()))


def _bodies(stage: Stage, bodies: Sequence[bytes]) -> list[DeadLetter]:
    """The dead letters with just these bytes, which need not have a task id."""
    letters = DeadLetters(stage.store).select() if stage.guarded else ()
    return [letter for letter in letters if letter.envelope is not None and letter.envelope.body in bodies]


@row(27, "unregistered task", pools=POOLS)
def unregistered(stage: Stage) -> Outcome:
    """Tasks whose name no worker knows."""
    worker = stage.worker()
    results = [stage.app.send_task("nobody.knows", (number,), queue=stage.queue) for number in range(5)]
    good = stage.send("work")
    said = "dead_lettered nobody.knows[{}] unknown_task" if stage.guarded else "'id': '{}'"
    stage.fired(
        lambda: (
            all(worker.says(said.format(result.id)) for result in results)
            and (stage.guarded or worker.says("Received unregistered task"))
        ),
        "the worker met tasks that it does not know",
    )
    outcome = stage.finish([*results, good], completed=1, starts=1)
    if stage.guarded:
        for number, result in enumerate(results):
            letter = stage.letter(result.id)
            assert letter.failure.reason is Reason.UNKNOWN_TASK
            assert letter.envelope is not None
            assert json.loads(letter.envelope.body)[0] == [number]
    return outcome


@row(28, "bad JSON, forbidden pickle, bad eta, no headers", smoke=True, pools=POOLS)
def unreadable(stage: Stage) -> Outcome:
    """A body that is no JSON, a pickle where none is accepted, an eta that is no instant, a message without headers."""
    worker = stage.worker()
    anonymous = b'[["%s"], {}, {}]' % uuid.uuid4().hex.encode()
    sent = {
        "body cannot be read": (b'{"order": ', _headers(), JSON, Reason.UNDECODABLE),
        "is not accepted": (pickle.dumps(([], {}, {})), _headers(), PICKLE, Reason.REJECTED),
        "eta is no instant": (GOOD_BODY, _headers(eta="tomorrow, perhaps"), JSON, Reason.UNDECODABLE),
    }
    results = [_publish(stage, body, headers, kind) for body, headers, kind, _ in sent.values()]
    _publish(stage, anonymous, {})
    good = stage.send("work")
    stage.fired(
        lambda: (
            len(_bodies(stage, [anonymous])) == 1 and all(stage.told("dead_lettered", result) for result in results)
            if stage.guarded
            else all(
                worker.says(text)
                for text in ("Can't decode message body: DecodeError", "Refusing to deserialize untrusted content",
                             "invalid ETA value", "Received and deleted unknown message")
            )
        ),
        "the worker met each of the four",
    )  # fmt: skip
    outcome = stage.finish([*results, good], completed=1, starts=1)
    if stage.guarded:
        for what, (body, headers, _, reason) in sent.items():
            letter = stage.letter(str(headers["id"]))
            assert letter.failure.reason is reason, what
            assert letter.envelope is not None
            assert letter.envelope.body == body, what
        assert worker.alive
    return outcome


@row(29, "body of the wrong shape", smoke=True, pools=POOLS, patience=15)
def wrong_shape(stage: Stage) -> Outcome:
    """Valid headers and a readable body that is not a task's; a supervisor starts the worker again when it dies."""
    stage.worker()
    first = stage.send("work")  # row 30 is about what comes before that
    stage.wait(lambda: stage.finished(first), "the worker at work")
    bad = _publish(stage, WRONG_SHAPE, _headers())
    good = [first, *(stage.send("work", number) for number in range(3))]
    results = [bad, *good]
    deaths = stage.supervise(
        lambda: len(stage.shown(results)) == len(results), timeout=END_PATIENCE if stage.guarded else stage.row.patience
    )
    stage.fired(bool(deaths) or bool(stage.kept([bad])), "a worker met it")
    outcome = stage.finish(results, completed=len(good), starts=len(good), note=f"{deaths} worker deaths")
    if stage.guarded:
        _assert_shape(stage, bad)
        assert not deaths
    return outcome


def _assert_shape(stage: Stage, bad: AsyncResult) -> None:
    letter = stage.letter(bad.id)
    assert letter.failure.reason is Reason.UNDECODABLE
    assert letter.envelope is not None
    assert letter.envelope.body == WRONG_SHAPE


@row(30, "body of the wrong shape, waiting for the worker", brokers=("rabbitmq",), pools=POOLS)
def wrong_shape_at_once(stage: Stage) -> Outcome:
    """The same, delivered in the moment in which the worker becomes ready: a stock worker may go silent for ever."""
    stage.kill_all()
    left = stage.queued()  # a worker that is killed may not have acknowledged what it had done
    bad = _publish(stage, WRONG_SHAPE, _headers())
    good = [stage.send("work", number) for number in range(3)]
    results = [bad, *good]
    stage.fired(lambda: stage.queued() >= left + len(results), "all are there before the worker is")
    worker = stage.start_unready()
    if not stage.guarded:
        stage.wait(lambda: not worker.alive or worker.says("ready."), "the worker has started")
    outcome = stage.finish(results, completed=len(good), starts=len(good))
    if stage.guarded:
        _assert_shape(stage, bad)
        assert worker.alive
    return outcome


@row(31, "queue item that is no message", brokers=("redis",), pools=POOLS, patience=12)
def no_message(stage: Stage) -> Outcome:
    """Somebody pushes bytes that are no message into the Redis list of a queue; a supervisor restarts the worker."""
    stage.worker()
    junk = [LINE_NOISE + uuid.uuid4().bytes, b'[{"no": "message", "%s": 1}]' % uuid.uuid4().hex.encode()]
    with Redis.from_url(stage.broker) as client:
        client.lpush(f"{stage.namespace}.{stage.queue}", *junk)
    good = [stage.send("work", number) for number in range(3)]
    deaths = stage.supervise(
        lambda: len(stage.shown(good)) == len(good) and (not stage.guarded or len(_bodies(stage, junk)) == len(junk)),
        timeout=END_PATIENCE if stage.guarded else stage.row.patience,
    )
    kept = _bodies(stage, junk)
    stage.fired(bool(deaths) or len(kept) == len(junk), "a worker met it")
    outcome = stage.finish(good, note=f"{deaths} worker deaths, {len(kept)} of {len(junk)} such items kept")
    if stage.guarded:
        assert not deaths
        assert {letter.failure.reason for letter in kept} == {Reason.UNDECODABLE}
        assert len(kept) == len(junk)
    return outcome
