"""Reads parts of stored tensors straight into the memory where they stay.

Files are read one after the other and each from front to back, a few megabytes at a time, with
plain reads: a mapped file would count every page that was touched as memory of this process, those
of columns that the rank does not keep as well. So loading takes the memory of what is loaded and
one piece more, whatever the dtype on disk: over two ranks 1.05 to 1.10 times the slice of a
116 MiB file, where slices of the mapped file took 2.4 to 2.7 times and no less time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch

from baton.errors import UnsupportedModel
from baton.model.safetensors_header import StoredTensor, stored_tensors

PIECE_BYTES = 4 << 20
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a part of one stored matrix goes; a stored vector is a matrix of one column."""

    name: str
    shape: tuple[int, ...]  # as it must be stored
    rows: range
    columns: range
    target: torch.Tensor  # [rows, columns], of any dtype and device


def fill(folder: Path, files: Sequence[Path], placements: Iterable[Placement]) -> None:
    """Read every placement from the safetensors `files` of `folder`.

    Raises `UnsupportedModel`, before it reads any data, naming a tensor that is not there, has
    another shape, or holds no floats; and where a file cannot be read.
    """
    try:
        stored: dict[str, StoredTensor] = {}
        for file in files:
            stored |= stored_tensors(file)
        wanted: dict[str, list[Placement]] = {}
        for placement in placements:
            _check(folder, placement, stored.get(placement.name))
            wanted.setdefault(placement.name, []).append(placement)
        scratch = bytearray(PIECE_BYTES)
        for file in files:
            with FileIO(file) as stream:  # unbuffered: what is read goes where it is asked to
                for name, tensor in stored.items():
                    if tensor.file == file:
                        for placement in wanted.get(name, ()):
                            _read(stream, tensor, placement, scratch)
    except OSError as error:
        raise UnsupportedModel(f"{error.filename} cannot be read: {error.strerror}") from error


def _check(folder: Path, placement: Placement, tensor: StoredTensor | None) -> None:
    name, shape = placement.name, placement.shape
    if tensor is None:
        raise UnsupportedModel(f"{folder} lacks the tensor {name}, wanted as {shape}")
    if tensor.shape != shape:
        raise UnsupportedModel(
            f"the tensor {name} is {tensor.shape}, but config.json makes it {shape}"
        )
    if tensor.dtype not in _FLOATS:
        raise UnsupportedModel(
            f"the tensor {name} is {tensor.dtype}; weights must be {', '.join(_FLOATS)}"
        )


def _read(stream: FileIO, tensor: StoredTensor, placement: Placement, scratch: bytearray) -> None:
    """Into its place at once where that is laid out as the file is, else over the scratch.

    Over the scratch come whole rows, as many at a time as fit; of each, the columns wanted.
    """
    dtype = _FLOATS[tensor.dtype]
    width = tensor.shape[1] if len(tensor.shape) == 2 else 1
    row_bytes = width * dtype.itemsize
    rows, columns, target = placement.rows, placement.columns, placement.target
    stream.seek(tensor.start + rows.start * row_bytes)
    plain = target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous()
    if plain and len(columns) == width:
        _read_exactly(stream, target.view(torch.uint8).flatten().numpy().data, tensor.file)
        return
    if len(scratch) < row_bytes:
        scratch.extend(bytes(row_bytes - len(scratch)))
    step = len(scratch) // row_bytes
    for done in range(0, len(rows), step):
        count = min(step, len(rows) - done)
        _read_exactly(stream, memoryview(scratch)[: count * row_bytes], tensor.file)
        piece = torch.frombuffer(scratch, dtype=dtype, count=count * width).view(count, width)
        target[done : done + count].copy_(piece[:, columns.start : columns.stop])


def _read_exactly(stream: FileIO, into: memoryview, file: Path) -> None:
    while len(into):
        read = stream.readinto(into)
        if not read:
            raise UnsupportedModel(f"{file} was cut off while it was read; fetch the model again")
        into = into[read:]
