"""A tiny Llama with random weights, and a dense forward pass of it that shares no code with ours.

The reference knows no pages, no packing and no batches, and computes in float64: what the engine
answers must lie within float32's rounding of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from baton.model.spec import ModelSpec, load_spec
from engine.kv_cache import PagedKvCache
from engine.model import Llama
from engine.runner import Runner
from engine.segments import Segment
from engine.weights import load_weights

CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]

CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_size": 40,  # unlike heads * head_dim, so that a mix-up of the two shows
    "intermediate_size": 56,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_weights(tied: bool = True, seed: int = 0) -> Weights:
    """Random float32 weights under Hugging Face names, scaled so that layers keep their size."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    hidden, middle, vocabulary = 40, 56, 97
    weights = {
        "model.embed_tokens.weight": random(vocabulary, hidden) * 3,
        "model.norm.weight": 1 + random(hidden),
    }
    if not tied:
        weights["lm_head.weight"] = random(vocabulary, hidden) * 3
    for layer in range(3):
        shapes = {
            "self_attn.q_proj": (48, hidden),
            "self_attn.k_proj": (16, hidden),
            "self_attn.v_proj": (16, hidden),
            "self_attn.o_proj": (hidden, 48),
            "mlp.gate_proj": (middle, hidden),
            "mlp.up_proj": (middle, hidden),
            "mlp.down_proj": (hidden, middle),
        }
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = random(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = 1 + random(hidden)
    return weights


def write_folder(folder: Path, weights: Weights, shards: int = 1) -> Path:
    """A Hugging Face folder; with an index where there are several shards."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"tie_word_embeddings": "lm_head.weight" not in weights}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")  # part of the fingerprint; nobody reads it here
    names = sorted(weights)
    files = [f"model-{shard + 1:05}-of-{shards:05}.safetensors" for shard in range(shards)]
    if shards == 1:
        files = ["model.safetensors"]
    file_of = {name: files[number % shards] for number, name in enumerate(names)}
    for file in files:
        save_file({n: weights[n] for n in names if file_of[n] == file}, folder / file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": file_of}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load_tiny(
    folder: Path,
    blocks: int = 24,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype | None = None,
) -> tuple[ModelSpec, Llama, PagedKvCache]:
    spec = load_spec(folder)
    cache = PagedKvCache(spec, blocks, block_size, dtype, CPU, stored)
    return spec, Llama(spec, load_weights(folder, spec, dtype, CPU), cache), cache


def tiny_runner(folder: Path, blocks: int = 24, block_size: int = 4) -> Runner:
    spec = load_spec(folder)
    cache = PagedKvCache(spec, blocks, block_size, torch.float32, CPU)
    return Runner(spec, load_weights(folder, spec, torch.float32, CPU), cache)


def feed(
    model: Llama,
    token_ids: Sequence[int],
    start: int,
    table: Sequence[int],
    on_layer: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Compute a chunk of one prompt; logits [vocabulary] after its last token."""
    return model.forward([Segment(tuple(token_ids), start, tuple(table), 1)], on_layer)[0]


def next_tokens(
    model: Llama,
    token_ids: Sequence[int],
    positions: Sequence[int],
    tables: Sequence[Sequence[int]],
) -> torch.Tensor:
    """Feed one token of each sequence; logits [sequences, vocabulary]."""
    rows = zip(token_ids, positions, tables, strict=True)
    return model.forward([Segment((t,), place, tuple(table), 1) for t, place, table in rows])


def poison(cache: PagedKvCache, keep: Sequence[int] = ()) -> None:
    """Fill every block but those in `keep` with NaN."""
    others = [block for block in range(cache.blocks) if block not in keep]
    for layer in (*cache.keys, *cache.values):
        layer[others] = -1 if layer.dtype == torch.int8 else float("nan")  # a scale of NaN


def dense_logits(weights: Weights, token_ids: Sequence[int]) -> torch.Tensor:
    """float64 logits [tokens, vocabulary] after each token of one sequence."""
    wide = {name: weight.double() for name, weight in weights.items()}
    hidden = wide["model.embed_tokens.weight"][list(token_ids)]
    for layer in range(3):

        def get(name: str, layer: int = layer) -> torch.Tensor:
            return wide[f"model.layers.{layer}.{name}.weight"]

        normed = _norm(hidden, get("input_layernorm"))
        heads = []
        for head in range(6):
            query = _rope(normed @ get("self_attn.q_proj")[head * 8 : head * 8 + 8].T)
            shared = slice(head // 3 * 8, head // 3 * 8 + 8)  # three query heads a KV head
            key = _rope(normed @ get("self_attn.k_proj")[shared].T)
            value = normed @ get("self_attn.v_proj")[shared].T
            scores = query @ key.T / 8**0.5
            future = torch.ones_like(scores).triu(1).bool()
            heads.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ value)
        hidden = hidden + torch.cat(heads, -1) @ get("self_attn.o_proj").T
        normed = _norm(hidden, get("post_attention_layernorm"))
        gate, up = normed @ get("mlp.gate_proj").T, normed @ get("mlp.up_proj").T
        hidden = hidden + (gate * gate.sigmoid() * up) @ get("mlp.down_proj").T
    head_name = "lm_head.weight" if "lm_head.weight" in wide else "model.embed_tokens.weight"
    return _norm(hidden, wide["model.norm.weight"]) @ wide[head_name].T


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def _rope(x: torch.Tensor) -> torch.Tensor:
    """Number i of the first half and number i of the second are one complex number, turned."""
    turns = torch.arange(len(x)).double()[:, None] * 10000.0 ** (-torch.arange(4).double() / 4)
    turned = torch.complex(x[:, :4], x[:, 4:]) * torch.polar(torch.ones_like(turns), turns)
    return torch.cat((turned.real, turned.imag), -1)
