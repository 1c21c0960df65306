"""What goes through a message comes back as it was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import BatonError, Code, remote_error
from baton.ids import Ticket
from baton.kv_layout import Layout
from baton.sampling import MAX_SEED, FinishReason, SamplingParams, StopParams
from baton.wire import (
    finish_from_proto,
    finish_to_proto,
    layout_from_proto,
    layout_to_proto,
    sampling_from_proto,
    sampling_to_proto,
    ticket_from_proto,
    ticket_to_proto,
)
from protos import common_pb2, node_pb2

EPOCHS = st.integers(1, (1 << 63) - 1)
COUNTS = st.integers(0, (1 << 31) - 1)


@given(st.builds(Ticket, st.text(max_size=128), COUNTS, EPOCHS, EPOCHS))
def test_a_ticket_comes_back(ticket: Ticket) -> None:
    sent = ticket_to_proto(ticket).SerializeToString()
    assert ticket_from_proto(common_pb2.Ticket.FromString(sent)) == ticket


@given(
    sampling=st.builds(
        SamplingParams,
        temperature=st.floats(0, 100),
        top_k=st.integers(0, 1 << 30),
        top_p=st.floats(0, 1, exclude_min=True),
        min_p=st.floats(0, 1),
        seed=st.integers(0, MAX_SEED),
    ),
    stop=st.builds(StopParams, st.integers(1, (1 << 32) - 1), st.booleans()),
)
def test_sampling_comes_back_to_the_last_bit(sampling: SamplingParams, stop: StopParams) -> None:
    """A rounded temperature or seed would choose other tokens on another node (P3)."""
    sent = sampling_to_proto(sampling, stop).SerializeToString()
    received = node_pb2.ResolvedSampling.FromString(sent)
    assert sampling_from_proto(received) == (sampling, stop)


@given(
    st.builds(Layout, st.text(), st.sampled_from(["float32", "bfloat16"]), COUNTS, COUNTS, COUNTS),
    st.integers(1, 1024),
)
def test_a_layout_comes_back(layout: Layout, block_size: int) -> None:
    sent = layout_to_proto(layout, block_size).SerializeToString()
    received = common_pb2.KvLayout.FromString(sent)
    assert (layout_from_proto(received), received.block_size) == (layout, block_size)


@pytest.mark.parametrize("reason", FinishReason)
def test_a_finish_reason_comes_back(reason: FinishReason) -> None:
    assert finish_from_proto(finish_to_proto(reason)) is reason


def test_an_unknown_finish_reason_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown finish reason 0"):
        finish_from_proto(common_pb2.FINISH_REASON_UNSPECIFIED)


@pytest.mark.parametrize("code", Code)
def test_an_error_keeps_its_code_across_nodes(code: Code) -> None:
    error = remote_error(str(code), "what to change")
    assert isinstance(error, BatonError)
    assert (error.code, error.message) == (code, "what to change")


def test_an_error_code_of_another_release_counts_as_internal() -> None:
    assert remote_error("TEAPOT", "short and stout").code is Code.INTERNAL
