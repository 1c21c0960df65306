"""What `load_spec` reads, what it refuses, and what a fingerprint depends on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from baton.errors import UnsupportedModel
from baton.model import fingerprint, load_spec
from baton.model.folder import weight_files
from tests.baton.model.conftest import CONFIG, tiny_weights

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
QWEN_WINDOW = {
    "model_type": "qwen3",
    "use_sliding_window": True,
    "sliding_window": 32,
    "max_window_layers": 1,
}
MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


def configured(folder: Path, **changes: Any) -> Path:
    config = {key: value for key, value in (CONFIG | changes).items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_spec_holds_what_the_config_says(tiny_folder: Path) -> None:
    spec = load_spec(tiny_folder)
    assert (spec.name, spec.architecture) == ("tiny-llama", "llama")
    assert (spec.layers, spec.query_heads, spec.kv_heads, spec.head_dim) == (2, 4, 2, 8)
    assert (spec.context_length, spec.eos_token_ids) == (128, (257,))
    assert len(spec.fingerprint) == 32


def test_rope_theta_is_found_where_transformers_5_puts_it(tiny_folder: Path) -> None:
    parameters = {"rope_type": "default", "rope_theta": 5e5}
    configured(tiny_folder, rope_theta="absent", rope_parameters=parameters)
    assert load_spec(tiny_folder).rope_theta == 5e5


def test_eos_of_the_generation_config_comes_first(tiny_folder: Path) -> None:
    (tiny_folder / "generation_config.json").write_text('{"eos_token_id": [259, 257]}')
    assert load_spec(tiny_folder).eos_token_ids == (259, 257)


def test_snapshot_in_the_hub_cache_is_named_for_its_repository(tiny_folder: Path) -> None:
    folder = tiny_folder.parent / "models--org--name" / "snapshots" / "0123abcd"
    shutil.copytree(tiny_folder, folder)
    assert load_spec(folder).name == "org/name"


def test_mistral_with_a_window_as_long_as_its_context_is_a_llama(tiny_folder: Path) -> None:
    for window in (None, 128):
        configured(tiny_folder, model_type="mistral", sliding_window=window)
        assert load_spec(tiny_folder).architecture == "mistral"


def test_mistral_has_its_window_in_every_layer_also_where_the_config_leaves_it_out(
    tiny_folder: Path,
) -> None:
    configured(tiny_folder, model_type="mistral", sliding_window=64)
    spec = load_spec(tiny_folder)
    assert [spec.window_of(layer) for layer in range(2)] == [64, 64]
    configured(tiny_folder, model_type="mistral", max_position_embeddings=8192)
    assert load_spec(tiny_folder).window_of(1) == 4096


@pytest.mark.parametrize(
    ("changes", "windowed"),
    [
        ({}, (1,)),
        ({"max_window_layers": 2}, ()),
        ({"layer_types": ["sliding_attention", "full_attention"]}, (0,)),
        ({"use_sliding_window": False}, ()),
        ({"sliding_window": 128}, ()),
        ({"model_type": "smollm3", "no_rope_layers": [0, 1]}, (0,)),
        (MOE, (0, 1)),
    ],
)
def test_windowed_layers_are_those_the_family_says(
    tiny_folder: Path, changes: dict[str, Any], windowed: tuple[int, ...]
) -> None:
    spec = load_spec(configured(tiny_folder, **QWEN_WINDOW | changes))
    assert spec.windowed_layers == windowed
    assert spec.window == (32 if windowed else None)


@pytest.mark.parametrize(
    ("changes", "biases"),
    [
        ({}, (False, False)),
        ({"attention_bias": True}, (True, True)),
        ({"model_type": "qwen2"}, (True, False)),
        ({"model_type": "qwen3"}, (False, False)),
    ],
)
def test_biases_are_those_the_family_has(
    tiny_folder: Path, changes: dict[str, Any], biases: tuple[bool, bool]
) -> None:
    spec = load_spec(configured(tiny_folder, **changes))
    assert (spec.qkv_bias, spec.output_bias) == biases


def test_smollm3_leaves_rope_out_of_every_fourth_layer_and_ties_its_head(tiny_folder: Path) -> None:
    configured(tiny_folder, model_type="smollm3", num_hidden_layers=9, tie_word_embeddings="absent")
    spec = load_spec(tiny_folder)
    assert spec.layers_without_rope == (3, 7)
    assert spec.tied_embeddings


def test_layers_with_experts_are_every_nth_and_not_those_left_out(tiny_folder: Path) -> None:
    changes = MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [3], "num_hidden_layers": 8}
    spec = load_spec(configured(tiny_folder, **changes))
    assert spec.experts is not None
    assert spec.experts.layers == (1, 5, 7)
    assert [spec.experts_of(layer) is not None for layer in (0, 1, 3, 5)] == [False, True] * 2
    assert (spec.experts.count, spec.experts.per_token, spec.experts.normalised) == (8, 2, False)


def test_llama3_scaling_slows_long_wavelengths_and_keeps_short_ones(tiny_folder: Path) -> None:
    scaling = load_spec(configured(tiny_folder, rope_scaling=LLAMA3)).rope_scaling
    assert scaling is not None
    divisors = scaling.divisors(head_dim=16, theta=10000.0)
    wavelengths = [6.28, 19.9, 62.8, 199, 628, 1987, 6283, 19869]
    for wavelength, divisor in zip(wavelengths, divisors, strict=True):
        if wavelength < 64 / 4:
            assert divisor == 1.0
        elif wavelength > 64 / 1:
            assert divisor == 8.0
        else:
            assert 1.0 < divisor < 8.0
    assert divisors == tuple(sorted(divisors))


def test_linear_scaling_slows_everything_alike(tiny_folder: Path) -> None:
    configured(tiny_folder, rope_scaling={"type": "linear", "factor": 2.5})
    scaling = load_spec(tiny_folder).rope_scaling
    assert scaling is not None
    assert scaling.divisors(head_dim=8, theta=10000.0) == (2.5,) * 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "'gpt2'; supported are 'llama', 'mistral', .*'qwen3_moe', "),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]; supported are 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu'"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes' and must be true or false"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "above its low_freq_factor 1"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_parameters and rope_scaling ask for different",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope_parameters asks for 'yarn' .*supported are none, 'linear' and 'llama3'",
        ),
        ({"rope_scaling": 2.0}, "rope_scaling is 2.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 64}, "sliding_window is 64, which this model_type does not have"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        (QWEN_WINDOW | {"layer_types": ["full_attention", "chunked"]}, "layer_types is .*chunked"),
        (
            QWEN_WINDOW | {"layer_types": ["full_attention"]},
            "layer_types has 1 entries .* 2 layers",
        ),
        (QWEN_WINDOW | {"max_window_layers": -1}, "max_window_layers is -1"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers has 1 entries"),
        ({"model_type": "smollm3", "no_rope_layers": 3}, "no_rope_layers is 3"),
        (MOE | {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, more than 8 experts"),
        (MOE | {"moe_intermediate_size": None}, "moe_intermediate_size is None"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"num_hidden_layers": "absent"}, "num_hidden_layers is None"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_unsupported_config_is_refused_by_name(
    tiny_folder: Path, changes: dict[str, Any], named: str
) -> None:
    configured(tiny_folder, **changes)
    with pytest.raises(UnsupportedModel, match=named):
        load_spec(tiny_folder)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("{", "not valid JSON"), ("[]", "must hold a JSON object"), (None, "has no config.json")],
)
def test_unreadable_config_says_what_to_change(
    tiny_folder: Path, content: str | None, sentence: str
) -> None:
    file = tiny_folder / "config.json"
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    with pytest.raises(UnsupportedModel, match=sentence):
        load_spec(tiny_folder)


def test_fingerprint_depends_on_neither_path_nor_time_nor_writer(tiny_folder: Path) -> None:
    before = fingerprint(tiny_folder)
    copy = tiny_folder.parent / "elsewhere"
    shutil.copytree(tiny_folder, copy)
    configured(copy, transformers_version="5.0.0", torch_dtype="bfloat16", _name_or_path="x")
    for file in copy.iterdir():
        os.utime(file, (1, 1))
    assert fingerprint(copy) == before


@pytest.mark.parametrize("part", ["weights", "config", "tokenizer", "eos"])
def test_fingerprint_tells_models_apart(tiny_folder: Path, part: str) -> None:
    before = fingerprint(tiny_folder)
    match part:
        case "weights":
            weights = tiny_weights()
            weights["model.norm.weight"][3] += np.float32(1e-3)
            save_file(weights, tiny_folder / "model.safetensors")
        case "config":
            configured(tiny_folder, rope_theta=10001.0)
        case "tokenizer":
            file = tiny_folder / "tokenizer.json"
            file.write_text(file.read_text() + "\n")
        case "eos":
            (tiny_folder / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert fingerprint(tiny_folder) != before


def test_weights_that_are_no_safetensors_are_refused(tiny_folder: Path) -> None:
    (tiny_folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(UnsupportedModel, match="no safetensors file"):
        fingerprint(tiny_folder)


def test_index_decides_which_weight_files_count(tiny_folder: Path) -> None:
    (tiny_folder / "model.safetensors").rename(tiny_folder / "part-1.safetensors")
    save_file({"extra": np.zeros(1)}, tiny_folder / "consolidated.safetensors")
    index = tiny_folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "part-1.safetensors", "b": "part-1.safetensors"}}')
    assert [file.name for file in weight_files(tiny_folder)] == ["part-1.safetensors"]
    index.write_text('{"weight_map": {"a": "part-2.safetensors"}}')
    with pytest.raises(UnsupportedModel, match=r"lacks part-2\.safetensors"):
        weight_files(tiny_folder)
