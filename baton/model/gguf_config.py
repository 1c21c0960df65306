"""A GGUF file's metadata as the content of `config.json`.

Keys begin with the architecture's name, `qwen2.block_count` say. A key that asks for arithmetic
that the engine does not have is refused by name, and so is one that is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from baton.errors import UnsupportedModel
from baton.model.gguf_families import GgufFamily
from baton.model.rope import RopeKind, RopeScaling

Shape = tuple[int, ...]

_DIVISOR_TOLERANCE = 1e-3


def config_from_gguf(
    metadata: Mapping[str, Any],
    architecture: str,
    family: GgufFamily,
    shapes: Mapping[str, Shape],
    rope_divisors: Sequence[float] | None,
) -> dict[str, Any]:
    """The content of config.json. Raises `UnsupportedModel` for a key that is missing or odd.

    `shapes` are those of the file's tensors by GGUF's names, outer dimension first.
    `rope_divisors` are the numbers of its tensor `rope_freqs.weight`, where it has one.
    """
    keys = _Keys(metadata, architecture)
    _refuse_unsupported(metadata, keys, family)
    if "token_embd.weight" not in shapes:
        raise UnsupportedModel("the GGUF file has no tensor token_embd.weight")
    query_heads = keys.need("attention.head_count")
    head_dim = _head_dim(keys, query_heads)
    theta = _shortest(keys.get("rope.freq_base", 10_000.0))
    config = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "num_hidden_layers": keys.need("block_count"),
        "num_attention_heads": query_heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", query_heads),
        "head_dim": head_dim,
        "hidden_size": keys.need("embedding_length"),
        "intermediate_size": keys.need("feed_forward_length"),
        "vocab_size": shapes["token_embd.weight"][0],
        "max_position_embeddings": keys.need("context_length"),
        "rope_theta": theta,
        "rms_norm_eps": _shortest(keys.need("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_token_id(metadata),
        "torch_dtype": "float32",
    } | dict(family.constants)
    if scaling := _rope_scaling(keys, head_dim, theta, rope_divisors):
        config["rope_scaling"] = scaling
    if window := keys.get("attention.sliding_window", 0):
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        config["sliding_window"] = window
    elif family.model_type != "llama":
        config["sliding_window"] = None
    if family.expert_tensors:
        config["num_experts"] = keys.need("expert_count")
        config["num_experts_per_tok"] = keys.need("expert_used_count")
        config["moe_intermediate_size"] = keys.need("expert_feed_forward_length")
    return config


class _Keys:
    """The metadata under one architecture's prefix."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self._metadata, self._prefix = metadata, architecture

    def get(self, key: str, default: Any = None) -> Any:
        return self._one(key, self._metadata.get(f"{self._prefix}.{key}", default))

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise UnsupportedModel(f"the GGUF file lacks {self._prefix}.{key}")
        return value

    def refuse_unless(self, key: str, supported: tuple[Any, ...]) -> None:
        found = self._metadata.get(f"{self._prefix}.{key}")
        if found not in supported:
            raise UnsupportedModel(
                f"the GGUF file's {self._prefix}.{key} is {found!r}; supported is {supported[-1]!r}"
            )

    def _one(self, key: str, value: Any) -> Any:
        if isinstance(value, list):
            raise UnsupportedModel(
                f"the GGUF file's {self._prefix}.{key} differs by layer; supported is one for all"
            )
        return value


def _refuse_unsupported(metadata: Mapping[str, Any], keys: _Keys, family: GgufFamily) -> None:
    if metadata.get("split.count") not in (None, 0, 1):
        raise UnsupportedModel(
            f"the GGUF file is one of {metadata['split.count']} (split.count); merge them into one "
            "with llama-gguf-split --merge"
        )
    keys.refuse_unless("rope.scaling.type", (None, "none", "linear"))
    if family.expert_tensors:
        keys.refuse_unless("expert_weights_norm", (None, True))
        keys.refuse_unless("expert_shared_count", (None, 0))
    else:
        keys.refuse_unless("expert_count", (None, 0))
    if family.model_type != "llama":
        keys.refuse_unless("attention.sliding_window", (None, 0))


def _head_dim(keys: _Keys, query_heads: int) -> int:
    head_dim: int = keys.get("attention.key_length", keys.need("embedding_length") // query_heads)
    rotated = keys.get("rope.dimension_count", head_dim)
    value_dim = keys.get("attention.value_length", head_dim)
    if not head_dim == rotated == value_dim:
        raise UnsupportedModel(
            f"the GGUF file's heads have {head_dim} dimensions for keys, {value_dim} for values "
            f"and rotate {rotated}; supported is the same number for all"
        )
    return head_dim


def _rope_scaling(
    keys: _Keys, head_dim: int, theta: float, divisors: Sequence[float] | None
) -> dict[str, Any] | None:
    """In the words of config.json, or None.

    A factor without a type is linear, as it is in llama.cpp. Of Llama 3's scaling a file keeps the
    divisors alone; they are traced back to the factor that gives them with the other numbers of
    all published Llama 3.x, or refused.
    """
    # Older files have the linear factor as rope.scale_linear, and 0 for none.
    factor = keys.get("rope.scaling.factor") or keys.get("rope.scale_linear") or 1.0
    linear = keys.get("rope.scaling.type", "linear") == "linear" and factor != 1.0
    if divisors is None or max(divisors) == min(divisors) == 1.0:
        return {"rope_type": "linear", "factor": _shortest(factor)} if linear else None
    scaling = RopeScaling(RopeKind.LLAMA3, _shortest(max(divisors)), 1.0, 4.0, 8192)
    wanted = scaling.divisors(head_dim, theta)
    if linear or len(wanted) != len(divisors) or _differ(wanted, divisors):
        raise UnsupportedModel(
            "the GGUF file's rope_freqs.weight scales rotary positions in a way that is not Llama "
            "3's; use the model's safetensors instead"
        )
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_context_length,
    }


def _differ(left: Sequence[float], right: Sequence[float]) -> bool:
    return any(abs(a - b) > _DIVISOR_TOLERANCE * b for a, b in zip(left, right, strict=True))


def _eos_token_id(metadata: Mapping[str, Any]) -> int | list[int] | None:
    found = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    ids = list(dict.fromkeys(id for id in found if id is not None))
    return ids[0] if len(ids) == 1 else ids or None


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value)))
