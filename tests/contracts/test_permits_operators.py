"""Adaptive limits and paused queues: what is said in one process holds in all. On every backend."""

from __future__ import annotations

import pytest

from taskguard.errors import ConfigurationError
from taskguard.ports import PermitStore
from tests.contracts.permits import START, MicroClock


def test_a_limit_that_adapts_keeps_why(permits: PermitStore, micros: MicroClock) -> None:
    """The newest change first, with when, from and to; twenty of them."""
    assert permits.adaptive("bank") is None
    first = permits.adapt("bank", 50, why="declared")
    assert (first.limit, first.changes) == (50.0, ((START, 50.0, 50.0, "declared"),))
    micros.advance(1.5)
    view = permits.adapt("bank", 25.5, why='429 "twice"\n')
    assert view.changes == ((START + 1.5, 50.0, 25.5, '429 "twice"\n'), *first.changes)
    assert permits.adaptive("bank") == view
    for step in range(30):
        permits.adapt("bank", 30 + step, why=str(step))
    assert [change[3] for change in permits.adapt("bank", 1, why="last").changes][:2] == ["last", "29"]
    last = permits.adaptive("bank")
    assert last is not None
    assert len(last.changes) == 20
    assert permits.adaptive("other") is None


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), True, "5"], ids=str)
def test_a_limit_that_is_none_cannot_be_set(permits: PermitStore, limit: object) -> None:
    """Neither zero nor nan ends in the store, where every process would read it."""
    with pytest.raises(ConfigurationError, match="limit bank"):
        permits.adapt("bank", limit, why="")  # type: ignore[arg-type]
    assert permits.adaptive("bank") is None


def test_a_paused_queue_is_paused_until_its_instant(permits: PermitStore, micros: MicroClock) -> None:
    """Then it is not, though nobody resumed it."""
    permits.pause("mail", until=START + 60, who="eve", why="the bank is away")
    permits.pause("{a} b", until=None, who="", why="")
    assert permits.paused() == {"mail": (START + 60, "eve", "the bank is away"), "{a} b": (None, "", "")}
    micros.advance(us=59_999_999)
    assert "mail" in permits.paused()
    micros.advance(us=1)
    assert permits.paused() == {"{a} b": (None, "", "")}
    assert not permits.resume("mail")


def test_a_paused_queue_is_resumed(permits: PermitStore) -> None:
    """Once; a pause said again replaces the one before."""
    permits.pause("mail", until=START + 60, who="eve", why="")
    permits.pause("mail", until=None, who="adam", why="longer")
    assert permits.paused() == {"mail": (None, "adam", "longer")}
    assert permits.resume("mail")
    assert not permits.resume("mail")
    assert permits.paused() == {}


def test_a_store_tells_its_clock(permits: PermitStore, micros: MicroClock) -> None:
    """To the microsecond."""
    micros.advance(us=123_457)
    assert permits.now() == pytest.approx(START + 0.123457, abs=4e-7)


def test_a_watcher_is_told_when_a_queue_is_paused_or_resumed(permits: PermitStore) -> None:
    """So that workers need not ask. A store that cannot push says so by coming back at once."""
    heard: list[list[str]] = []

    def told(stands: bool) -> None:
        assert stands
        heard.append(list(permits.paused()))
        if len(heard) == 1:
            permits.pause("mail", until=None, who="eve", why="")
        elif len(heard) == 2:
            permits.resume("mail")

    permits.watch_paused(told, stop=lambda: len(heard) == 3)
    assert heard in ([[], ["mail"], []], [])
