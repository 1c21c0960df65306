"""P4, P6, P8, P11: what does not fit is refused before a byte moves, and by a sentence.

After every story, `play` also checks that each ticket ended once on either side and left nothing
behind: see `tests/kvtransfer/nodes.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baton.config import Config
from baton.errors import Cancelled, Code, LinkLost
from kvtransfer import incoming as incoming_module
from tests.kvtransfer.gates import seen
from tests.kvtransfer.nodes import (
    CONFIG,
    TOKENS,
    DecodeSide,
    PrefillSide,
    failed,
    no_link_threads,
    passes,
    play,
)
from tests.kvtransfer.settings import make_spec

OTHER_MODELS = {
    "model_fingerprint 'sha256:other' there and 'sha256:small' here": replace(
        make_spec(), fingerprint="sha256:other"
    ),
    "layers 4 there and 3 here": make_spec(layers=4),
    "kv_heads 4 there and 2 here": make_spec(kv_heads=4),
    "head_dim 4 there and 8 here": make_spec(head_dim=4),
}


# --- nodes that do not fit ---


@pytest.mark.parametrize("sentence", OTHER_MODELS)
def test_a_node_with_another_layout_is_refused_by_a_sentence_that_says_what_differs(
    sentence: str,
) -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        ticket = decode.ticket()
        prefill.send(ticket, decode.address, TOKENS)
        error = await prefill.ends.of(ticket)
        assert error.code is Code.FAILED_PRECONDITION
        assert sentence in error.message
        assert f"the decode node {decode.address}" in error.message
        assert "start both with the same --model" in error.message

    play(story, lambda: PrefillSide(OTHER_MODELS[sentence]))


def test_a_node_with_another_dtype_is_refused() -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        ticket = decode.ticket()
        prefill.send(ticket, decode.address, TOKENS)
        error = await prefill.ends.of(ticket)
        assert "dtype 'bfloat16' there and 'float32' here" in error.message

    play(story, lambda: PrefillSide(make_spec(), dtype=torch.bfloat16))


@pytest.mark.parametrize("shown", ["not-the-cluster's-token", None], ids=["wrong", "none"])
def test_a_node_without_the_clusters_token_gets_no_link(tmp_path: Path, shown: str | None) -> None:
    (tmp_path / "token").write_text("the-token-of-the-cluster")
    guarded = CONFIG.model_copy(update={"token_file": str(tmp_path / "token")})
    if shown:
        (tmp_path / "wrong").write_text(shown)
    other = CONFIG.model_copy(update={"token_file": str(tmp_path / "wrong") if shown else ""})

    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        ticket = decode.ticket()
        prefill.send(ticket, decode.address, TOKENS)
        error = await prefill.ends.of(ticket)
        assert error.code is Code.UNAUTHENTICATED
        assert "token" in error.message
        assert decode.links_made == 0

    play(
        story,
        lambda: PrefillSide(make_spec(), config=other),
        lambda: DecodeSide(make_spec(), config=guarded),
    )


def test_nodes_with_the_same_token_pass_kv(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("the-token-of-the-cluster")
    guarded: Config = CONFIG.model_copy(update={"token_file": str(tmp_path / "token")})

    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        await passes(prefill, decode, decode.ticket())

    play(
        story,
        lambda: PrefillSide(make_spec(), config=guarded),
        lambda: DecodeSide(make_spec(), config=guarded),
    )


# --- tickets that do not fit ---


def test_a_ticket_for_an_earlier_life_of_the_decode_node_ends_without_a_link(
    short_rendezvous: None,
) -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        stale = replace(decode.ticket(), decode_epoch=1)
        prefill.send(stale, decode.address, TOKENS)
        error = await prefill.ends.of(stale)
        assert isinstance(error, LinkLost)
        assert "has restarted since it was chosen" in error.message
        await no_link_threads()  # it may have left a key in the store, which the next end sweeps
        await passes(prefill, decode, decode.ticket())

    play(story)


def test_a_ticket_of_another_life_of_the_prefill_node_is_refused() -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        stale = replace(decode.ticket(), prefill_epoch=1)
        prefill.send(stale, decode.address, TOKENS)
        error = await prefill.ends.of(stale)
        assert error.code is Code.FAILED_PRECONDITION
        assert "another life" in error.message
        await passes(prefill, decode, decode.ticket())
        assert decode.links_made == 1

    play(story)


@pytest.mark.parametrize("offer_first", [True, False])
def test_a_prompt_of_another_length_than_announced_is_refused(offer_first: bool) -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        ticket = decode.ticket()
        offered = seen(decode.incoming, "_offered")
        if not offer_first:
            decode.reserve(ticket, TOKENS + 1)
        prefill.send(ticket, decode.address, TOKENS)
        if offer_first:
            await offered.wait()
            decode.reserve(ticket, TOKENS + 1)
        for error in await failed(ticket, prefill, decode):
            assert error.code is Code.FAILED_PRECONDITION
            assert "offers 11 tokens, but the router announced 12" in error.message
        assert decode.untouched(ticket)
        await passes(prefill, decode, decode.ticket("next"))

    play(story)


def test_an_offer_of_a_ticket_that_was_cancelled_is_refused_with_the_reason() -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        ticket = decode.ticket()
        decode.reserve(ticket, TOKENS)
        decode.incoming.cancel(ticket, Cancelled("the client left"))
        prefill.send(ticket, decode.address, TOKENS)
        theirs, mine = await failed(ticket, prefill, decode)
        assert theirs.code is mine.code is Code.CANCELLED
        assert "the client left" in theirs.message

    play(story)


def test_offers_beyond_the_limit_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming_module, "MAX_LIVE_TICKETS", 2)

    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        tickets = [decode.ticket(f"r{number}") for number in range(3)]
        for ticket in tickets:
            prefill.send(ticket, decode.address, TOKENS)
        error = await prefill.ends.of(tickets[2])
        assert error.code is Code.RESOURCE_EXHAUSTED
        for ticket in tickets[:2]:
            decode.reserve(ticket, TOKENS)
            assert await decode.ends.of(ticket) == 7
            assert await prefill.ends.of(ticket) is None

    play(story)
