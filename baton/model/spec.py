"""What Baton needs to know about a model before it loads any weight.

A `ModelSpec` is read once at start from a folder in Hugging Face layout. The engine shapes its
tensors by it, the KV layout follows from it, and its fingerprint is what two nodes compare before
one takes the other's KV cache. A model that would need arithmetic the engine does not have is
refused here, by name: a wrong answer is worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.errors import UnsupportedModel
from baton.model.fingerprint import fingerprint
from baton.model.folder import CONFIG_FILE, GENERATION_FILE, read_json, read_json_if_present

SUPPORTED_ARCHITECTURES = ("llama", "mistral")
_DEFAULT_ROPE_THETA = 10_000.0
_DEFAULT_RMS_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shape and constants of a decoder-only transformer. Counts are per model, not per rank."""

    name: str
    architecture: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocabulary_size: int
    context_length: int
    rope_theta: float
    rms_norm_eps: float
    tied_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    fingerprint: str


def load_spec(folder: Path) -> ModelSpec:
    """The spec of the model in `folder`. Raises `UnsupportedModel` with what was found."""
    config = read_json(folder, CONFIG_FILE)
    generation = read_json_if_present(folder, GENERATION_FILE)
    architecture = _architecture(config)
    _refuse_unsupported(config)
    hidden_size = _count(config, "hidden_size")
    query_heads = _count(config, "num_attention_heads")
    kv_heads = _count(config, "num_key_value_heads", default=query_heads)
    head_dim = _count(config, "head_dim", default=hidden_size // query_heads)
    if query_heads % kv_heads:
        raise UnsupportedModel(
            f"{CONFIG_FILE}: {query_heads} query heads cannot share {kv_heads} KV heads evenly"
        )
    if head_dim % 2:
        raise UnsupportedModel(f"{CONFIG_FILE}: head_dim is {head_dim}; rotary needs an even one")
    return ModelSpec(
        name=_name(folder),
        architecture=architecture,
        layers=_count(config, "num_hidden_layers"),
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=hidden_size,
        intermediate_size=_count(config, "intermediate_size"),
        vocabulary_size=_count(config, "vocab_size"),
        context_length=_count(config, "max_position_embeddings"),
        rope_theta=_rope_theta(config),
        rms_norm_eps=_positive(config, "rms_norm_eps", _DEFAULT_RMS_NORM_EPS),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        bos_token_id=next(iter(_token_ids(config.get("bos_token_id"), "bos_token_id")), None),
        eos_token_ids=_eos_token_ids(config, generation),
        fingerprint=fingerprint(folder),
    )


def _name(folder: Path) -> str:
    """The folder's name, or org/name where it is a snapshot in the Hugging Face cache."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


def _architecture(config: Mapping[str, Any]) -> str:
    found = config.get("model_type")
    if found not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedModel(
            f"{CONFIG_FILE}: model_type is {found!r}; supported are "
            + " and ".join(repr(name) for name in SUPPORTED_ARCHITECTURES)
        )
    return str(found)


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Raise for every field that asks for arithmetic the engine does not have."""
    _refuse_unless(config, "hidden_act", (None, "silu"))
    for field in ("attention_bias", "mlp_bias"):
        _refuse_unless(config, field, (None, False))
    _refuse_unless(config, "quantization_config", (None,))
    _refuse_unless(config, "partial_rotary_factor", (None, 1, 1.0))
    for field in ("rope_scaling", "rope_parameters"):
        parameters = config.get(field)
        if parameters is None:
            continue
        if not isinstance(parameters, dict):
            raise UnsupportedModel(f"{CONFIG_FILE}: {field} is {parameters!r}; supported is null")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind != "default":
            raise UnsupportedModel(
                f"{CONFIG_FILE}: {field} asks for {kind!r} rotary scaling; supported is none"
            )
        _refuse_unless(parameters, "partial_rotary_factor", (None, 1, 1.0))
    window = config.get("sliding_window")
    if window is not None and window < _count(config, "max_position_embeddings"):
        raise UnsupportedModel(
            f"{CONFIG_FILE}: sliding_window is {window}; supported is null, or a window at least "
            "as long as the context"
        )


def _refuse_unless(config: Mapping[str, Any], field: str, supported: tuple[Any, ...]) -> None:
    found = config.get(field)
    if found not in supported:
        shown = " or ".join(repr(value) for value in supported if value is not None) or "null"
        raise UnsupportedModel(f"{CONFIG_FILE}: {field} is {found!r}; supported is {shown}")


def _rope_theta(config: Mapping[str, Any]) -> float:
    """At the top level, or since transformers 5 inside `rope_parameters`."""
    parameters = config.get("rope_parameters") or {}
    holder = parameters if "rope_theta" in parameters else config
    return _positive(holder, "rope_theta", _DEFAULT_ROPE_THETA)


def _eos_token_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end an answer. The generation config knows best: chat models end turns there."""
    found: dict[int, None] = {}
    for holder in (generation, config):
        found.update(dict.fromkeys(_token_ids(holder.get("eos_token_id"), "eos_token_id")))
    return tuple(found)


def _token_ids(value: Any, field: str) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and item >= 0 for item in ids):
        raise UnsupportedModel(f"{CONFIG_FILE}: {field} is {value!r}, which are no token ids")
    return tuple(ids)


def _count(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = config.get(field)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(f"{CONFIG_FILE}: {field} is {value!r} and must be a whole number")
    return value


def _positive(config: Mapping[str, Any], field: str, default: float) -> float:
    value = config.get(field, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise UnsupportedModel(f"{CONFIG_FILE}: {field} is {value!r} and must be above 0")
    return float(value)
