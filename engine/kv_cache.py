"""The paged KV cache: where keys and values lie, and how spans of tokens are read and written.

Each layer has one tensor for keys and one for values, [slots, kv_heads, head_dim]. A block table
lists a sequence's blocks in the order of its tokens; token t lies in slot
`block_table[t // block_size] * block_size + t % block_size`. The memory is zeroed once, so that
what a mask hides is a number: 0 × NaN would not be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.errors import ConfigError
from baton.model.spec import ModelSpec


def kv_bytes_per_token(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values over all layers."""
    return 2 * spec.layers * spec.kv_heads * spec.head_dim * dtype.itemsize


def blocks_that_fit(spec: ModelSpec, dtype: torch.dtype, block_size: int, memory_bytes: int) -> int:
    """Blocks in this much memory. Raises `ConfigError` when there is room for none."""
    blocks = memory_bytes // (block_size * kv_bytes_per_token(spec, dtype))
    if blocks < 1:
        raise ConfigError(
            f"one KV block of {block_size} tokens needs "
            f"{block_size * kv_bytes_per_token(spec, dtype) / (1 << 20):.1f} MiB; "
            "raise --kv-memory-mib or lower --block-size"
        )
    return blocks


class PagedKvCache:
    """Keys and values of every block. Who may use which block is the pool's business, not ours."""

    def __init__(
        self,
        spec: ModelSpec,
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.kv_heads = spec.kv_heads
        self.head_dim = spec.head_dim
        self.dtype = dtype
        self.device = device
        shape = (blocks * block_size, spec.kv_heads, spec.head_dim)
        # [slots, kv_heads, head_dim]: a slot is a row, so a span is one index_select.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.layers)]

    def slots(self, block_table: Sequence[int], start: int, stop: int) -> torch.Tensor:
        """Slots of the tokens [start, stop) of a sequence: int64 [stop - start]."""
        table = torch.tensor(block_table, dtype=torch.int64)
        tokens = torch.arange(start, stop)
        block, offset = tokens // self.block_size, tokens % self.block_size
        return (table[block] * self.block_size + offset).to(self.device)

    def write(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store [tokens, kv_heads, head_dim] keys and values at `slots`."""
        self.keys[layer].index_copy_(0, slots, keys)
        self.values[layer].index_copy_(0, slots, values)

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values at `slots` (any shape S): each [*S, kv_heads, head_dim], a copy."""
        return self.keys[layer][slots], self.values[layer][slots]

    def read_span(
        self, layer: int, block_table: Sequence[int], start: int, stop: int
    ) -> torch.Tensor:
        """A sequence's tokens [start, stop), packed [kv_heads, 2, tokens, head_dim]: a copy."""
        keys, values = self.read(layer, self.slots(block_table, start, stop))
        return torch.stack((keys.transpose(0, 1), values.transpose(0, 1)), dim=1).contiguous()

    def write_span(
        self, layer: int, block_table: Sequence[int], start: int, stop: int, data: torch.Tensor
    ) -> None:
        """The inverse of `read_span`: store packed [kv_heads, 2, tokens, head_dim]."""
        slots = self.slots(block_table, start, stop)
        keys, values = data.to(self.device).unbind(dim=1)  # each [kv_heads, tokens, head_dim]
        self.write(layer, slots, keys.transpose(0, 1), values.transpose(0, 1))
