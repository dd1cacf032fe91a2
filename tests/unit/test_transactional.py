"""Transactional tasks, called here and now: what joins the run's transaction, and what is left when it fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import Ignore
from sqlalchemy import create_engine, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, sessionmaker

from taskguard import ReliableTask, Retry, install
from taskguard.celery.publishing import CapturingProducer
from taskguard.envelope import Envelope
from taskguard.errors import ConfigurationError, StoreUnavailable
from taskguard.headers import PREPARE
from taskguard.record import State
from taskguard.stores.sql import SQLStore
from taskguard.stores.sql.schema import messages
from tests.unit.sqlshop import NOWHERE
from tests.unit.transactionalshop import Effect, Shop, write


def test_effect_sends_and_completion_are_there_together(shop: Shop) -> None:
    """And before the end of the run none of them is, for anybody else."""
    seen: list[Any] = []

    def body(self: ReliableTask) -> str:
        write(self.session, "paid")
        shop.mail.delay("by delay")
        self.app.send_task("elsewhere", (1,))
        shop.mail.apply_async(("with the session",), session=self.session)
        seen.extend((shop.effects(), shop.sent(), shop.record().state))
        return "done"

    assert shop.run(body).get() == "done"
    assert seen == [[], [], State.RUNNING]
    assert shop.effects() == ["paid"]
    assert shop.sent() == ["mail", "elsewhere", "mail"]
    assert shop.record().state is State.DONE


@pytest.mark.parametrize("failure", [ValueError("no"), Ignore(), ConnectionError("away")])
def test_a_run_that_does_not_complete_leaves_nothing(shop: Shop, failure: Exception) -> None:
    """Nor does it publish anything: the broker is not there."""

    def body(self: ReliableTask) -> None:
        write(self.session, "paid")
        shop.mail.delay()
        raise failure

    shop.run(body, retry=Retry(max_retries=0))
    assert (shop.effects(), shop.sent()) == ([], [])
    assert shop.record().state in (State.DEAD, State.DISCARDED)


def test_an_asked_retry_leaves_nothing_of_its_attempt(shop: Shop) -> None:
    """The attempt that succeeds is the one whose effects are there, ``throw=False`` or not."""

    def body(self: ReliableTask, throw: bool) -> int:
        write(self.session, f"attempt {self.request.retries}")
        shop.mail.delay()
        if self.request.retries == 0:
            self.retry(countdown=0, throw=throw)
        return self.request.retries  # type: ignore[no-any-return]

    for number, throw in enumerate((True, False), start=1):
        shop.run(body, throw, name=f"work{number}")
        assert shop.effects() == ["attempt 1"]
        assert shop.sent() == ["mail"] * number
        with shop.engine.begin() as connection:
            connection.execute(text("DELETE FROM effects"))


def test_what_the_database_refuses_at_the_end_undoes_the_run(shop: Shop) -> None:
    """What is only added to the session is flushed when the body has returned; the run fails as if the body had."""

    def body(self: ReliableTask) -> None:
        shop.mail.delay()
        self.session.add_all([Effect(what="twice"), Effect(what="twice")])

    result = shop.run(body, retry=Retry(max_retries=0))
    assert isinstance(result.result, IntegrityError)
    assert (shop.effects(), shop.sent()) == ([], [])
    assert shop.record().state is State.DEAD


def test_a_run_that_lost_custody_writes_nothing(shop: Shop) -> None:
    """The fence is in the transaction: whoever took the key over is not disturbed."""

    def body(self: ReliableTask) -> None:
        with shop.engine.begin() as connection:  # another worker has claimed it meanwhile
            connection.execute(update(messages).values(token=messages.c.token + 1))
        write(self.session, "paid")
        shop.mail.delay()

    shop.run(body)
    assert (shop.effects(), shop.sent()) == ([], [])
    assert shop.record().state is State.RUNNING


def test_a_duplicate_gets_the_result_and_no_second_effect(shop: Shop) -> None:
    """The stored result, as of any other task."""

    def body(self: ReliableTask, order: str) -> str:
        write(self.session, order)
        return f"paid {order}"

    task = shop.task(body, idempotency_key="order:{order}")
    assert [task.apply(("o1",)).get() for _ in range(2)] == ["paid o1"] * 2
    assert shop.effects() == ["o1"]


def test_a_replacement_goes_with_what_was_written(shop: Shop) -> None:
    """It carries the work on: the run's effects, its end and the replacement are one."""

    def body(self: ReliableTask) -> None:
        write(self.session, "begun")
        self.request.is_eager = False  # in eager mode Celery runs the replacement in place
        self.replace(shop.mail.si("goes on"))

    shop.run(body)
    assert shop.effects() == ["begun"]
    assert shop.sent() == ["mail"]
    assert shop.record().state is State.DISCARDED


