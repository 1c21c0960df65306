"""Names for blocks of tokens: a chain of hashes, so that a name stands for all that came before.

A block's name is blake3(name of the block before it ‖ its tokens, int32 little-endian). The chain
begins with a name made from the block size and a salt: prompts with different salts share nothing,
so that a tenant cannot learn from response times what another has asked. Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from blake3 import blake3

BlockHash = bytes
HASH_BYTES = 32
_CONTEXT = "baton 2026-11 kv block chain"


def chain_root(block_size: int, salt: str = "") -> BlockHash:
    """What stands before the first block."""
    keyed = blake3(derive_key_context=_CONTEXT)
    return keyed.update(struct.pack("<I", block_size) + salt.encode()).digest()


class BlockChain:
    """The names of a growing sequence's full blocks."""

    __slots__ = ("_block_size", "_rest", "_root", "hashes")

    def __init__(self, block_size: int, salt: str = "", token_ids: Sequence[int] = ()) -> None:
        self._block_size = block_size
        self._rest: list[int] = []
        self.hashes: list[BlockHash] = []
        """One for each full block, from the first on."""
        self._root = chain_root(block_size, salt)
        self.extend(token_ids)

    @property
    def tokens(self) -> int:
        """How many tokens were taken in."""
        return len(self.hashes) * self._block_size + len(self._rest)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take in the tokens that follow."""
        rest = [*self._rest, *token_ids]
        size = self._block_size
        full = len(rest) - len(rest) % size
        last = self.hashes[-1] if self.hashes else self._root
        for begin in range(0, full, size):
            last = blake3(last + struct.pack(f"<{size}i", *rest[begin : begin + size])).digest()
            self.hashes.append(last)
        self._rest = rest[full:]


def chain_of(block_size: int, salt: str, token_ids: Sequence[int]) -> list[BlockHash]:
    """The names of a sequence's full blocks."""
    return BlockChain(block_size, salt, token_ids).hashes
