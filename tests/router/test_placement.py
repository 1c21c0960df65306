"""Which pair of nodes a request goes to."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import BatonError, NoCapacity, Overloaded
from router.life_events import Leg
from router.placement import NodeView, PlacementRequest, can_serve, place
from tests.router.samples import LAYOUT, node

BFLOAT16 = replace(LAYOUT, dtype="bfloat16")
P1 = NodeView(node("p1", Leg.PREFILL, 1), 0)
P2 = NodeView(node("p2", Leg.PREFILL, 2), 0)
D1 = NodeView(node("d1", Leg.DECODE, 3), 0)
D2 = NodeView(node("d2", Leg.DECODE, 4), 0)
SMALL = PlacementRequest(prompt_tokens=10, max_tokens=10)


def test_the_least_loaded_pair_is_taken_and_ties_go_to_the_smaller_id() -> None:
    assert place([P2, D2, D1, P1], SMALL).prefill.node_id == "p1"
    busy = [replace(P1, load_tokens=5), P2, replace(D1, load_tokens=5), D2]
    placement = place(busy, SMALL)
    assert (placement.prefill.node_id, placement.decode.node_id) == ("p2", "d2")


@pytest.mark.parametrize(("views", "role"), [([D1], "prefill"), ([P1], "decode"), ([], "prefill")])
def test_a_missing_role_is_named(views: list[NodeView], role: str) -> None:
    with pytest.raises(NoCapacity, match=f"no {role} node"):
        place(views, SMALL)


def test_draining_and_disconnected_nodes_are_passed_over() -> None:
    views = [replace(P1, draining=True), P2, replace(D1, connected=False), D2]
    placement = place(views, SMALL)
    assert (placement.prefill.node_id, placement.decode.node_id) == ("p2", "d2")
    assert not can_serve([replace(P1, draining=True), D1])


def test_nodes_with_different_layouts_are_never_paired() -> None:
    odd = NodeView(node("d0", Leg.DECODE, 9, BFLOAT16), 0)
    assert place([P1, odd, D1], SMALL).decode.node_id == "d1"
    assert not can_serve([P1, odd])
    with pytest.raises(NoCapacity, match="--dtype"):
        place([P1, odd], SMALL)


def test_a_request_larger_than_every_cache_is_told_what_to_raise() -> None:
    tiny = NodeView(node("d1", Leg.DECODE, 3, blocks_total=1), 0)  # 16 tokens
    assert place([P1, tiny], PlacementRequest(10, 7)).decode == tiny.node
    with pytest.raises(Overloaded, match="--kv-memory-mib"):
        place([P1, tiny], PlacementRequest(10, 8))
    assert place([P1, tiny, D2], PlacementRequest(10, 8)).decode == D2.node


_VIEWS = st.lists(
    st.builds(
        NodeView,
        st.builds(
            node,
            st.sampled_from(["a", "b", "c", "d"]),
            st.sampled_from(Leg),
            st.integers(1, 9),
            st.sampled_from([LAYOUT, BFLOAT16]),
            st.integers(1, 4),
        ),
        st.integers(0, 50),
        st.booleans(),
        st.booleans(),
    ),
    max_size=8,
)


@given(_VIEWS, st.integers(1, 64), st.integers(1, 64))
def test_a_placement_is_always_feasible_and_does_not_depend_on_order(
    views: list[NodeView], prompt_tokens: int, max_tokens: int
) -> None:
    request = PlacementRequest(prompt_tokens, max_tokens)
    try:
        placement = place(views, request)
    except BatonError:
        assert not can_serve(views) or prompt_tokens + max_tokens > 16
        return
    chosen = [v for v in views if v.node in (placement.prefill, placement.decode)]
    assert any(view.usable for view in chosen)
    assert placement.prefill.layout == placement.decode.layout
    assert placement.prefill.kv_tokens >= prompt_tokens
    assert placement.decode.kv_tokens >= request.kv_tokens
    again = place(list(reversed(views)), request)
    assert (again.prefill.node_id, again.decode.node_id) == (
        placement.prefill.node_id,
        placement.decode.node_id,
    )