def test_a_body_that_uses_no_session_needs_no_transaction(shop: Shop) -> None:
    """Its completion is the store's own."""

    def body(self: ReliableTask) -> int:
        return 7

    assert shop.run(body).get() == 7
    assert shop.record().state is State.DONE


def test_a_send_alone_joins(shop: Shop) -> None:
    """The session begins with the first thing that is sent."""

    def body(self: ReliableTask, fail: bool) -> None:
        shop.mail.delay()
        if fail:
            raise ValueError

    task = shop.task(body, retry=Retry(max_retries=0))
    task.apply((True,))
    assert shop.sent() == []
    task.apply((False,))
    assert shop.sent() == ["mail"]


@pytest.mark.parametrize("parts", ["tasks", "chains"])
def test_a_chord_in_the_body_tells_the_result_backend_nothing_before_the_commit(shop: Shop, parts: str) -> None:
    """What it must know of the chord travels with the chord's messages."""

    def body(self: ReliableTask) -> None:
        each = {name: shop.mail.si(name) for name in "abcd"}
        chains = [chain(each["a"], each["b"]), chain(each["c"], each["d"])]
        chord(chains if parts == "chains" else [each["a"], each["b"]])(shop.mail.si("end"))

    shop.run(body)
    wires = [Envelope.from_wire(record.wire or b"") for record in shop.store.outbox.peek(100)]
    assert len(wires) == 2
    told = [effect[0] for wire in wires for effect in wire.properties.get(PREPARE, [])]
    assert "set_chord_size" in told


def test_a_group_that_cannot_be_saved_leaves_nothing(shop: Shop) -> None:
    """The result backend is told of it before the commit: after that nobody would tell it any more."""

    def body(self: ReliableTask) -> None:
        write(self.session, "paid")
        group([shop.mail.si("a")]).apply_async().save()
        with self.session.begin_nested() as savepoint:  # whose messages carry nothing of others away
            shop.mail.delay("undone")
            savepoint.rollback()

    shop.run(body, retry=Retry(max_retries=0))
    assert (shop.effects(), shop.sent()) == ([], [])
    assert shop.record().state is State.DEAD


def test_a_task_sent_outside_is_sent_at_once(shop: Shop) -> None:
    """``session=False``, for what is to be sent whatever becomes of the run."""
    shop.app.taskguard.broker_checked = True
    broker = CapturingProducer()

    def body(self: ReliableTask) -> None:
        shop.mail.apply_async(("told",), session=False, producer=broker)
        raise ValueError

    shop.run(body, retry=Retry(max_retries=0))
    assert b"told" in broker.published["body"]
    assert shop.sent() == []


def test_a_unique_task_says_how_it_can_be_sent(shop: Shop) -> None:
    """Its name is held in the store, which a rollback would not give back."""

    @shop.app.task(name="only", base=ReliableTask, shared=False, unique_for=60)
    def only() -> None: ...

    def body(self: ReliableTask) -> None:
        only.delay()

    with pytest.raises(ConfigurationError, match="unique_for"):
        shop.run(body).get()


@pytest.mark.parametrize(
    ("misuse", "complaint"),
    [
        (lambda session: session.commit(), "committed with the completion"),
        (lambda session: session.close(), "the body has closed it"),
        (lambda session: session.__enter__().__exit__(None, None, None), "the body has closed it"),
        (lambda session: (session.begin_nested(), session.commit()), "committed with the completion"),
        (lambda session: (session.begin_nested().rollback(), session.close()), "the body has closed it"),
    ],
)
def test_a_body_that_would_end_the_transaction_is_told(
    shop: Shop, misuse: Callable[[Session], None], complaint: str
) -> None:
    """Half of it committed, or all of it thrown away in silence, would be worse."""

    def body(self: ReliableTask) -> None:
        write(self.session, "paid")
        misuse(self.session)

    with pytest.raises(ConfigurationError, match=complaint):
        shop.run(body).get()
    assert shop.effects() == []


