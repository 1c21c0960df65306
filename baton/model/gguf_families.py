"""What the architectures that a GGUF file may hold are called, and what their tensors are.

One row of `GGUF_FAMILIES` for each `general.architecture`: which Hugging Face model it becomes,
which tensors a layer has, and whether its query and key rows were reordered. llama.cpp rotates
either neighbouring pairs of dimensions or the two halves of a head; for the former its converter
reorders the rows (`LlamaModel.permute` in convert_hf_to_gguf.py, which Mistral and SmolLM3 share),
and for the Qwen models it leaves them. A Mistral file says that it is a llama.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from baton.errors import UnsupportedModel

MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
HEAD_TENSORS = {"output.weight": "lm_head.weight"}
"""Only where the head is not the embedding."""

_ATTENTION = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_BIASES = {
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
}
_HEAD_NORMS = {
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
}
_DENSE = {
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_ROUTER = {"ffn_gate_inp.weight": "mlp.gate.weight"}
_EXPERTS = {
    "ffn_gate_exps.weight": "mlp.experts.{expert}.gate_proj.weight",
    "ffn_up_exps.weight": "mlp.experts.{expert}.up_proj.weight",
    "ffn_down_exps.weight": "mlp.experts.{expert}.down_proj.weight",
}


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """One architecture: its name in Hugging Face's terms, and what its files hold."""

    model_type: str
    class_name: str
    layer_tensors: Mapping[str, str]
    """GGUF's name of a layer's tensor, and Hugging Face's."""
    expert_tensors: Mapping[str, str] = field(default_factory=dict)
    """The same for tensors that hold all experts, one after the other."""
    rows_in_pairs: bool = False
    """Query and key rows stand as neighbouring pairs and must become halves."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the config that llama.cpp knows without being told."""


GGUF_FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily("llama", "LlamaForCausalLM", _ATTENTION | _DENSE, rows_in_pairs=True),
    "qwen2": GgufFamily("qwen2", "Qwen2ForCausalLM", _ATTENTION | _BIASES | _DENSE),
    "qwen3": GgufFamily("qwen3", "Qwen3ForCausalLM", _ATTENTION | _HEAD_NORMS | _DENSE),
    "qwen3moe": GgufFamily(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _ATTENTION | _HEAD_NORMS | _ROUTER,
        expert_tensors=_EXPERTS,
        constants={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "smollm3": GgufFamily(
        "smollm3",
        "SmolLM3ForCausalLM",
        _ATTENTION | _DENSE,
        rows_in_pairs=True,
        constants={"no_rope_layer_interval": 4, "use_sliding_window": False},
    ),
}


def gguf_family(metadata: Mapping[str, Any]) -> tuple[str, GgufFamily]:
    """The file's architecture and its row. Raises `UnsupportedModel` with the list of all."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in GGUF_FAMILIES:
        raise UnsupportedModel(
            f"the GGUF file's architecture is {name!r}; supported are "
            + ", ".join(repr(known) for known in GGUF_FAMILIES)
        )
    return name, GGUF_FAMILIES[name]


@dataclass(frozen=True, slots=True)
class Source:
    """Where one tensor of the folder comes from: a tensor of the file, or one expert's part."""

    name: str
    gguf_name: str
    expert: int | None = None
    heads: int = 0
    """Of how many heads the rows stand in pairs; 0 where they stand as they should."""


def sources(family: GgufFamily, config: Mapping[str, Any]) -> Iterator[Source]:
    """Every tensor that the model of this config.json has, in the order to write them."""
    whole = MODEL_TENSORS if config["tie_word_embeddings"] else MODEL_TENSORS | HEAD_TENSORS
    for theirs, ours in whole.items():
        yield Source(ours, theirs)
    pairs = {
        "attn_q.weight": config["num_attention_heads"],
        "attn_k.weight": config["num_key_value_heads"],
    }
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in family.layer_tensors.items():
            heads = pairs.get(theirs, 0) if family.rows_in_pairs else 0
            yield Source(f"model.layers.{layer}.{ours}", f"blk.{layer}.{theirs}", heads=heads)
        for theirs, ours in family.expert_tensors.items():
            for expert in range(config["num_experts"]):
                name = f"model.layers.{layer}.{ours.format(expert=expert)}"
                yield Source(name, f"blk.{layer}.{theirs}", expert=expert)
