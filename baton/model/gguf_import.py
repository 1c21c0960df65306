"""Turns a GGUF file into a Hugging Face folder, so that there is one loader and one layout.

A GGUF file is parsed once, its tensors are dequantised to float32 one after the other and written
straight into `model.safetensors`: memory holds one tensor at a time, whatever the model's size.
What the engine cannot compute is refused by name.

The rows of the query and key projections need care. llama.cpp rotates neighbouring pairs of
dimensions, Hugging Face the two halves of a head, and llama.cpp's converter reorders those rows to
suit. `_halves_from_pairs` puts them back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
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
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHT_FILE,
)
from baton.model.gguf_tokenizer import build_tokenizer

IMPORT_VERSION = 1
"""Raised when the same GGUF file would be turned into another folder; old caches then go unused."""

Progress = Callable[[str], None]
_MAGIC = b"GGUF"
_PLAIN_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True, slots=True)
class _Weight:
    """One tensor on its way: where it comes from, and what it becomes."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], NDArray[np.float32]]


def import_gguf(path: Path, into: Path, progress: Progress) -> None:
    """Write the model in the GGUF file `path` to the empty folder `into`.

    Raises `UnsupportedModel` where the file is no GGUF, is cut off, or holds a model that Baton
    cannot run. Nothing is left to be used then: the caller throws `into` away.
    """
    reader = _open(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    _refuse_unsupported(metadata)
    tokenizer, tokenizer_config = build_tokenizer(metadata)
    config = _config(metadata, reader)
    weights = _weights(reader, config)
    _write_json(into / CONFIG_FILE, config)
    _write_json(into / GENERATION_FILE, {"eos_token_id": config["eos_token_id"]})
    _write_json(into / TOKENIZER_CONFIG_FILE, tokenizer_config)
    tokenizer.save(str(into / TOKENIZER_FILE))
    layers = config["num_hidden_layers"]
    progress(f"importing {len(weights)} tensors of {layers} layers from {path.name}")
    _write_safetensors(into / WEIGHT_FILE, weights)


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


def _refuse_unsupported(metadata: Mapping[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedModel(
            f"the GGUF file's architecture is {architecture!r}; supported is 'llama'"
        )
    harmless: dict[str, tuple[Any, ...]] = {
        "llama.rope.scaling.type": (None, "none"),
        "llama.rope.scaling.factor": (None, 0.0, 1.0),
        "llama.rope.scale_linear": (None, 0.0, 1.0),
        "llama.expert_count": (None, 0),
        "llama.attention.sliding_window": (None, 0),
        "split.count": (None, 0, 1),
    }
    for key, supported in harmless.items():
        if (found := metadata.get(key)) not in supported:
            raise UnsupportedModel(
                f"the GGUF file's {key} is {found!r}; supported is {supported[-1]!r}"
            )


def _config(metadata: Mapping[str, Any], reader: GGUFReader) -> dict[str, Any]:
    """The content of config.json. Raises `UnsupportedModel` for a key that is missing or odd."""
    shapes = {tensor.name: tuple(int(size) for size in tensor.shape) for tensor in reader.tensors}
    if "token_embd.weight" not in shapes:
        raise UnsupportedModel("the GGUF file has no tensor token_embd.weight")
    hidden_size = _need(metadata, "llama.embedding_length")
    query_heads = _need(metadata, "llama.attention.head_count")
    head_dim = metadata.get("llama.attention.key_length", hidden_size // query_heads)
    rotated = metadata.get("llama.rope.dimension_count", head_dim)
    value_dim = metadata.get("llama.attention.value_length", head_dim)
    if not head_dim == rotated == value_dim:
        raise UnsupportedModel(
            f"the GGUF file's heads have {head_dim} dimensions for keys, {value_dim} for values "
            f"and rotate {rotated}; supported is the same number for all"
        )
    eos = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    eos_ids = list(dict.fromkeys(id for id in eos if id is not None))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": _need(metadata, "llama.block_count"),
        "num_attention_heads": query_heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", query_heads),
        "head_dim": head_dim,
        "hidden_size": hidden_size,
        "intermediate_size": _need(metadata, "llama.feed_forward_length"),
        "vocab_size": shapes["token_embd.weight"][-1],  # GGUF names the inner dimension first
        "max_position_embeddings": _need(metadata, "llama.context_length"),
        "rope_theta": _shortest(metadata.get("llama.rope.freq_base", 10_000.0)),
        "rms_norm_eps": _shortest(_need(metadata, "llama.attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else eos_ids or None,
        "torch_dtype": "float32",
    }


def _need(metadata: Mapping[str, Any], key: str) -> Any:
    if (value := metadata.get(key)) is None:
        raise UnsupportedModel(f"the GGUF file lacks {key}")
    if isinstance(value, list):
        raise UnsupportedModel(f"the GGUF file's {key} differs by layer; supported is one for all")
    return value


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _weights(reader: GGUFReader, config: Mapping[str, Any]) -> list[_Weight]:
    """What to write, checked before the first byte is: all expected tensors and no other."""
    weights = [_weight(tensor, config) for tensor in reader.tensors]
    expected = {"model.embed_tokens.weight", "model.norm.weight"}
    for layer in range(config["num_hidden_layers"]):
        expected |= {f"model.layers.{layer}.{part}.weight" for part in _LAYER_NAMES.values()}
    if missing := expected - {weight.name for weight in weights}:
        raise UnsupportedModel(f"the GGUF file lacks the tensor for {min(missing)}")
    return weights


def _weight(tensor: Any, config: Mapping[str, Any]) -> _Weight:
    name, heads = _PLAIN_NAMES.get(tensor.name), 0
    if match := _LAYER_TENSOR.fullmatch(tensor.name):
        layer, part = int(match[1]), match[2]
        if part in _LAYER_NAMES and layer < config["num_hidden_layers"]:
            name = f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
        heads = {
            "attn_q": config["num_attention_heads"],
            "attn_k": config["num_key_value_heads"],
        }.get(part, 0)
    if name is None:
        raise UnsupportedModel(
            f"the GGUF file holds the tensor {tensor.name}, which a plain Llama model does not "
            "have (biases, experts and rope_freqs are not supported)"
        )
    kind = tensor.tensor_type
    try:  # gguf has no list of what it can dequantise; one row tells
        dequantize(tensor.data[:1], kind)
    except NotImplementedError as error:
        raise UnsupportedModel(
            f"the GGUF file's tensor {tensor.name} is {GGMLQuantizationType(kind).name}, which "
            "gguf cannot dequantise; supported are F32, F16, BF16, Q4_0 to Q8_0 and the K-quants"
        ) from error

    def read() -> NDArray[np.float32]:
        values = np.asarray(dequantize(tensor.data, kind), dtype=np.float32)
        return _halves_from_pairs(values, heads) if heads else values

    shape = tuple(int(size) for size in reversed(tensor.shape))
    return _Weight(name, shape, read)


def _halves_from_pairs(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo the row order of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.

    Within each head, rows (0, h), (1, h + 1), ... stood side by side; h is half of head_dim.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)  # [heads, half, 2, hidden]
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_safetensors(file: Path, weights: list[_Weight]) -> None:
    """Write the tensors one at a time; `safetensors.numpy.save_file` wants all of them in memory.

    The format: 8 bytes of little-endian header length, the JSON header, the data without gaps.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in weights:
        start, end = end, end + 4 * int(np.prod(weight.shape))
        shape = list(weight.shape)
        header[weight.name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for weight in weights:
            values = weight.read()
            assert values.shape == weight.shape, weight.name
            stream.write(values.astype("<f4", copy=False).tobytes())
