"""A model computes the same from its GGUF file as from its safetensors, in every family.

What a quantised tensor holds is told by the `gguf` package's dequantiser.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, dequantize, quantize
from numpy.typing import NDArray
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file

from baton.errors import UnsupportedModel
from baton.model import load_spec
from baton.model.gguf_import import import_gguf
from tests.engine.tiny import feed, load_tiny, poison
from tests.fixtures.family_gguf import (
    ARCHITECTURES,
    Pack,
    pairs_from_halves,
    plain,
    quantised,
    write_family_gguf,
)
from tests.fixtures.family_weights import FAMILIES, PROMPT, family_config, family_weights

Kind = GGMLQuantizationType
TABLE = (9, 2, 14, 0, 7, 3, 11)
# Each config that a GGUF file can state in full; Llama 3's is tested below.
STATED = ["llama2", "mistral", "qwen2_5", "qwen3", "qwen3_moe", "smollm3"]

WIDE: dict[str, Any] = family_config("qwen3_moe") | {
    "num_hidden_layers": 1,
    "hidden_size": 256,  # K-quants come in blocks of 256 numbers
    "head_dim": 64,
    "moe_intermediate_size": 256,
    "num_experts": 2,
    "num_experts_per_tok": 1,
}


def imported(tmp_path: Path, config: dict[str, Any], pack: Pack = plain) -> Path:
    gguf = write_family_gguf(tmp_path / "tiny.gguf", config, family_weights(config), pack)
    folder = tmp_path / "imported"
    folder.mkdir()
    import_gguf(gguf, folder, lambda _: None)
    return folder


@pytest.mark.parametrize("name", STATED)
def test_the_logits_are_those_of_the_original(tmp_path: Path, name: str) -> None:
    _, model, cache = load_tiny(imported(tmp_path, family_config(name)))
    poison(cache)
    wanted = load_file(FAMILIES / name / "logits.safetensors")["logits"]
    with torch.inference_mode():
        logits = feed(model, PROMPT, 0, TABLE)
    torch.testing.assert_close(logits, wanted[-1], rtol=0, atol=1e-4)


def test_linear_scaling_is_kept(tmp_path: Path) -> None:
    config = family_config("llama_linear") | {"attention_bias": False}
    spec = load_spec(imported(tmp_path, config))
    assert spec.rope_scaling is not None
    assert (spec.rope_scaling.kind, spec.rope_scaling.factor) == ("linear", 4.0)


@pytest.mark.parametrize(("factor", "head_dim"), [(8.0, 16), (32.0, 64), (8.0, 128)])
def test_llama_3_scaling_is_recognised_by_its_divisors(
    tmp_path: Path, factor: float, head_dim: int
) -> None:
    """The converter writes nothing else of it: `LlamaModel.generate_extra_tensors`."""
    config = family_config("llama3") | {"rope_scaling": None, "head_dim": head_dim}

    def pack(writer: GGUFWriter, name: str, values: NDArray[np.float32]) -> None:
        plain(writer, name, values)
        if name == "output_norm.weight":
            divisors = llama3_divisors(head_dim, config["rope_theta"], factor)
            plain(writer, "rope_freqs.weight", divisors)

    folder = imported(tmp_path, config, pack)
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def llama3_divisors(head_dim: int, theta: float, factor: float) -> NDArray[np.float32]:
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    found = []
    for wavelength in 2 * np.pi / frequencies:
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192:
            found.append(factor)
        else:
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize(
    "kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1], ids=lambda k: k.name
)
@pytest.mark.parametrize("name", ["llama2", "qwen3_moe"])
def test_quantised_weights_are_what_the_dequantiser_says(
    tmp_path: Path, name: str, kind: GGMLQuantizationType
) -> None:
    """Rows are reordered after they are dequantised; quantising goes along rows and is the same."""
    config = family_config(name)
    found = load_numpy(imported(tmp_path, config, quantised(kind)) / "model.safetensors")
    wanted = family_weights(config)
    assert found.keys() == wanted.keys()
    for tensor, values in wanted.items():
        if values.ndim == 2:
            values = dequantize(quantize(values, kind), kind)
        np.testing.assert_array_equal(found[tensor], values, err_msg=tensor)


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q6_K], ids=lambda kind: kind.name)
def test_k_quants_are_what_the_dequantiser_says(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    """The package cannot write these, so their blocks are random bytes with sane scales."""
    stored: dict[str, NDArray[np.uint8]] = {}

    def pack(writer: GGUFWriter, name: str, values: NDArray[np.float32]) -> None:
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            stored[name] = random_blocks(values.shape, kind, seed=len(stored))
            writer.add_tensor(name, stored[name], raw_dtype=kind)

    found = load_numpy(imported(tmp_path, WIDE, pack) / "model.safetensors")
    wanted = {name: dequantize(blocks, kind) for name, blocks in stored.items()}
    layer, experts = "model.layers.0.", wanted["blk.0.ffn_down_exps.weight"]
    assert np.isfinite(experts).all()
    np.testing.assert_array_equal(found["lm_head.weight"], wanted["output.weight"])
    query = found[f"{layer}self_attn.q_proj.weight"]
    np.testing.assert_array_equal(query, wanted["blk.0.attn_q.weight"])
    for expert in range(2):
        down = found[f"{layer}mlp.experts.{expert}.down_proj.weight"]
        np.testing.assert_array_equal(down, experts[expert])


def random_blocks(
    shape: tuple[int, ...], kind: GGMLQuantizationType, seed: int
) -> NDArray[np.uint8]:
    """Raw bytes [..., blocks of a row]. Q4_K begins with its two scales, Q6_K ends with its one."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // block, block_bytes), dtype=np.uint8)
    scales = slice(0, 4) if kind is Kind.Q4_K else slice(block_bytes - 2, block_bytes)
    count = scales.stop - scales.start
    sane = random.uniform(0.001, 0.01, (*blocks.shape[:-1], count // 2)).astype(np.float16)
    blocks[..., scales] = sane.view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def test_rows_are_put_in_order_whole_heads_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.model.gguf_import._PIECE_ELEMENTS", 64 * 24)  # a head and a half
    config = family_config("llama2")
    found = load_numpy(imported(tmp_path, config) / "model.safetensors")
    for tensor, values in family_weights(config).items():
        np.testing.assert_array_equal(found[tensor], values, err_msg=tensor)
    query = found["model.layers.0.self_attn.q_proj.weight"]
    assert not np.array_equal(pairs_from_halves(query, 4), query)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("qwen3_moe", {"num_experts": 4}, r"ffn_gate_exps\.weight is \(8, 32, 64\).* of 4 experts"),
        ("qwen3", {"num_hidden_layers": 4}, r"lacks the tensor blk\.3\.attn_norm\.weight"),
        ("qwen3", {"num_hidden_layers": 2}, r"blk\.2\.attn_k\.weight.* plain qwen3 model"),
    ],
)
def test_tensors_that_do_not_fit_the_metadata_are_named(
    tmp_path: Path, name: str, change: dict[str, Any], named: str
) -> None:
    config = family_config(name)
    weights = family_weights(config)

    def pack(writer: GGUFWriter, tensor: str, values: NDArray[np.float32]) -> None:
        if tensor == "token_embd.weight":
            for key, value in change.items():
                setter = {"num_experts": "expert_count", "num_hidden_layers": "block_count"}[key]
                writer.kv_data[0].pop(f"{ARCHITECTURES.get(name, name)}.{setter}")
                getattr(writer, f"add_{setter}")(value)
        plain(writer, tensor, values)

    gguf = write_family_gguf(tmp_path / "tiny.gguf", config, weights, pack)
    (tmp_path / "imported").mkdir()
    with pytest.raises(UnsupportedModel, match=named):
        import_gguf(gguf, tmp_path / "imported", lambda _: None)
