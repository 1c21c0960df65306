"""P1, P4, P5, P6, P9: deadlines, stopped nodes and peers that break the rules end what they hold.

After every story, `play` also checks that each ticket ended once on either side and left nothing
behind: see `tests/kvtransfer/nodes.py`.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from baton.config import Config
from baton.errors import Cancelled, Code, LinkLost
from tests.kvtransfer.gates import Gate, seen
from tests.kvtransfer.nodes import (
    CONFIG,
    TOKENS,
    DecodeSide,
    PrefillSide,
    failed,
    no_link_threads,
    passes,
    play,
    quiet,
)
from tests.kvtransfer.raw_peer import raw_peer
from tests.kvtransfer.settings import PATIENCE_S, make_spec

# --- deadlines ---


@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_a_deadline_that_passes_in_mid_transfer_ends_both_sides(side: str) -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        ticket = decode.ticket()
        deadline = decode.now() + 100
        offered = seen(decode.incoming, "_offered")
        decode.reserve(ticket, TOKENS, deadline)
        prefill.begin(ticket, decode.address, TOKENS, deadline)
        await offered.wait()
        shell = prefill.outgoing if side == "sender" else decode.incoming
        shell.tick(deadline - 1)
        assert (prefill.outgoing.in_flight, decode.incoming.in_flight) == (1, 1)
        shell.tick(deadline)
        errors = await failed(ticket, prefill, decode)
        assert {error.code for error in errors} == {Code.DEADLINE_EXCEEDED}
        await passes(prefill, decode, decode.ticket("next"))
        assert decode.links_made == 1

    play(story)


def test_a_reservation_that_nobody_offers_anything_for_ends_by_its_deadline() -> None:
    async def story(_: PrefillSide, decode: DecodeSide) -> None:
        ticket = decode.ticket()
        deadline = decode.now() + 100
        decode.reserve(ticket, TOKENS, deadline)
        decode.incoming.tick(deadline)
        assert (await decode.ends.of(ticket)).code is Code.DEADLINE_EXCEEDED

    play(story)


def test_an_offer_that_nobody_reserves_for_ends_by_its_deadline_on_both_sides() -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        ticket = decode.ticket()
        offered = seen(decode.incoming, "_offered")
        prefill.send(ticket, decode.address, TOKENS)
        await offered.wait()
        decode.incoming.tick(decode.now() + PATIENCE_S)
        assert (await prefill.ends.of(ticket)).code is Code.DEADLINE_EXCEEDED
        decode.reserve(ticket, TOKENS)  # too late
        assert (await decode.ends.of(ticket)).code is Code.DEADLINE_EXCEEDED

    play(story)


# --- nodes that go ---


def test_a_decode_node_that_stops_ends_every_ticket_and_its_next_life_takes_new_ones(
    short_rendezvous: None,
) -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        tickets = [decode.ticket(f"r{number}") for number in range(3)]
        writing = Gate(decode.cache, "write_span", turn=2)
        for ticket in tickets:
            decode.reserve(ticket, TOKENS)
            prefill.begin(ticket, decode.address, TOKENS)
        prefill.compute(tickets[0], TOKENS)
        await writing.reached.wait()
        stopping = asyncio.create_task(decode.stop())
        writing.open()
        await stopping
        for ticket in tickets:
            theirs, mine = await failed(ticket, prefill, decode)
            assert theirs.code is Code.UNAVAILABLE
            assert isinstance(theirs, LinkLost)
            assert isinstance(mine, LinkLost)

        same_address = Config(**{**CONFIG.model_dump(), "listen": decode.address})
        successor = DecodeSide(make_spec(), config=same_address)
        await successor.start()
        assert successor.address == decode.address
        stale = decode.ticket("stale")
        prefill.send(stale, successor.address, TOKENS)
        assert "has restarted" in (await prefill.ends.of(stale)).message
        await no_link_threads()  # it may have left a key in the store, which the next end sweeps
        await passes(prefill, successor, successor.ticket("new"))
        await quiet(prefill, successor)

    play(story)


def test_a_prefill_node_that_stops_ends_its_tickets_and_no_others() -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        other = PrefillSide(make_spec())
        ticket, others = decode.ticket("its own"), decode.ticket("another's")
        writing = Gate(decode.cache, "write_span", turn=2)
        decode.reserve(others, TOKENS)
        decode.reserve(ticket, TOKENS)
        kv = other.begin(others, decode.address, TOKENS)
        prefill.send(ticket, decode.address, TOKENS)
        await writing.reached.wait()
        stopping = asyncio.create_task(prefill.outgoing.close())
        writing.open()
        await stopping
        for error in await failed(ticket, prefill, decode):
            assert error.code is Code.UNAVAILABLE
        other.compute(others, TOKENS)
        assert await decode.ends.of(others) == 7
        assert await other.ends.of(others) is None
        assert torch.equal(decode.received(others, TOKENS), kv)
        await other.outgoing.close()

    play(story)


def test_a_decode_node_that_stops_ends_no_hand_off_to_another() -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        stopping = DecodeSide(make_spec())
        await stopping.start()
        for side in (decode, stopping):
            await passes(prefill, side, side.ticket("makes the link"))
        ticket, lost = decode.ticket("stays"), stopping.ticket("goes")
        for side, its_ticket in ((decode, ticket), (stopping, lost)):
            offered = seen(side.incoming, "_offered")
            side.reserve(its_ticket, TOKENS)
            prefill.begin(its_ticket, side.address, TOKENS)
            await offered.wait()
        kv = prefill.read(prefill.tables[ticket], TOKENS)
        await stopping.stop()
        await failed(lost, prefill, stopping)
        assert not prefill.ends.has(ticket)
        prefill.compute(ticket, TOKENS)
        assert await decode.ends.of(ticket) == 7
        assert await prefill.ends.of(ticket) is None
        assert torch.equal(decode.received(ticket, TOKENS), kv)
        await quiet(prefill, stopping)

    play(story)


def test_a_decode_node_that_is_not_there_ends_the_ticket() -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        await decode.stop()
        prefill.send(decode.ticket(), decode.address, TOKENS)
        assert (await prefill.ends.of(decode.ticket())).code is Code.UNAVAILABLE

    play(story)


def test_closing_before_the_link_took_its_first_step_ends_it_all_the_same() -> None:
    async def story(prefill: PrefillSide, decode: DecodeSide) -> None:
        ticket = decode.ticket()
        decode.reserve(ticket, TOKENS)
        prefill.begin(ticket, decode.address, TOKENS)
        async with asyncio.timeout(PATIENCE_S / 2):
            await prefill.outgoing.close()
        assert isinstance(await prefill.ends.of(ticket), LinkLost)
        decode.incoming.cancel(ticket, Cancelled("no prefill"))

    play(story)


def test_an_offer_read_after_its_link_has_ended_is_not_taken() -> None:
    """It would wait for a thread that is gone, and hold its blocks for ever."""

    async def story(_: PrefillSide, decode: DecodeSide) -> None:
        ticket = decode.ticket()
        decode.reserve(ticket, TOKENS)
        loop = asyncio.get_running_loop()
        receive = decode.incoming._receive
        received = asyncio.Event()

        def end_first(link: Any, *rest: Any) -> None:
            link.stop()
            link._thread._thread.join(PATIENCE_S)  # and its end is reported in the next turn
            loop.call_soon(receive, link, *rest)
            loop.call_soon(received.set)

        async with raw_peer(decode) as peer:
            await peer.join()
            decode.incoming._receive = end_first  # type: ignore[method-assign]
            await peer.offer(ticket, TOKENS)
            await received.wait()
        decode.incoming.cancel(ticket, Cancelled("the client left"))
        assert (await decode.ends.of(ticket)).code is Code.CANCELLED

    play(story)
