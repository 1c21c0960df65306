"""Checksums of a unit: one 64-bit xxh3 per KV head.

A head belongs to one rank whatever the tensor-parallel size, so the checksums of a unit are the
same for every layout it is sent in or resharded to.
"""

from __future__ import annotations

import torch
import xxhash


def as_bytes(data: torch.Tensor) -> torch.Tensor:
    """A contiguous CPU tensor's memory as [bytes] of uint8, without a copy."""
    return data.view(-1).view(torch.uint8)


def head_checksums(data: torch.Tensor) -> list[int]:
    """xxh3_64 of each head's bytes; `data` is a contiguous CPU [kv_heads, 2, tokens, head_dim]."""
    return [xxhash.xxh3_64_intdigest(as_bytes(head).numpy().data) for head in data]
