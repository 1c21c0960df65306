"""P1, P4, P6, P9: a peer that breaks the rules harms its own link at most, and no cache.

After every story, `play` also checks that each ticket ended once on either side and left nothing
behind: see `tests/kvtransfer/nodes.py`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from baton.errors import Code, CorruptTransfer, LinkLost
from baton.wire import ticket_to_proto
from kvtransfer import incoming as incoming_module
from kvtransfer.layout import MAX_UNIT_BYTES, Unit
from kvtransfer.wire import PROTOCOL_VERSION
from protos import kvtransfer_pb2 as pb
from tests.kvtransfer.gates import seen
from tests.kvtransfer.nodes import CONFIG, TOKENS, DecodeSide, PrefillSide, passes, play
from tests.kvtransfer.raw_peer import raw_peer
from tests.kvtransfer.settings import PATIENCE_S, make_spec

# --- greetings ---


def test_another_release_of_the_protocol_is_refused() -> None:
    async def story(_: PrefillSide, decode: DecodeSide) -> None:
        async with raw_peer(decode) as peer:
            await peer.hello(protocol_version=PROTOCOL_VERSION + 1)
            error = await peer.refused()
        assert error.code().name == "FAILED_PRECONDITION"
        assert "run the same release of Baton on both nodes" in str(error.details())

    play(story)


@pytest.mark.parametrize("first", [pb.SenderMessage(offer=pb.Offer()), pb.SenderMessage(), None])
def test_a_stream_that_does_not_begin_with_hello_is_refused(first: pb.SenderMessage | None) -> None:
    async def story(_: PrefillSide, decode: DecodeSide) -> None:
        async with raw_peer(decode) as peer:
            if first is None:
                await peer.hang_up()
            else:
                await peer._stream.write(first)
            error = await peer.refused()
        assert error.code().name == "FAILED_PRECONDITION"
        assert error.details() == "a link begins with Hello"
        assert decode.links_made == 0

    play(story)


def test_a_stream_on_which_nobody_speaks_ends_in_time() -> None:
    async def story(_: PrefillSide, decode: DecodeSide) -> None:
        async with raw_peer(decode) as peer:
            error = await peer.refused()
        assert error.code().name == "UNAVAILABLE"
        assert error.details() == "no Hello came in time"

    hasty = CONFIG.model_copy(update={"link_timeout_s": 0.2})
    play(story, decode=lambda: DecodeSide(make_spec(), config=hasty))


# --- offers ---


def test_a_ticket_that_is_on_offer_is_refused_a_second_time_and_goes_on() -> None:
    async def story(_: PrefillSide, decode: DecodeSide) -> None:
        ticket = decode.ticket()
        async with raw_peer(decode) as peer:
            await peer.join()
            await peer.offer(ticket, TOKENS)
            await peer.offer(ticket, TOKENS)
            assert "on offer already" in (await peer.hear("refuse")).message
            decode.reserve(ticket, TOKENS)
            await peer.hear("accept")
            await peer.send_all(ticket, TOKENS)
            await peer.done(ticket)
            await peer.hear("committed")
        assert await decode.ends.of(ticket) == 7

    play(story)


def test_an_offer_whose_manifest_cannot_be_read_is_refused_and_no_other() -> None:
    async def story(_: PrefillSide, decode: DecodeSide) -> None:
        async with raw_peer(decode) as peer:
            await peer.join()
            await peer.say(
                offer=pb.Offer(ticket=ticket_to_proto(decode.ticket()), manifest=b"\x91" * 100)
            )
            refusal = await peer.hear("refuse")
            assert refusal.code == Code.FAILED_PRECONDITION
            assert "the manifest cannot be read" in refusal.message
            assert decode.incoming.in_flight == 0

    play(story)


@pytest.mark.parametrize("deadline_s", [float("nan"), float("inf"), -1.0, PATIENCE_S])
def test_every_offer_ends_whatever_deadline_it_names(deadline_s: float) -> None:
    async def story(_: PrefillSide, decode: DecodeSide) -> None:
        async with raw_peer(decode) as peer:
            await peer.join()
            await peer.offer(decode.ticket(), TOKENS, deadline_s)
            await peer.offer(replace(decode.ticket(), prefill_epoch=1), TOKENS)
            await peer.hear("refuse")  # so the offer before it was taken
            assert decode.incoming.in_flight == 1
            decode.incoming.tick(decode.now() + incoming_module.MAX_OFFER_S)
            assert (await peer.hear("refuse")).code == Code.DEADLINE_EXCEEDED
            assert decode.incoming.in_flight == 0

    play(story)


# --- units and ends ---


def test_units_before_the_acceptance_are_not_counted() -> None:
    async def story(_: PrefillSide, decode: DecodeSide) -> None:
        ticket = decode.ticket()
        arrived = seen(decode.incoming, "link_item_done")
        async with raw_peer(decode) as peer:
            await peer.join()
            await peer.offer(ticket, TOKENS)
            await peer.send_all(ticket, TOKENS)
            await peer.done(ticket)
            await arrived.wait()
            decode.reserve(ticket, TOKENS)
            await peer.hear("accept")
            await peer.done(ticket)
            assert (await peer.hear("fenced")).code == Code.DATA_LOSS
        assert isinstance(await decode.ends.of(ticket), CorruptTransfer)
        assert decode.untouched(ticket)

    play(story)


@pytest.mark.parametrize(
    ("start", "stop"),
    [(4, 4), (5, 4), (0, MAX_UNIT_BYTES), (0, (1 << 32) - 1)],
    ids=["empty", "backwards", "too long", "longest"],
)
def test_a_unit_of_an_impossible_size_ends_its_link_and_no_other(start: int, stop: int) -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        ticket = decode.ticket()
        decode.reserve(ticket, TOKENS)
        async with raw_peer(decode) as peer:
            await peer.join()
            await peer.offer(ticket, TOKENS)
            await peer.hear("accept")
            await peer.announce(ticket, Unit(0, start, stop), [])
            assert isinstance(await decode.ends.of(ticket), LinkLost)
            await peer.until_ended()
        assert decode.untouched(ticket)
        await passes(prefill, decode, decode.ticket("next"))

    play(story)


def test_an_end_before_the_last_unit_is_no_commit() -> None:
    async def story(_: PrefillSide, decode: DecodeSide) -> None:
        ticket = decode.ticket()
        decode.reserve(ticket, TOKENS)
        async with raw_peer(decode) as peer:
            await peer.join()
            await peer.offer(ticket, TOKENS)
            await peer.hear("accept")
            await peer.send(ticket, Unit(0, 0, TOKENS))
            await peer.done(ticket)
            assert (await peer.hear("fenced")).code == Code.DATA_LOSS
        assert isinstance(await decode.ends.of(ticket), CorruptTransfer)

    play(story)


def test_an_end_before_the_offer_is_passed_over_and_what_is_committed_was_written() -> None:
    """It once kept the units behind it out of the cache, and they were committed all the same."""

    async def story(_: PrefillSide, decode: DecodeSide) -> None:
        ticket = decode.ticket()
        decode.reserve(ticket, TOKENS)
        async with raw_peer(decode) as peer:
            await peer.join()
            await peer.done(ticket)
            mark = decode.ticket("mark")  # what came before it has been performed once it ends
            decode.reserve(mark, TOKENS)
            await peer.offer(mark, TOKENS)
            await peer.hear("accept")
            await peer.done(mark)
            await peer.hear("fenced")
            await peer.offer(ticket, TOKENS)
            await peer.hear("accept")
            await peer.send_all(ticket, TOKENS, value=3.0)
            await peer.done(ticket)
            assert await decode.ends.of(ticket) == 7
        assert bool((decode.received(ticket, TOKENS) == 3.0).all())

    play(story)


def test_a_ticket_is_written_and_ended_only_by_the_link_that_offered_it() -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        ticket = decode.ticket()
        offered = seen(decode.incoming, "_offered")
        decode.reserve(ticket, TOKENS)
        kv = prefill.begin(ticket, decode.address, TOKENS)
        await offered.wait()
        async with raw_peer(decode) as stranger:
            await stranger.join()
            await stranger.send_all(ticket, TOKENS)
            await stranger.done(ticket)
            mark = decode.ticket("mark")  # what came before it has been performed once it ends
            decode.reserve(mark, TOKENS)
            await stranger.offer(mark, TOKENS)
            await stranger.hear("accept")
            await stranger.done(mark)
            await decode.ends.of(mark)
        assert decode.untouched(ticket)
        prefill.compute(ticket, TOKENS)
        assert await decode.ends.of(ticket) == 7
        assert await prefill.ends.of(ticket) is None
        assert torch.equal(decode.received(ticket, TOKENS), kv)

    play(story)
