"""Turns a GGUF file into a Hugging Face folder, so that there is one loader and one layout.

A GGUF file is parsed once, its tensors are dequantised to float32 some rows at a time and written
straight into `model.safetensors`: memory holds a few megabytes, whatever the model's size. Experts,
which a GGUF file stacks, become one tensor each. What the engine cannot compute is refused by name.

The rows of the query and key projections need care in some architectures (see `gguf_families`):
`_halves_from_pairs` puts them back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from numpy.typing import NDArray

from baton.errors import UnsupportedModel
from baton.model.folder import (
    CONFIG_FILE,
    GENERATION_FILE,
    INT4_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHT_FILE,
)
from baton.model.gguf_blocks import INT4_KINDS, packed_integers, scales_zeros
from baton.model.gguf_config import Shape, config_from_gguf
from baton.model.gguf_families import GgufFamily, Source, gguf_family, sources
from baton.model.gguf_tokenizer import build_tokenizer

IMPORT_VERSION = 4
"""Raised when the same GGUF file would be turned into another folder; old caches then go unused."""

Progress = Callable[[str], None]
_MAGIC = b"GGUF"
_ITEM_BYTES = {"F32": 4, "U8": 1}
_NUMPY = {"F32": "<f4", "U8": "u1"}
_PIECE_ELEMENTS = 4 << 20
_ROPE_DIVISORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class _Weight:
    """One tensor on its way: its name and shape in the folder, and its rows, piece by piece."""

    name: str
    shape: Shape
    pieces: Callable[[], Iterator[NDArray[Any]]]
    dtype: str = "F32"


def import_gguf(path: Path, into: Path, progress: Progress) -> None:
    """Write the model in the GGUF file `path` to the empty folder `into`.

    Raises `UnsupportedModel` where the file is no GGUF, is cut off, or holds a model that Baton
    cannot run. Nothing is left to be used then: the caller throws `into` away.
    """
    reader = _open(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    architecture, family = gguf_family(metadata)
    tokenizer, tokenizer_config = build_tokenizer(metadata)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: _shape(tensor) for name, tensor in tensors.items()}
    divisors = _rope_divisors(tensors.pop(_ROPE_DIVISORS, None), family)
    config = config_from_gguf(metadata, architecture, family, shapes, divisors)
    weights = _weights(tensors, architecture, family, config)
    _write_json(into / CONFIG_FILE, config)
    _write_json(into / GENERATION_FILE, {"eos_token_id": config["eos_token_id"]})
    _write_json(into / TOKENIZER_CONFIG_FILE, tokenizer_config)
    tokenizer.save(str(into / TOKENIZER_FILE))
    layers = config["num_hidden_layers"]
    progress(f"importing {len(weights)} tensors of {layers} layers from {path.name}")
    _write_safetensors(into / WEIGHT_FILE, weights)
    if blocks := _blocks(tensors, family, config):
        _write_safetensors(into / INT4_FILE, blocks)


def _open(path: Path) -> GGUFReader:
    with path.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise UnsupportedModel(f"{path} is no GGUF file: it begins with {magic!r}, not {_MAGIC!r}")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        # A file that ends early shows up as an index or a shape that does not fit.
        raise UnsupportedModel(
            f"{path} cannot be read as GGUF and may be cut off ({error}); fetch it again"
        ) from error


def _shape(tensor: Any) -> Shape:
    """Outer dimension first; GGUF names the inner one first."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _rope_divisors(tensor: Any | None, family: GgufFamily) -> list[float] | None:
    """What rotary frequencies are divided by, which only files of a Llama 3 have."""
    if tensor is None:
        return None
    if family.model_type != "llama":
        raise _unknown(_ROPE_DIVISORS, family.model_type)
    _check_type(tensor)
    return [float(value) for value in dequantize(tensor.data, tensor.tensor_type)]


def _weights(
    tensors: Mapping[str, Any], architecture: str, family: GgufFamily, config: Mapping[str, Any]
) -> list[_Weight]:
    """What to write, checked before the first byte is: all expected tensors and no other."""
    wanted = list(sources(family, config))
    if unknown := tensors.keys() - {source.gguf_name for source in wanted}:
        raise _unknown(min(unknown), architecture)
    for tensor in tensors.values():
        _check_type(tensor)
    return [_weight(source, tensors.get(source.gguf_name), config) for source in wanted]


