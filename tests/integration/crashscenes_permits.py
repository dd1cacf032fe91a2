"""More scenes of the crash points: tasks that need permits, and what a process that dies with them leaves to others.

Permits name no message, so a point is armed for a downstream. Those of `crashapp` have one place for the whole fleet: a
task that ends after a crash has shown that the place came back. An end tells the store nothing at once: releases and
successes go out by a thread, and a scene waits for them lest the next one's crash meets them.
"""

from __future__ import annotations

from celery.result import AsyncResult

from taskguard.permits import CircuitView
from tests.integration.crashpoints import Action, Point
from tests.integration.crashscenes import DISCARDED, DONE, before, dies_at
from tests.integration.crashscenes_outside import SCENES
from tests.integration.crew import Crew, gate

__all__ = ["SCENES"]


# -- a place, and who has it -------------------------------------------------------------------------------------------


@dies_at("PermitStore.admit")
def a_task_that_asks_for_its_permits(crew: Crew, point: Point) -> None:
    _asks(crew, point, "die")


@dies_at("PermitStore.admit")
def a_task_that_asks_in_a_worker_that_falls(crew: Crew, point: Point) -> None:
    _asks(crew, point, "fall")


@dies_at("PermitStore.release")
def a_task_that_gives_its_place_back(crew: Crew, point: Point) -> None:
    _gives_back(crew, point, "die")


@dies_at("PermitStore.release")
def a_task_that_gives_back_in_a_worker_that_falls(crew: Crew, point: Point) -> None:
    _gives_back(crew, point, "fall")


@dies_at("PermitStore.renew_slots")
def a_long_task_that_keeps_its_place(crew: Crew, point: Point) -> None:
    result = crew.send("charging", waits := gate())
    crew.wait_started(result)
    crew.armoury.arm(point, ["bank"])
    crew.wait_fired(point)
    crew.journal.open(waits)
    record = crew.assert_ended(result, "charging", DONE, starts=2)
    assert record.crashes == 1
    _place_is_free(crew)


def _asks(crew: Crew, point: Point, action: Action) -> None:
    crew.journal.open(waits := gate())
    crew.armoury.arm(point, ["bank"], action=action)
    result = crew.send("charging", waits)
    crew.wait_fired(point)
    crew.assert_ended(result, "charging", DONE, starts=1)
    _place_is_free(crew)


def _gives_back(crew: Crew, point: Point, action: Action) -> None:
    result = crew.send("charging", waits := gate())
    crew.wait_started(result)
    crew.armoury.arm(point, ["bank"], action=action)
    crew.journal.open(waits)
    crew.wait_fired(point)
    crew.assert_ended(result, "charging", DONE, starts=1, cut=1)  # the thread that dies may be faster than the outcome
    _place_is_free(crew)


def _place_is_free(crew: Crew) -> None:
    """The one place of the fleet can be had again."""
    crew.journal.open(waits := gate())
    crew.assert_ended(crew.send("charging", waits), "charging", DONE, starts=1)


# -- a circuit, and who tells it ---------------------------------------------------------------------------------------


@dies_at("PermitStore.circuit")
def the_first_task_of_a_process(crew: Crew, point: Point) -> None:
    known = _circuit(crew).calls
    crew.kill_all()
    crew.armoury.arm(point, ["shop"])
    result = _buy(crew, failures=0)
    crew.wait_fired(point)
    crew.assert_ended(result, "buying", DONE, starts=1)
    _wait_closed(crew, calls=known + 1)


@dies_at("PermitStore.report")
def a_task_that_opens_the_circuit(crew: Crew, point: Point) -> None:
    known = _circuit(crew)
    crew.armoury.arm(point, ["shop"])
    result = _buy(crew, failures=1)
    crew.wait_fired(point)
    record = crew.assert_ended(result, "buying", DONE, starts=2)
    assert record.crashes == 1
    untold = point.side == "before"  # then its second run is an ordinary call, else the probe that closes the circuit
    _wait_closed(crew, calls=known.calls + 1 if untold else 0)
    assert (_circuit(crew).generation == known.generation) is untold


@dies_at("PermitStore.report")
def a_task_that_closes_the_circuit(crew: Crew, point: Point) -> None:
    result = crew.send("buying", 1, waits := gate())
    crew.wait_started(result, 2)
    assert _circuit(crew).state == "half_open", "its second run is the probe"
    crew.armoury.arm(point, ["shop"])
    crew.journal.open(waits)
    crew.wait_fired(point)
    record = crew.assert_ended(result, "buying", DONE, starts=3)
    assert record.crashes == 1
    _wait_closed(crew, calls=1 - before(point))  # the probe that died untold is made again


def _buy(crew: Crew, *, failures: int) -> AsyncResult:
    crew.journal.open(waits := gate())
    return crew.send("buying", failures, waits)


def _circuit(crew: Crew) -> CircuitView:
    return crew.permits.circuit("shop")


def _wait_closed(crew: Crew, *, calls: int) -> None:
    """The fleet's circuit is closed and has counted *calls* since; no process has more to tell."""
    crew.wait(
        lambda: (view := _circuit(crew)).state == "closed" and view.calls == calls, f"{calls} calls in a closed circuit"
    )


# -- a booking ---------------------------------------------------------------------------------------------------------


@dies_at("PermitStore.unbook")
def a_task_whose_slot_would_be_too_late(crew: Crew, point: Point) -> None:
    first = crew.send("rationed", n := gate())
    crew.assert_ended(first, "rationed", DONE, starts=1)
    crew.armoury.arm(point, [f"ration/key={n}"])
    second = crew.send("rationed", n, deadline=600)
    crew.wait_fired(point)
    crew.assert_ended(second, "rationed", DISCARDED, starts=0, shown="REVOKED")
