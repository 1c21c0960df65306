"""The hand-off's two shells with real links between them, and no engine: one loop, one process.

`play` runs a story with a `PrefillSide` and a `DecodeSide` and then holds them to what must be true
after every story: each ticket ended exactly once on either side, nothing is in flight, every block
is back, every link's thread is gone, and the store has forgotten the links.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

import torch

from baton.config import Config
from baton.errors import BatonError
from baton.ids import Ticket
from baton.model.spec import ModelSpec
from baton.rpc import Server
from engine.block_pool import BlockPool, blocks_for
from engine.kv_cache import PagedKvCache
from kvtransfer.incoming import Incoming
from kvtransfer.layout import Unit
from kvtransfer.outgoing import Outgoing
from protos import kvtransfer_pb2_grpc
from tests.kvtransfer.settings import (
    CPU,
    PATIENCE_S,
    layout_of,
    link_threads,
    make_settings,
    make_spec,
)

CHUNK_TOKENS = 4
BLOCKS = 128
TOKENS = 11
"""Of a prompt whose length does not matter: three chunks, the last one short."""
CONFIG = Config(step_tokens=CHUNK_TOKENS, link_timeout_s=PATIENCE_S)
PREFILL_EPOCH = 11
_epochs = count(100)


class Ends:
    """How each ticket ended on one side; a second end of a ticket fails the test."""

    def __init__(self) -> None:
        self._ends: dict[Ticket, asyncio.Future[Any]] = {}

    def expect(self, ticket: Ticket) -> None:
        assert ticket not in self._ends
        self._ends[ticket] = asyncio.get_running_loop().create_future()

    def tell(self, ticket: Ticket, end: Any) -> None:
        self._ends[ticket].set_result(end)  # raises where the ticket has ended already

    def has(self, ticket: Ticket) -> bool:
        return self._ends[ticket].done()

    async def of(self, ticket: Ticket) -> Any:
        return await asyncio.shield(self._ends[ticket])

    def all_told(self) -> bool:
        return all(end.done() for end in self._ends.values())


class Side:
    """A cache, its blocks, and how its tickets ended."""

    def __init__(
        self, spec: ModelSpec, block_size: int, config: Config, dtype: torch.dtype, blocks: int
    ) -> None:
        self.spec, self.block_size, self.config = spec, block_size, config
        self.cache = PagedKvCache(spec, blocks, block_size, dtype, CPU)
        for rows in (*self.cache.keys, *self.cache.values):
            rows.view(torch.uint8).fill_(0xFF)  # NaN in every dtype, scales of int8 included
        self.pool = BlockPool(blocks)
        self.ends = Ends()
        self.faults: list[dict[str, Any]] = []
        """What the loop was told of exceptions that nobody caught."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self.faults.append(context))

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def lease(self, ticket: Ticket, tokens: int) -> tuple[int, ...]:
        """Blocks for a prompt, out of order."""
        blocks = self.pool.lease(ticket, blocks_for(tokens, self.block_size), 0.0)
        return blocks[::2] + blocks[1::2][::-1]

    def read(self, table: tuple[int, ...], tokens: int) -> torch.Tensor:
        """[layers, kv_heads, 2, tokens, row]"""
        return torch.stack(
            [self.cache.read_span(layer, table, 0, tokens) for layer in range(self.spec.layers)]
        )


class PrefillSide(Side):
    def __init__(
        self,
        spec: ModelSpec,
        block_size: int = 4,
        config: Config = CONFIG,
        dtype: torch.dtype = torch.float32,
        blocks: int = BLOCKS,
    ) -> None:
        super().__init__(spec, block_size, config, dtype, blocks)
        settings = make_settings(
            "prefill-1", PREFILL_EPOCH, layout_of(spec, dtype), block_size, config
        )
        self.outgoing = Outgoing(settings, self.cache, self._released)
        self.tables: dict[Ticket, tuple[int, ...]] = {}

    def _released(self, ticket: Ticket, error: BatonError | None) -> None:
        self.pool.release(ticket)
        self.ends.tell(ticket, error)

    def begin(
        self, ticket: Ticket, address: str, tokens: int, deadline: float | None = None
    ) -> torch.Tensor:
        """Offer a prompt; its KV is there from the start. Returns what `read` would."""
        table = self.tables[ticket] = self.lease(ticket, tokens)
        for layer in range(self.spec.layers):
            slots = self.cache.slots_of(table, 0, tokens)
            keys, values = torch.randn(2, tokens, self.spec.kv_heads, self.spec.head_dim)
            self.cache.write(layer, slots, keys, values)
        self.ends.expect(ticket)
        self.outgoing.begin(ticket, address, tokens, table, deadline or self.now() + PATIENCE_S)
        return self.read(table, tokens)

    def compute(self, ticket: Ticket, tokens: int, first_token_id: int = 7) -> None:
        """Name every unit, chunk by chunk, and the end."""
        for start in range(0, tokens, CHUNK_TOKENS):
            for layer in range(self.spec.layers):
                unit = Unit(layer, start, min(start + CHUNK_TOKENS, tokens))
                self.outgoing.unit_ready(ticket, unit)
        self.outgoing.computed(ticket, first_token_id)

    def send(self, ticket: Ticket, address: str, tokens: int) -> torch.Tensor:
        kv = self.begin(ticket, address, tokens)
        self.compute(ticket, tokens)
        return kv


