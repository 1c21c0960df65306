"""What Baton needs to know about a model before it loads any weight.

A `ModelSpec` is read once at start from a folder in Hugging Face layout. The engine shapes its
tensors by it, the KV layout follows from it, and its fingerprint is what two nodes compare before
one takes the other's KV cache. A model that would need arithmetic the engine does not have is
refused here, by name: a wrong answer is worse than none. What sets one family of models apart from
the next stands in the table in `families`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.errors import UnsupportedModel
from baton.model.config_fields import count, positive, refuse_unless, switch, token_ids
from baton.model.families import Biases, Family, family_of
from baton.model.fingerprint import fingerprint
from baton.model.folder import CONFIG_FILE, GENERATION_FILE, read_json, read_json_if_present
from baton.model.layer_rules import Experts, experts, layers_without_rope, windowed_layers
from baton.model.rope import RopeScaling, rope_scaling, rope_theta

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
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None
    layers_without_rope: tuple[int, ...] = ()
    window: int | None = None
    windowed_layers: tuple[int, ...] = ()
    experts: Experts | None = None

    def window_of(self, layer: int) -> int | None:
        """How many tokens a token sees in this layer, itself included; None where all so far."""
        return self.window if layer in self.windowed_layers else None

    def experts_of(self, layer: int) -> Experts | None:
        """The experts of this layer, or None where one network serves all tokens."""
        return self.experts if self.experts and layer in self.experts.layers else None


def load_spec(folder: Path) -> ModelSpec:
    """The spec of the model in `folder`. Raises `UnsupportedModel` with what was found."""
    config = read_json(folder, CONFIG_FILE)
    generation = read_json_if_present(folder, GENERATION_FILE)
    architecture, family = family_of(config)
    _refuse_unsupported(config)
    query_heads, kv_heads, head_dim = _heads(config, family)
    qkv_bias, output_bias = _biases(config, family)
    layers = count(config, "num_hidden_layers")
    without_rope = layers_without_rope(config, family, layers)
    window, windowed = windowed_layers(config, family, layers, without_rope)
    return ModelSpec(
        name=_name(folder),
        architecture=architecture,
        layers=layers,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=count(config, "hidden_size"),
        intermediate_size=count(config, "intermediate_size"),
        vocabulary_size=count(config, "vocab_size"),
        context_length=count(config, "max_position_embeddings"),
        rope_theta=rope_theta(config, family.rope_theta),
        rms_norm_eps=positive(config, "rms_norm_eps", _DEFAULT_RMS_NORM_EPS),
        tied_embeddings=switch(config, "tie_word_embeddings", default=family.tied_embeddings),
        bos_token_id=next(iter(token_ids(config.get("bos_token_id"), "bos_token_id")), None),
        eos_token_ids=_eos_token_ids(config, generation),
        fingerprint=fingerprint(folder),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        qk_norm=family.qk_norm,
        rope_scaling=rope_scaling(config),
        layers_without_rope=without_rope,
        window=window,
        windowed_layers=windowed,
        experts=experts(config, family, layers),
    )


def _name(folder: Path) -> str:
    """The folder's name, or org/name where it is a snapshot in the Hugging Face cache."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Raise for every field that asks for arithmetic the engine does not have."""
    refuse_unless(config, "hidden_act", (None, "silu"))
    refuse_unless(config, "mlp_bias", (None, False))
    refuse_unless(config, "quantization_config", (None,))


def _heads(config: Mapping[str, Any], family: Family) -> tuple[int, int, int]:
    """Query heads, KV heads and the dimensions of each."""
    query_heads = count(config, "num_attention_heads")
    kv_heads = count(config, "num_key_value_heads", default=query_heads)
    usual = family.head_dim or count(config, "hidden_size") // query_heads
    head_dim = count(config, "head_dim", default=usual)
    if query_heads % kv_heads:
        raise UnsupportedModel(
            f"{CONFIG_FILE}: {query_heads} query heads cannot share {kv_heads} KV heads evenly"
        )
    if head_dim % 2:
        raise UnsupportedModel(f"{CONFIG_FILE}: head_dim is {head_dim}; rotary needs an even one")
    return query_heads, kv_heads, head_dim


def _biases(config: Mapping[str, Any], family: Family) -> tuple[bool, bool]:
    """Whether queries, keys and values have a bias, and whether the attention's output has one."""
    match family.biases:
        case Biases.NONE:
            refuse_unless(config, "attention_bias", (None, False))
            return False, False
        case Biases.QUERY_KEY_VALUE:
            return True, False
        case Biases.AS_CONFIGURED:
            configured = switch(config, "attention_bias")
            return configured, configured


def _eos_token_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end an answer. The generation config knows best: chat models end turns there."""
    found: dict[int, None] = {}
    for holder in (generation, config):
        found.update(dict.fromkeys(token_ids(holder.get("eos_token_id"), "eos_token_id")))
    return tuple(found)
