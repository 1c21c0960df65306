"""P1, P4, P5, P7, P9: KV over real links arrives whole, in its own blocks, or not at all.

After every story, `play` also checks that each ticket ended once on either side and left nothing
behind: see `tests/kvtransfer/nodes.py`.
"""

from __future__ import annotations

import pytest
import torch

from baton.errors import Cancelled, Code, CorruptTransfer
from kvtransfer import outgoing as outgoing_module
from kvtransfer.checksum import as_bytes, head_checksums
from tests.kvtransfer.gates import Gate, seen
from tests.kvtransfer.nodes import (
    TOKENS,
    DecodeSide,
    PrefillSide,
    failed,
    passes,
    play,
)
from tests.kvtransfer.settings import make_spec

# --- what arrives ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("block_sizes", [(4, 7), (16, 4), (4, 4)], ids=str)
def test_kv_of_any_length_arrives_as_it_was_in_blocks_of_another_size(
    dtype: torch.dtype, block_sizes: tuple[int, int]
) -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        for tokens in (1, 3, 4, 5, 11, 64):
            ticket = decode.ticket(f"of {tokens} tokens")
            decode.reserve(ticket, tokens)
            kv = prefill.send(ticket, decode.address, tokens)
            assert await decode.ends.of(ticket) == 7
            assert torch.equal(decode.received(ticket, tokens), kv)
            assert await prefill.ends.of(ticket) is None

    spec = make_spec()
    play(
        story,
        lambda: PrefillSide(spec, block_sizes[0], dtype=dtype),
        lambda: DecodeSide(spec, block_sizes[1], dtype=dtype),
    )


def test_units_larger_than_one_piece_arrive() -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        await passes(prefill, decode, decode.ticket())

    spec = make_spec(layers=1, kv_heads=16, head_dim=4096)  # 2 MiB for four tokens
    play(story, lambda: PrefillSide(spec, blocks=3), lambda: DecodeSide(spec, blocks=3))


def test_many_prompts_at_once_on_one_link_each_get_their_own_kv() -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        tickets = {decode.ticket(f"r{number}"): 3 + 4 * number for number in range(8)}
        kv = {}
        for ticket, tokens in tickets.items():
            decode.reserve(ticket, tokens)
            kv[ticket] = prefill.begin(ticket, decode.address, tokens)
        for first_token_id, (ticket, tokens) in enumerate(reversed(tickets.items())):
            prefill.compute(ticket, tokens, first_token_id)
        ends = [await decode.ends.of(ticket) for ticket in reversed(tickets)]
        assert ends == list(range(8))
        for ticket, tokens in tickets.items():
            assert torch.equal(decode.received(ticket, tokens), kv[ticket])
            assert await prefill.ends.of(ticket) is None
        assert decode.links_made == 1

    play(story)


def test_nothing_is_committed_before_the_last_layer_is_in() -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        ticket = decode.ticket()
        last = Gate(decode.cache, "write_span", turn=9)  # three chunks of three layers
        decode.reserve(ticket, TOKENS)
        prefill.send(ticket, decode.address, TOKENS)
        await last.reached.wait()
        assert not decode.ends.has(ticket)
        assert not prefill.ends.has(ticket)
        last.open()
        assert await decode.ends.of(ticket) == 7
        assert await prefill.ends.of(ticket) is None

    play(story)


def test_a_reservation_may_come_after_the_offer() -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        ticket = decode.ticket()
        offered = seen(decode.incoming, "_offered")
        kv = prefill.send(ticket, decode.address, TOKENS)
        await offered.wait()
        decode.reserve(ticket, TOKENS)
        assert await decode.ends.of(ticket) == 7
        assert await prefill.ends.of(ticket) is None
        assert torch.equal(decode.received(ticket, TOKENS), kv)

    play(story)


# --- damage ---


