"""Leases and epochs of the nodes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import BatonError, IncompatiblePeer, InvalidRequest, Overloaded
from router import membership
from router.life_events import Leg
from router.membership import (
    Connect,
    Disconnect,
    Event,
    Heartbeat,
    Leave,
    Membership,
    NodeInfo,
    Register,
    Tick,
)
from tests.router.samples import LAYOUT, node

LEASE_S = 5.0
OLD, NEW = node("a", Leg.PREFILL, 1), node("a", Leg.PREFILL, 2)


def test_a_node_joins_once_however_often_it_registers() -> None:
    members = Membership("f1", LEASE_S)
    assert members.handle(Register(OLD), 0.0) == [Connect(OLD)]
    assert members.handle(Register(OLD), 1.0) == []
    assert members.knows("a", 1)


def test_a_silent_node_is_gone_when_its_lease_has_run_out() -> None:
    members = Membership("f1", LEASE_S)
    members.handle(Register(OLD), 0.0)
    members.handle(Heartbeat("a", 1, draining=False), 3.0)
    assert members.handle(Tick(), 7.9) == []
    (gone,) = members.handle(Tick(), 8.0)
    assert isinstance(gone, Disconnect)
    assert not members.knows("a", 1)
    assert members.handle(Tick(), 9.0) == []


def test_a_node_that_comes_back_is_a_new_node() -> None:
    members = Membership("f1", LEASE_S)
    members.handle(Register(OLD), 0.0)
    lost, joined = members.handle(Register(NEW), 1.0)
    assert isinstance(lost, Disconnect)
    assert lost.node == OLD
    assert joined == Connect(NEW)


def test_messages_of_an_old_epoch_change_nothing() -> None:
    members = Membership("f1", LEASE_S)
    members.handle(Register(NEW), 0.0)
    members.handle(Heartbeat("a", 1, draining=True), 4.0)
    assert members.handle(Leave("a", 1), 4.0) == []
    assert not members.knows("a", 1)
    assert not members.members()[0].draining
    assert len(members.handle(Tick(), 5.0)) == 1, "the old node's heartbeat renewed nothing"


def test_draining_is_told_by_heartbeat_and_leaving_disconnects() -> None:
    members = Membership("f1", LEASE_S)
    members.handle(Register(OLD), 0.0)
    members.handle(Heartbeat("a", 1, draining=True), 1.0)
    assert members.members()[0].draining
    (gone,) = members.handle(Leave("a", 1), 1.0)
    assert isinstance(gone, Disconnect)


def test_another_model_is_refused_with_what_to_change() -> None:
    other = replace(OLD, layout=replace(LAYOUT, model_fingerprint="f2"))
    with pytest.raises(IncompatiblePeer, match="same --model"):
        Membership("f1", LEASE_S).handle(Register(other), 0.0)


@pytest.mark.parametrize(
    "bad",
    [
        replace(OLD, node_id=""),
        replace(OLD, node_id="x" * 129),
        replace(OLD, address=""),
        replace(OLD, blocks_total=0),
        replace(OLD, block_size=0),
    ],
)
def test_a_node_without_id_address_or_cache_is_refused(bad: NodeInfo) -> None:
    with pytest.raises(InvalidRequest):
        Membership("f1", LEASE_S).handle(Register(bad), 0.0)


def test_the_number_of_nodes_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "MAX_NODES", 2)
    members = Membership("f1", LEASE_S)
    for epoch in (1, 2):
        members.handle(Register(node(f"n{epoch}", Leg.DECODE, epoch)), 0.0)
    with pytest.raises(Overloaded, match="the most it takes"):
        members.handle(Register(node("n3", Leg.DECODE, 3)), 0.0)


_EVENTS = st.one_of(
    st.builds(
        Register,
        st.builds(node, st.sampled_from("abc"), st.sampled_from(Leg), st.integers(1, 4)),
    ),
    st.builds(Heartbeat, st.sampled_from("abc"), st.integers(1, 4), st.booleans()),
    st.builds(Leave, st.sampled_from("abc"), st.integers(1, 4)),
    st.just(Tick()),
)


@given(st.lists(st.tuples(_EVENTS, st.floats(0.0, 6.0)), max_size=30))
def test_connects_and_disconnects_always_alternate(steps: list[tuple[Event, float]]) -> None:
    members = Membership("f1", LEASE_S)
    connected: dict[str, NodeInfo] = {}
    now = 0.0
    for event, passed_s in steps:
        now += passed_s
        try:
            actions = members.handle(event, now)
        except BatonError:
            continue
        for action in actions:
            if isinstance(action, Connect):
                assert action.node.node_id not in connected
                connected[action.node.node_id] = action.node
            else:
                assert connected.pop(action.node.node_id) == action.node
        members.check_invariants()
        assert [m.node for m in members.members()] == list(connected.values())
