"""Coverage-guided fuzzing by hand: ``python -m tests.fuzz TARGET [SECONDS]``. Needs atheris, which no test does.

wire: what a store may hold. line: what an import may read. message: what a broker may deliver, from the consumer to
the end of the run. A crash is written to a file; give that file instead of the seconds to see it again.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import uuid
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["taskguard", "celery.worker", "celery.utils.time", "kombu.message"]):
    from taskguard.cli.dlq import screen
    from taskguard.envelope import Envelope
    from taskguard.errors import MessageError
    from taskguard.letter import DeadLetter
    from taskguard.letterfile import from_line, to_line
    from taskguard.record import Attempt, Failure, Reason, Record, State
    from tests.fuzz.reception import Reception, quiet

HEADERS = [
    "id", "task", "lang", "root_id", "parent_id", "group", "group_index", "retries", "timelimit", "argsrepr", "origin",
    "eta", "expires", "shadow", "stamps", "stamped_headers", "taskguard", "compression", "ignore_result",
]  # fmt: skip
STAMP = ["key", "fp", "seq", "deadline_ms", "delay"]
EMBED = ["callbacks", "errbacks", "chain", "chord"]
PROTOCOL_1 = [*HEADERS, *EMBED, "args", "kwargs", "taskset", "utc", "headers"]
SIMPLE = Envelope(task="work", task_id="id", key="order-1", body=b"[[1],{},{}]", headers={"id": "id", "retries": 1})

LINE = to_line(
    DeadLetter.of(
        Record(
            id="x", task="work", task_id="id", key="order-1", state=State.DEAD, primary=False, wire=SIMPLE.to_wire(),
            failure=Failure.of(Reason.POISON, ValueError("no")).to_json(),
            history=Attempt(at=1.5, worker="w", outcome="crash").to_json(),
        )
    )
)  # fmt: skip


def read_again(envelope: Envelope) -> None:
    """What was read can be written, and read again as the same."""
    assert Envelope.from_wire(envelope.to_wire()) == envelope
    assert len(envelope.id) == len(envelope.copy_id) == 20
    assert isinstance(envelope.retries, int)


def wire(data: bytes) -> None:
    """`Envelope.from_wire`, of bytes and of a message with some fields hostile."""
    give = atheris.FuzzedDataProvider(data)
    if give.ConsumeBool():
        fields = json.loads(SIMPLE.to_wire())
        data = json.dumps(changed(give, fields, [*fields, "body64"])).encode()
    with suppress(MessageError):
        read_again(Envelope.from_wire(data))


def line(data: bytes) -> None:
    """One line of `dlq import`, and the letter it becomes as `dlq show`, `search` and `export` have it."""
    give = atheris.FuzzedDataProvider(data)
    text = data.decode("utf-8", "surrogateescape")
    if give.ConsumeBool():
        outer = json.loads(LINE)
        inner = give.PickValueInList(["wire", "failure"])
        outer[inner] = changed(give, outer[inner], [*outer[inner], "error", "body64"])
        outer["history"] = [changed(give, outer["history"][0], [*outer["history"][0]])]
        text = json.dumps(changed(give, outer, [*outer]) if give.ConsumeBool() else outer)
    with suppress(MessageError):
        letter = from_line(text)
        read_again(letter.envelope)
        shown = DeadLetter.of(record_of(letter.envelope, letter.failure, letter.history))
        json.dumps(shown.as_dict(), default=str)
        shown.text()
        from_line(to_line(shown))
        with redirect_stdout(io.StringIO()):
            screen.letter(shown, now=1.0)


def record_of(envelope: Envelope, failure: Failure, history: str) -> Record:
    """The record of a dead letter."""
    return Record(
        id=envelope.copy_id, task=envelope.task, task_id=envelope.task_id, key=envelope.key, state=State.DEAD,
        primary=False, wire=envelope.to_wire(), failure=failure.to_json(), history=history,
    )  # fmt: skip


def any_json(give: Any, depth: int = 0) -> Any:
    """A value as a hostile producer might make it."""
    match give.ConsumeIntInRange(0, 9 if depth < 4 else 6):
        case 0:
            return None
        case 1:
            return give.ConsumeBool()
        case 2:
            return give.ConsumeInt(give.ConsumeIntInRange(1, 40))
        case 3:
            return give.ConsumeFloat()
        case 4:
            return give.ConsumeUnicode(give.ConsumeIntInRange(0, 30))
        case 5:
            return give.PickValueInList(
                ["work", "plain", "2026-01-01T00:00:00", "9999-12-31T23:59:59-10:00", "5s", "id"]
            )
        case 6:
            return give.PickValueInList([float("nan"), float("inf"), 10**400, "\ud800", "\x00", "a" * 5000])
        case 7:
            return [any_json(give, depth + 1) for _ in range(give.ConsumeIntInRange(0, 3))]
        case _:
            names = [*STAMP, *EMBED, "task", "args", "kwargs", "options", "__class__", "x"]
            return {give.PickValueInList(names): any_json(give, depth + 1) for _ in range(give.ConsumeIntInRange(0, 4))}


def changed(give: Any, fields: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """*fields* with a few of them hostile."""
    return fields | {give.PickValueInList(names): any_json(give) for _ in range(give.ConsumeIntInRange(0, 3))}


def messages() -> Callable[[bytes], None]:
    """The consumer of a worker."""
    quiet()
    reception = Reception(uuid.uuid4().hex)

    def message(data: bytes) -> None:
        give = atheris.FuzzedDataProvider(data)
        task_id = uuid.uuid4().hex
        headers = {"id": task_id, "task": give.PickValueInList(["work", "plain"]), "retries": 0, "lang": "py"}
        args = [uuid.uuid4().hex]
        match give.ConsumeIntInRange(0, 3):
            case 0:
                body = json.dumps([args, {}, changed(give, {}, EMBED)])
                headers = changed(give, headers, HEADERS)
            case 1:
                body = json.dumps(changed(give, headers | {"args": args, "kwargs": {}}, PROTOCOL_1))
                headers = {} if give.ConsumeBool() else headers
            case 2:
                headers["taskguard"] = changed(give, {}, STAMP)
                body = json.dumps([args, {}, {}])
            case _:
                body = json.dumps(any_json(give))
        delivery = reception.deliver(body.encode(), headers)
        assert delivery.answers in (["ack"], ["reject"], ["requeue"]), (delivery.answers, headers, body)

    return message


def seeds(directory: Path) -> None:
    """Something to begin with."""
    (directory / "wire").write_bytes(SIMPLE.to_wire())
    (directory / "line").write_text(LINE)


def main() -> None:
    """Fuzz one target for so many seconds, or run one saved input."""
    os.environ["COLUMNS"] = "100"
    target, given = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "60"
    function = messages() if target == "message" else {"wire": wire, "line": line}[target]
    with tempfile.TemporaryDirectory() as corpus:
        seeds(Path(corpus))
        run = [f"-max_total_time={given}", "-max_len=2000", corpus] if given.isdecimal() else [given]
        atheris.Setup([sys.argv[0], *run], function)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