def test_a_damaged_unit_ends_both_sides_enters_no_cache_and_spares_the_link(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def damage(data: torch.Tensor) -> list[int]:
        checksums = head_checksums(data)
        as_bytes(data)[-1] ^= 1  # what is sent: a copy of the cache
        return checksums

    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        await passes(prefill, decode, decode.ticket("before"))
        ticket = decode.ticket("damaged")
        with monkeypatch.context() as patch:
            patch.setattr(outgoing_module, "head_checksums", damage)
            decode.reserve(ticket, TOKENS)
            prefill.send(ticket, decode.address, TOKENS)
            theirs, mine = await failed(ticket, prefill, decode)
        assert isinstance(mine, CorruptTransfer)
        assert "layer 0, tokens 0 to 4, does not match its checksums" in mine.message
        assert theirs.code is Code.DATA_LOSS
        assert mine.message in theirs.message
        assert decode.untouched(ticket)
        await passes(prefill, decode, decode.ticket("after"))
        assert decode.links_made == 1

    play(story)


# --- cancelling ---


def test_a_sender_that_cancels_keeps_its_blocks_while_its_thread_reads_them() -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        ticket = decode.ticket()
        reading = Gate(prefill.cache, "read_span", turn=4)
        decode.reserve(ticket, TOKENS)
        prefill.send(ticket, decode.address, TOKENS)
        # `send` reads the cache itself, once a layer: the fourth is the link's.
        await reading.reached.wait()
        prefill.outgoing.cancel(ticket, Cancelled("the client left"))
        error = await decode.ends.of(ticket)
        assert not prefill.ends.has(ticket), "P7: the thread still reads"
        assert error.code is Code.CANCELLED
        assert "the prefill node ended the hand-off: the client left" in error.message
        reading.open()
        await failed(ticket, prefill, decode)
        assert reading.calls == 4, "units after the fence are not read"
        await passes(prefill, decode, decode.ticket("next"))

    play(story)


def test_a_receiver_that_cancels_keeps_its_blocks_while_its_thread_writes_them() -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        ticket = decode.ticket()
        writing = Gate(decode.cache, "write_span", turn=2)
        announced = seen(decode.incoming, "_receive", times=4)  # the offer and three units
        decode.reserve(ticket, TOKENS)
        prefill.send(ticket, decode.address, TOKENS)
        await writing.reached.wait()
        await announced.wait()
        decode.incoming.cancel(ticket, Cancelled("the client left"))
        refused = decode.ticket("refused meanwhile")  # a round trip that no thread takes part in
        decode.reserve(refused, TOKENS + 1)
        prefill.send(refused, decode.address, TOKENS)
        await decode.ends.of(refused)
        assert not decode.ends.has(ticket), "P7: the thread still writes"
        writing.open()
        theirs, mine = await failed(ticket, prefill, decode)
        await failed(refused, prefill, decode)
        assert theirs.code is mine.code is Code.CANCELLED
        assert "the decode node ended the hand-off: the client left" in theirs.message
        before = decode.received(ticket, TOKENS)
        await passes(prefill, decode, decode.ticket("next"))
        assert writing.calls == 2 + 9, "units after the fence are not written"
        assert before.isnan().any()
        assert decode.links_made == 1

    play(story)


@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_cancelling_before_anything_was_computed_ends_both_sides(side: str) -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        ticket = decode.ticket()
        offered = seen(decode.incoming, "_offered")
        decode.reserve(ticket, TOKENS)
        prefill.begin(ticket, decode.address, TOKENS)
        await offered.wait()
        shell = prefill.outgoing if side == "sender" else decode.incoming
        shell.cancel(ticket, Cancelled("the client left"))
        shell.cancel(ticket, Cancelled("and again"))
        errors = await failed(ticket, prefill, decode)
        assert {error.code for error in errors} == {Code.CANCELLED}
        assert decode.untouched(ticket)
        prefill.compute(ticket, TOKENS)  # too late: changes nothing
        await passes(prefill, decode, decode.ticket("next"))

    play(story)