def test_a_body_may_roll_back_what_it_wrote(shop: Shop) -> None:
    """All of it, or a savepoint's; its sends are rows like the others."""

    def body(self: ReliableTask) -> None:
        write(self.session, "thrown away")
        shop.mail.delay("thrown away")
        self.session.rollback()
        write(self.session, "kept")
        savepoint = self.session.begin_nested()
        shop.mail.delay("in the savepoint")
        with pytest.raises(IntegrityError):
            write(self.session, "kept")
        savepoint.rollback()

    shop.run(body).get()
    assert (shop.effects(), shop.sent()) == (["kept"], [])


def test_a_sessionmaker_of_ones_own_is_used(shop: Shop, tmp_path: Path) -> None:
    """Of the task, or of the application; one on another database is refused."""
    own = sessionmaker(create_engine(shop.url), info={"own": True})

    def body(self: ReliableTask) -> bool:
        write(self.session, f"by {self.name}")
        return bool(self.session.info.get("own"))

    assert shop.run(body, session_factory=own).get() is True
    shop.app.taskguard._settings = replace(shop.app.taskguard.settings, session=own)
    assert shop.run(body, name="work2").get() is True
    other = sessionmaker(create_engine(f"sqlite:///{tmp_path / 'other.sqlite3'}"))
    with pytest.raises(ConfigurationError, match=r"other\.sqlite3"):
        shop.run(body, name="work3", session_factory=other).get()
    assert shop.effects() == ["by work", "by work2"]


def test_a_store_that_is_no_database_is_refused(tmp_path: Path) -> None:
    """When a worker starts, and where a run begins."""
    app = Celery("shop", broker=NOWHERE, backend=NOWHERE, set_as_current=False)
    install(app, store="memory://", namespace=str(tmp_path))

    @app.task(base=ReliableTask, bind=True, shared=False, transactional=True)
    def work(self: ReliableTask) -> None:
        self.session  # noqa: B018

    with pytest.raises(ConfigurationError, match="transactional=True needs the store in the database"):
        app.taskguard.check_worker(shared_memory=True)
    with pytest.raises(ConfigurationError, match="transactional=True needs"):
        work.apply().get()


def test_the_session_is_there_in_a_transactional_run_only(shop: Shop) -> None:
    """A plain reliable task is told what to declare."""

    def body(self: ReliableTask) -> None:
        self.session  # noqa: B018

    with pytest.raises(ConfigurationError, match="declare transactional=True"):
        shop.run(body, transactional=False).get()


def test_a_commit_whose_reply_is_lost_is_asked_for(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was made: the run has completed. The store may take a while to say so."""
    asked: list[int] = []
    seen, commit = SQLStore.seen, Session.commit

    def commit_and_lose(self: Session) -> None:
        commit(self)
        raise ConnectionResetError("the reply was lost")

    def unavailable_once(self: SQLStore, *args: Any) -> Any:
        asked.append(1)
        if len(asked) == 1:
            raise StoreUnavailable("not yet")
        return seen(self, *args)

    monkeypatch.setattr(Session, "commit", commit_and_lose)
    monkeypatch.setattr(SQLStore, "seen", unavailable_once)

    def body(self: ReliableTask) -> str:
        write(self.session, "paid")
        return "done"

    assert shop.run(body).get() == "done"
    assert shop.effects() == ["paid"]
    assert len(asked) == 2


def test_a_commit_that_was_not_made_is_retried(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a transient error, whatever ``autoretry_for`` lists: the failure is not the body's."""
    commits: list[int] = []
    commit = Session.commit

    def commit_at_last(self: Session) -> None:
        commits.append(1)
        if len(commits) == 1:
            raise ConnectionResetError("gone before it arrived")
        commit(self)

    monkeypatch.setattr(Session, "commit", commit_at_last)

    def body(self: ReliableTask) -> int:
        write(self.session, "paid")
        return self.request.retries  # type: ignore[no-any-return]

    assert shop.run(body, autoretry_for=(KeyError,)).get() == 1
    assert shop.effects() == ["paid"]
    assert shop.record().state is State.DONE
