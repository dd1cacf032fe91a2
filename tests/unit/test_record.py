"""Failures, attempts and their history as they rest in a record."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from taskguard.record import HISTORY_LIMIT, TRACEBACK_TAIL, Attempt, Failure, Reason, Record, State, append_history

words = st.text(max_size=50)


class Unprintable(Exception):
    """An exception whose text cannot be made."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def refused(message: str) -> Failure:
    """A permanent error with this message."""
    return Failure(reason=Reason.PERMANENT_ERROR, error_type="PaymentError", message=message)


@given(st.builds(Failure, reason=st.sampled_from(Reason), error_type=words, message=words, traceback=words))
def test_a_failure_comes_back_from_rest_as_it_was(failure: Failure) -> None:
    """Whatever characters an exception's text holds."""
    assert Failure.from_json(failure.to_json()) == failure


def test_a_failure_describes_its_exception() -> None:
    """The reason, the type and the text."""
    failure = Failure.of(Reason.MAX_RETRIES, ValueError("no such card"), "Traceback …")
    assert failure == Failure(
        reason=Reason.MAX_RETRIES,
        error_type="ValueError",
        error_module="builtins",
        arguments=("no such card",),
        message="no such card",
        traceback="Traceback …",
    )


def test_a_failure_without_an_exception_has_its_reason() -> None:
    """An expired message raised nothing."""
    assert Failure.of(Reason.EXPIRED) == Failure(reason=Reason.EXPIRED)


def test_a_failure_is_bounded_and_keeps_the_end_of_its_traceback() -> None:
    """A dead letter does not hold megabytes; the last frames say the most."""
    failure = Failure.of(Reason.MAX_RETRIES, ValueError("x" * 10_000), "first " + "y" * 10_000 + " last")
    assert len(failure.message) == 2000
    assert len(failure.traceback) == TRACEBACK_TAIL
    assert failure.traceback.endswith(" last")


def test_an_exception_that_cannot_be_printed_is_still_described() -> None:
    """A broken `__str__` must not keep a task from being dead-lettered."""
    assert Failure.of(Reason.PERMANENT_ERROR, Unprintable()).error_type == "Unprintable"


def test_the_same_cause_has_the_same_group() -> None:
    """Numbers, ids, addresses and quoted values differ from letter to letter; the cause does not."""
    one = refused("order 41 'bob': <Card at 0x7f01> refused for 3f2b8c1e-0000-4000-8000-000000000001")
    two = refused("order 1337 'al': <Card at 0xffe2> refused for 9d2b8c1e-1111-4000-8000-00000000000f")
    assert one.group("shop.charge") == two.group("shop.charge")


def test_another_cause_has_another_group() -> None:
    """Task, reason, error type and the words of the message tell causes apart."""
    failure = refused("card refused")
    groups = {
        failure.group("shop.charge"),
        failure.group("shop.refund"),
        refused("card stolen").group("shop.charge"),
        Failure(reason=Reason.MAX_RETRIES, error_type="PaymentError", message="card refused").group("shop.charge"),
        Failure(reason=Reason.PERMANENT_ERROR, error_type="Other", message="card refused").group("shop.charge"),
    }
    assert len(groups) == 5


@given(words)
def test_any_message_has_a_group(message: str) -> None:
    """Eight hexadecimal digits, whatever the text."""
    assert len(refused(message).group("shop.charge")) == 8


@given(st.builds(Attempt, at=st.integers(0, 2**42).map(lambda ms: ms / 1000), worker=words, outcome=words, error=words))
def test_an_attempt_comes_back_from_rest_as_it_was(attempt: Attempt) -> None:
    """To the millisecond, on one line."""
    assert "\n" not in attempt.to_json()
    assert Attempt.from_json(attempt.to_json()) == attempt


def test_an_attempt_keeps_the_beginning_of_its_error() -> None:
    """Twenty lines of history stay small."""
    attempt = Attempt(at=1.0, worker="w", outcome="retry", error="x" * 600)
    assert Attempt.from_json(attempt.to_json()).error == "x" * 500


def test_history_grows_to_its_limit_and_then_drops_the_oldest() -> None:
    """A record keeps its newest twenty lines."""
    history = append_history("", None)
    assert history == ""
    for n in range(HISTORY_LIMIT + 5):
        history = append_history(history, Attempt(at=float(n), worker="w", outcome="retry", error="two\nlines"))
    assert append_history(history, None) == history
    record = Record(id="1", task="t", task_id="i", key="k", state=State.PENDING, primary=True, history=history)
    assert [attempt.at for attempt in record.attempts] == [float(n) for n in range(5, HISTORY_LIMIT + 5)]


def test_a_record_without_history_has_no_attempts() -> None:
    """Not one empty line."""
    assert Record(id="1", task="t", task_id="i", key="k", state=State.PENDING, primary=True).attempts == []