class DecodeSide(Side):
    def __init__(
        self,
        spec: ModelSpec,
        block_size: int = 7,
        config: Config = CONFIG,
        dtype: torch.dtype = torch.float32,
        blocks: int = BLOCKS,
    ) -> None:
        super().__init__(spec, block_size, config, dtype, blocks)
        self.epoch = next(_epochs)
        settings = make_settings("decode-1", self.epoch, layout_of(spec, dtype), block_size, config)
        self.incoming = Incoming(settings, self.cache, self._committed, self._released)
        self.tables: dict[Ticket, tuple[int, ...]] = {}
        self.address = ""
        self.links_made = 0
        self._check_hello = self.incoming._check_hello
        self.incoming._check_hello = self._count_link  # type: ignore[method-assign]
        self._server = Server(config)
        kvtransfer_pb2_grpc.add_KvTransferServicer_to_server(self.incoming, self._server.grpc)

    def _count_link(self, message: Any) -> Any:
        hello = self._check_hello(message)
        self.links_made += 1
        return hello

    def _committed(self, ticket: Ticket, first_token_id: int) -> None:
        self.ends.tell(ticket, first_token_id)

    def _released(self, ticket: Ticket, error: BatonError | None) -> None:
        self.pool.release(ticket)
        self.ends.tell(ticket, error)

    async def start(self) -> None:
        self.address = await self._server.start(["baton.v1.KvTransfer"])

    def ticket(self, request_id: str = "r", attempt: int = 1) -> Ticket:
        return Ticket(request_id, attempt, PREFILL_EPOCH, self.epoch)

    def reserve(self, ticket: Ticket, tokens: int, deadline: float | None = None) -> None:
        self.ends.expect(ticket)
        self.tables[ticket] = self.lease(ticket, tokens)
        self.incoming.reserve(
            ticket, tokens, self.tables[ticket], deadline or self.now() + PATIENCE_S
        )

    def received(self, ticket: Ticket, tokens: int) -> torch.Tensor:
        return self.read(self.tables[ticket], tokens)

    def untouched(self, ticket: Ticket) -> bool:
        """Whether nothing was ever written into the ticket's blocks."""
        table = list(self.tables[ticket])
        return all(
            bool(rows[table].isnan().all()) for rows in (*self.cache.keys, *self.cache.values)
        )

    def finish(self, ticket: Ticket) -> None:
        """The sequence has ended: its blocks go back."""
        self.pool.release(ticket)

    async def stop(self) -> None:
        await self.incoming.close()
        await self._server.stop(0)


async def no_link_threads() -> None:
    for thread in link_threads():
        await asyncio.to_thread(thread.join, PATIENCE_S)
    assert not link_threads(), "a link's thread is left over"


async def quiet(prefill: PrefillSide, *decodes: DecodeSide) -> None:
    """Hold both sides to what must be true after every story, and close them."""
    for decode in decodes:
        for ticket in decode.tables:
            if decode.ends.has(ticket) and isinstance(await decode.ends.of(ticket), int):
                decode.finish(ticket)
    for side in (prefill, *decodes):
        assert side.ends.all_told(), "P1: a ticket never ended"
        assert side.pool.leased == 0, "P5: blocks are left over"
        side.pool.check_invariants()
    assert prefill.outgoing.in_flight == 0, "P5"
    assert [decode.incoming.in_flight for decode in decodes] == [0] * len(decodes), "P5"
    await prefill.outgoing.close()
    for decode in decodes:
        await decode.stop()
        assert decode.incoming.links_open == 0
        assert not decode.incoming.writable
        assert not decode.incoming._link_of
    assert prefill.outgoing.links_open == 0
    await no_link_threads()
    assert [decode.incoming._store.list_keys() for decode in decodes] == [[]] * len(decodes)
    assert not [side.faults for side in (prefill, *decodes) if side.faults]


async def passes(prefill: PrefillSide, decode: DecodeSide, ticket: Ticket) -> None:
    """A whole hand-off, to show that the link is as good as new."""
    decode.reserve(ticket, TOKENS)
    kv = prefill.send(ticket, decode.address, TOKENS)
    assert await decode.ends.of(ticket) == 7
    assert await prefill.ends.of(ticket) is None
    assert torch.equal(decode.received(ticket, TOKENS), kv)


async def failed(ticket: Ticket, prefill: PrefillSide, decode: DecodeSide) -> list[BatonError]:
    """Both sides' errors, once both have released."""
    errors = [await side.ends.of(ticket) for side in (prefill, decode)]
    assert all(isinstance(error, BatonError) for error in errors)
    return errors


Story = Callable[[PrefillSide, DecodeSide], Awaitable[None]]


def play(
    story: Story,
    prefill: Callable[[], PrefillSide] = lambda: PrefillSide(make_spec()),
    decode: Callable[[], DecodeSide] = lambda: DecodeSide(make_spec()),
) -> None:
    async def scene() -> None:
        async with asyncio.timeout(2 * PATIENCE_S):
            sender, receiver = prefill(), decode()
            await receiver.start()
            await story(sender, receiver)
            await quiet(sender, receiver)

    asyncio.run(scene())
