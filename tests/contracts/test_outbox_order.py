"""The order of an outbox's rows, however many were sent together."""

# ruff: noqa: F811
from __future__ import annotations

from taskguard.stores.sql.outgoing import ROWS
from tests.contracts.test_outbox import House, house  # noqa: F401


def test_the_last_of_a_large_group_is_not_ahead_of_the_clock(house: House) -> None:
    """Its number orders it within its statement, and not against what is sent a moment later."""
    house.write("last", ordering="k", first=100 * ROWS - 1)
    house.write("then", ordering="k")
    house.hand_over()
    assert house.broker.keys == ["last", "then"]


def test_a_large_group_goes_out_before_what_is_sent_after_it(house: House) -> None:
    """In one transaction, or in the next one; and in the order of the group."""
    size = ROWS + 2
    first = [f"g{n}" for n in range(size)]
    with house.engine.connect() as connection:
        house.send(connection, *first)
        house.send(connection, "then")
        house.send(connection, "a", "b")
        connection.commit()
        house.send(connection, "next")
        connection.commit()
    expected = [*first, "then", "a", "b", "next"]
    assert [record.key for record in house.store.outbox.peek(2 * size)] == expected
    assert len({*house.ordinals()}) == len(expected)
    while house.hand_over(limit=500).taken:
        pass
    assert house.broker.keys == expected


def test_a_key_goes_out_in_the_order_in_which_it_was_written(house: House) -> None:
    """Batch after batch, whatever else goes out meanwhile."""
    house.write("a1", "a2", ordering="a")
    house.write("x")
    house.write("a3", "a4", "a5", ordering="a")
    while house.hand_over(limit=2).taken:
        pass
    assert [key for key in house.broker.keys if key != "x"] == ["a1", "a2", "a3", "a4", "a5"]
