"""A tiny Llama as a Hugging Face folder and as GGUF, and the default model's folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from baton.model import TextCodec, locate

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCABULARY = 2, 4, 2, 8, 32, 64, 260

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


def quiet(_: str) -> None:
    """Progress that nobody watches."""


def tiny_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face names."""
    random = np.random.default_rng(seed)
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    weights = {
        "model.embed_tokens.weight": random.standard_normal((VOCABULARY, HIDDEN), np.float32),
        "model.norm.weight": random.standard_normal(HIDDEN, np.float32),
    }
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = random.standard_normal(
                shape, np.float32
            )
    return weights


def byte_tokens() -> list[str]:
    """One token per byte, then two control tokens, a user-defined one and a merged one."""
    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>", "<tool>", "he"]


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A Hugging Face folder with everything Baton reads."""
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(byte_tokens())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(tiny_weights(), folder / "model.safetensors")
    return folder


def write_gguf(
    path: Path, edit: Callable[[GGUFWriter], None] | None = None, **changes: Any
) -> Path:
    """The tiny model as llama.cpp's converter writes it. `edit` adds to it.

    Changes: `architecture`, `pre`, `add_bos`.
    """
    writer = GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "gpt-2"))
    writer.add_token_list(byte_tokens())
    writer.add_token_types([1] * 256 + [3, 3, 4, 1])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(changes.get("add_bos", False))
    writer.add_chat_template("{% for m in messages %}<tool>{{ m.content }}</s>{% endfor %}")
    for name, weight in tiny_weights().items():
        writer.add_tensor(_gguf_name(name), _as_llama_cpp(name, weight))
    if edit is not None:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_quantised(writer: GGUFWriter, name: str, kind: GGMLQuantizationType) -> None:
    """One block of zero bytes of a quantised type."""
    _, block_bytes = GGML_QUANT_SIZES[kind]
    writer.add_tensor(name, np.zeros((1, block_bytes), np.uint8), raw_dtype=kind)


def _gguf_name(name: str) -> str:
    for ours, theirs in {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers.": "blk.",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.": "ffn_",
        "_proj": "",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }.items():
        name = name.replace(ours, theirs)
    return name


def _as_llama_cpp(name: str, weight: np.ndarray) -> np.ndarray:
    """`LlamaModel.permute` of convert_hf_to_gguf.py, for the rows of query and key projections."""
    heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else 0
    if not heads:
        return weight
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


@pytest.fixture(scope="session")
def default_folder() -> Path:
    """The default model's folder; the first run on a machine fetches it."""
    return locate("smollm2-135m-instruct", quiet)


@pytest.fixture(scope="session")
def default_codec(default_folder: Path) -> TextCodec:
    return TextCodec.load(default_folder)