def _unknown(name: str, architecture: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the GGUF file holds the tensor {name}, which a plain {architecture} model of its size "
        "does not have; supported are files as llama.cpp's converter writes them"
    )


def _check_type(tensor: Any) -> None:
    try:  # gguf has no list of what it can dequantise; one row tells
        dequantize(tensor.data[:1], tensor.tensor_type)
    except NotImplementedError as error:
        raise UnsupportedModel(
            f"the GGUF file's tensor {tensor.name} is "
            f"{GGMLQuantizationType(tensor.tensor_type).name}, which gguf cannot dequantise; "
            "supported are F32, F16, BF16, Q4_0 to Q8_0 and the K-quants"
        ) from error


def _weight(source: Source, tensor: Any | None, config: Mapping[str, Any]) -> _Weight:
    if tensor is None:
        raise UnsupportedModel(
            f"the GGUF file lacks the tensor {source.gguf_name} for {source.name}"
        )
    shape, data, kind = _shape(tensor), tensor.data, tensor.tensor_type
    if source.expert is not None:
        if len(shape) != 3 or shape[0] != config["num_experts"]:
            raise UnsupportedModel(
                f"the GGUF file's tensor {source.gguf_name} is {shape}; supported is one matrix "
                f"for each of {config['num_experts']} experts"
            )
        shape, data = shape[1:], data[source.expert]

    def pieces() -> Iterator[NDArray[np.float32]]:
        unit = shape[0] // source.heads if source.heads else 1  # heads stay whole
        step = max(1, _PIECE_ELEMENTS // math.prod(shape[1:]) // unit) * unit
        for row in range(0, shape[0], step):
            values = np.asarray(dequantize(data[row : row + step], kind), dtype=np.float32)
            yield _halves_from_pairs(values, unit) if source.heads else values

    return _Weight(source.name, shape, pieces)


def _blocks(
    tensors: Mapping[str, Any], family: GgufFamily, config: Mapping[str, Any]
) -> list[_Weight]:
    """The integers, scales and zeros of every layer's matrix in 4-bit blocks, as the file has them.

    For W: `W.integers` U8 [rows, columns / 2] and `W.scales_zeros` F32 [rows, columns / 32, 2].
    """
    found: list[_Weight] = []
    for source in sources(family, config):
        tensor = tensors[source.gguf_name]
        shape, kind = _shape(tensor), tensor.tensor_type
        if len(shape) != 2 or kind not in INT4_KINDS or not source.name.startswith("model.layers."):
            continue
        unit = shape[0] // source.heads if source.heads else 1

        def integers(data: Any = tensor.data, kind: Any = kind, unit: int = unit) -> Iterator[Any]:
            yield _halves_from_pairs(packed_integers(data, kind), unit)

        def scales(data: Any = tensor.data, kind: Any = kind, unit: int = unit) -> Iterator[Any]:
            flat = _halves_from_pairs(scales_zeros(data, kind), unit)
            yield flat.reshape(len(flat), -1, 2)

        rows, columns = shape
        found.append(_Weight(f"{source.name}.integers", (rows, columns // 2), integers, "U8"))
        found.append(_Weight(f"{source.name}.scales_zeros", (rows, columns // 32, 2), scales))
    return found


def _halves_from_pairs(weight: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """Undo the row order of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.

    Within each head, rows (0, h), (1, h + 1), ... stood side by side; h is half of head_dim.
    """
    if head_dim == 1:
        return weight
    rows, columns = weight.shape
    pairs = weight.reshape(rows // head_dim, head_dim // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_safetensors(file: Path, weights: list[_Weight]) -> None:
    """Write the tensors piece by piece; `safetensors.numpy.save_file` wants all of them in memory.

    The format: 8 bytes of little-endian header length, the JSON header, the data without gaps.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in weights:
        start, end = end, end + _ITEM_BYTES[weight.dtype] * int(np.prod(weight.shape))
        shape = list(weight.shape)
        header[weight.name] = {"dtype": weight.dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for weight in weights:
            rows = 0
            for piece in weight.pieces():
                rows += len(piece)
                stream.write(piece.astype(_NUMPY[weight.dtype], copy=False).tobytes())
            assert rows == weight.shape[0], weight.name
