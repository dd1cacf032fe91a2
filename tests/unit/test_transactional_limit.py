"""Transactional tasks whose end is interrupted: all of the run is there, or nothing of it; and savepoints."""

from __future__ import annotations

from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import create_engine, event
from sqlalchemy.orm import Session, sessionmaker

from taskguard import ReliableTask, Retry
from taskguard.errors import ConfigurationError
from taskguard.record import State
from taskguard.stores.sql import SQLStore
from taskguard.stores.sql.transactional import RunTransaction
from tests.unit.transactionalshop import Effect, Shop, write


def _strike(monkeypatch: pytest.MonkeyPatch, kind: type, method: str, *, before: bool) -> list[int]:
    """The soft time limit strikes at the first call of this method, before it or after it."""
    calls: list[int] = []
    original = getattr(kind, method)

    def struck(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if before and len(calls) == 1:
            raise SoftTimeLimitExceeded
        answer = original(self, *args, **options)
        if len(calls) == 1:
            raise SoftTimeLimitExceeded
        return answer

    monkeypatch.setattr(kind, method, struck)
    return calls


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("kind", "method"), [(Session, "flush"), (SQLStore, "end_in")])
def test_a_soft_limit_before_the_commit_leaves_all_of_an_attempt_or_nothing(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, kind: type, method: str, before: bool, replaces: bool
) -> None:
    """The end of a run is repeated after one; not without what the body wrote. The attempt fails, as by the body."""

    def body(self: ReliableTask) -> None:
        self.session.add(Effect(what="paid"))
        calls = _strike(monkeypatch, kind, method, before=before)
        assert not calls
        if replaces:
            self.request.is_eager = False
            self.replace(shop.mail.si("goes on"))

    result = shop.run(body, retry=Retry(max_retries=0))
    assert isinstance(result.result, SoftTimeLimitExceeded)
    assert (shop.effects(), shop.sent()) == ([], [])
    assert shop.record().state is State.DEAD


@pytest.mark.parametrize(("kind", "method"), [(Session, "commit"), (RunTransaction, "_release")])
def test_a_soft_limit_after_the_commit_changes_nothing(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, kind: type, method: str
) -> None:
    """The run has completed, once, and says so."""

    def body(self: ReliableTask) -> str:
        write(self.session, "paid")
        _strike(monkeypatch, kind, method, before=False)
        return "done"

    assert shop.run(body, retry=Retry(max_retries=0)).get() == "done"
    assert shop.effects() == ["paid"]
    assert shop.record().state is State.DONE


def test_an_interrupted_connection_is_given_up(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one of a sessionmaker of one's own: the answer to the last question may still be on it."""
    own = create_engine(shop.url)
    given_up: list[object] = []
    event.listen(own, "invalidate", lambda *_: given_up.append(1))

    def body(self: ReliableTask) -> None:
        write(self.session, "paid")
        _strike(monkeypatch, SQLStore, "end_in", before=False)

    shop.run(body, retry=Retry(max_retries=0), session_factory=sessionmaker(own))
    assert given_up
    assert shop.effects() == []
    own.dispose()


def test_a_savepoint_of_the_body_s_is_kept_at_its_end(shop: Shop) -> None:
    """As a block, or by its own commit; the transaction goes on."""

    def body(self: ReliableTask) -> None:
        with self.session.begin_nested():
            write(self.session, "in the block")
        savepoint = self.session.begin_nested()
        shop.mail.delay("in the savepoint")
        savepoint.commit()
        with pytest.raises(ConfigurationError, match="committed with the completion"):
            self.session.commit()
        assert shop.effects() == []

    shop.run(body).get()
    assert (shop.effects(), shop.sent()) == (["in the block"], ["mail"])
