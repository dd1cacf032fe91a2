"""Shipping, rehearsed beside a real carrier: its limit is kept, its outages are waited out, and no attempt is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from taskguard.testing import Reliable
from workers.carrier import Carrier as Server
from workers.shipping import carrier, label


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The carrier, which the task calls."""
    with Server(0, limit=1000) as server:  # the rehearsal's seconds are shorter than its own
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        monkeypatch.setenv("CARRIER_URL", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()


def test_labels_are_made_at_the_carriers_pace(reliable: Reliable, server: Server) -> None:
    """Two seconds' worth takes two seconds, in order, however many workers there are."""
    began = reliable.clock()
    results = [label.delay(str(number)) for number in range(90)]
    reliable.drain(until="idle")
    assert [order_id for _, order_id, _ in server.calls] == [str(number) for number in range(90)]
    assert reliable.clock() - began == pytest.approx(86 / 42, abs=0.1)
    assert {result.get() for result in results} == {f"label-{number}" for number in range(90)}


def test_an_outage_is_waited_out_without_a_failed_task(reliable: Reliable, server: Server) -> None:
    """The carrier sees the calls that trip the circuit, then probes, then all that waited for it."""
    server.administer({"down_for": 3600})
    for number in range(40):
        label.delay(str(number))
    reliable.drain(until="30s")
    assert carrier.circuit is not None
    assert carrier.circuit.state == "open"
    tried = len(server.calls)
    assert tried < 15, "most have only waited"
    server.administer({"down_for": 0})
    reliable.drain(until="5m")
    assert sorted(int(order_id) for _, order_id, status in server.calls if status == 201) == list(range(40))
    assert reliable.dead_letters == []


def test_a_label_is_made_once_for_an_order(reliable: Reliable, server: Server) -> None:
    """The second message is answered by the first one's result, and asks the carrier for nothing."""
    first, second = label.delay("o1"), label.delay("o1")
    reliable.drain(until="idle")
    assert first.get() == second.get() == "label-o1"
    assert len(server.calls) == 1
