"""The header of a safetensors file: which tensors it holds, and at which bytes.

The format (https://github.com/huggingface/safetensors#format): 8 bytes of little-endian header
length, a JSON object of names to dtype, shape and offsets, then the data without gaps. Baton reads
the data with plain reads into memory of its own (see `engine.weight_stream`), so the header is all
that must be understood. Everything here raises `UnsupportedModel`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from baton.errors import UnsupportedModel

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
ELEMENT_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a file. It is stored row by row, in the bytes [start, stop) of the file."""

    file: Path
    dtype: str
    """As safetensors names it: "F32", "BF16", …"""
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(stream: BinaryIO, file: Path) -> bytes:
    """The JSON of the file's header. The stream, at byte 0 before, is at the data's first byte."""
    length = int.from_bytes(stream.read(8), "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise UnsupportedModel(f"{file} is no safetensors file; fetch the model again")
    header = stream.read(length)
    if len(header) != length:
        raise UnsupportedModel(f"{file} is cut off inside its header; fetch the model again")
    return header


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of the file by its name, in the order of their bytes."""
    with file.open("rb") as stream:
        header = read_header(stream, file)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        found = [
            (str(name), _stored(file, 8 + len(header), entry)) for name, entry in entries.items()
        ]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UnsupportedModel(
            f"{file} cannot be read as safetensors: its header is not as it must be ({error!r}); "
            "fetch the model again"
        ) from error
    found.sort(key=lambda item: item[1].start)
    if found and found[-1][1].stop > file.stat().st_size:
        raise UnsupportedModel(f"{file} is cut off before its last tensor; fetch the model again")
    return dict(found)


def _stored(file: Path, data_start: int, entry: Any) -> StoredTensor:
    dtype, (start, stop) = str(entry["dtype"]), entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    if dtype in ELEMENT_BYTES and stop - start != ELEMENT_BYTES[dtype] * math.prod(shape):
        raise ValueError(f"{stop - start} bytes for {dtype} of shape {shape}")
    if start < 0 or any(size < 0 for size in shape):
        raise ValueError("a size below 0")
    return StoredTensor(file, dtype, shape, data_start + start, data_start + stop)
