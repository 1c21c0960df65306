"""What GGUF's 4-bit blocks hold, as the integers that stand in them.

A block is 32 weights of a row. Q4_1: w = d * q + m; Q4_0: w = d * (q - 8); q from 0 to 15, d and m
float16 (`block_q4_0`, `block_q4_1` in ggml-common.h). Both are w = (q - 8) * scale + zero. The
first 16 weights are the low halves of the block's 16 bytes, the others the high halves.

Q8_0 is not kept: its scale for every 32 weights fits none of torch's int8 kernels, which have one
for a row. Its weights are dequantised and rounded anew.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

_SCALE_BYTES = {GGMLQuantizationType.Q4_0: 2, GGMLQuantizationType.Q4_1: 4}
_QUANT_BYTES = 16
INT4_KINDS = frozenset(_SCALE_BYTES)


def _split(data: NDArray[Any], kind: GGMLQuantizationType) -> tuple[NDArray[Any], NDArray[Any]]:
    """Each block's float16 constants [rows, blocks, 1 or 2] and bytes [rows, blocks, 16]."""
    head = _SCALE_BYTES[kind]
    blocks = data.view(np.uint8).reshape(len(data), -1, head + _QUANT_BYTES)
    constants = np.ascontiguousarray(blocks[..., :head]).view("<f2")
    return constants, blocks[..., head:]


def packed_integers(data: NDArray[Any], kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    """Rows of blocks as uint8 [rows, columns / 2]: an even column low, the next one high."""
    _, quants = _split(data, kind)
    integers = np.concatenate((quants & 15, quants >> 4), axis=2).reshape(len(data), -1)
    return np.asarray(integers[:, 0::2] | integers[:, 1::2] << 4, dtype=np.uint8)


def scales_zeros(data: NDArray[Any], kind: GGMLQuantizationType) -> NDArray[np.float32]:
    """Rows of blocks as float32 [rows, columns / 16]: scale, zero, scale, zero, …"""
    constants, _ = _split(data, kind)
    wide = constants.astype(np.float32)
    scales = wide[..., 0]
    if kind == GGMLQuantizationType.Q4_1:
        zeros = wide[..., 1] + 8 * scales
    else:
        zeros = np.zeros_like(scales)
    return np.stack((scales, zeros), axis=2).reshape(len(data), -1)
