"""Acknowledgements go in the order of receipt, and only on their own connection."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_llm.mqtt.acks import AckQueue


@given(st.permutations(range(8)))
def test_any_order_of_finishing_gives_the_order_of_receipt(order):
    acks = AckQueue()
    acks.new_connection()
    deliveries = [acks.receive(mid) for mid in range(100, 108)]
    sent: list[int] = []
    for index in order:
        sent += acks.finish(deliveries[index])
        assert sent == list(range(100, 100 + len(sent)))
    assert len(sent) == 8
    assert len(acks) == 0


def test_an_old_connections_delivery_is_not_acknowledged():
    acks = AckQueue()
    acks.new_connection()
    old = acks.receive(1)
    acks.new_connection()
    new = acks.receive(1)
    assert acks.finish(old) == []
    assert acks.finish(new) == [1]
    assert acks.finish(new) == []
