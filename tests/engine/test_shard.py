"""A rank loads its slice and nothing else; together the slices are the model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from baton.errors import ConfigError
from baton.model.spec import ModelSpec, load_spec
from engine.shard import Shard, rank_spec
from engine.weights import LayerWeights, ModelWeights, load_weights
from tests.engine.tiny import CONFIG, CPU
from tests.fixtures.family_weights import write_family_folder

ROOT = Path(__file__).parents[2]


def slices(folder: Path, spec: ModelSpec, size: int) -> list[ModelWeights]:
    shards = [Shard(rank, size) for rank in range(size)]
    return [load_weights(folder, spec, torch.float32, CPU, shard) for shard in shards]


def query_key_value(packed: torch.Tensor, spec: ModelSpec) -> tuple[torch.Tensor, ...]:
    """Of a packed weight or bias: [heads * head_dim, …] each."""
    rows = [heads * spec.head_dim for heads in (spec.query_heads, spec.kv_heads, spec.kv_heads)]
    return torch.split(packed, rows)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["llama_linear", "mistral", "qwen2", "qwen3", "qwen3_moe_mixed"])
def test_the_slices_of_all_ranks_are_the_model(tmp_path: Path, name: str, size: int) -> None:
    """With two KV heads and four ranks, two neighbours hold each head."""
    folder = write_family_folder(tmp_path / name, name)
    spec = load_spec(folder)
    whole = load_weights(folder, spec, torch.float32, CPU)
    parts = slices(folder, spec, size)
    for part in parts:
        for field in ("embedding", "norm", "head"):
            assert torch.equal(getattr(part, field), getattr(whole, field))
    for number, layer in enumerate(whole.layers):
        ranks = [part.layers[number] for part in parts]
        check_attention(layer, ranks, spec, size)
        check_feed_forward(layer, ranks)
        for field in ("input_norm", "post_norm", "query_norm", "key_norm", "router"):
            for rank in ranks:
                assert same(getattr(rank, field), getattr(layer, field))


def check_attention(
    layer: LayerWeights, ranks: list[LayerWeights], spec: ModelSpec, size: int
) -> None:
    assert torch.equal(torch.cat([rank.output for rank in ranks], dim=1), layer.output)
    assert same(ranks[0].output_bias, layer.output_bias)
    assert all(rank.output_bias is None for rank in ranks[1:])
    copies = max(1, size // spec.kv_heads)
    for field in ("qkv", "qkv_bias"):
        if (packed := getattr(layer, field)) is None:
            continue
        query, key, value = query_key_value(packed, spec)
        split = [
            query_key_value(getattr(rank, field), rank_spec(spec, Shard(number, size)))
            for number, rank in enumerate(ranks)
        ]
        assert torch.equal(torch.cat([part[0] for part in split]), query)
        assert torch.equal(torch.cat([part[1] for part in split[::copies]]), key)
        assert torch.equal(torch.cat([part[2] for part in split[::copies]]), value)
        for number, (_, own_key, own_value) in enumerate(split):
            assert torch.equal(own_key, split[number // copies * copies][1])
            assert torch.equal(own_value, split[number // copies * copies][2])


def check_feed_forward(layer: LayerWeights, ranks: list[LayerWeights]) -> None:
    """Of one network or of each expert: the inner dimension is cut."""
    gate, up = layer.gate_up.chunk(2, dim=-2)
    halves = [rank.gate_up.chunk(2, dim=-2) for rank in ranks]
    assert torch.equal(torch.cat([half[0] for half in halves], dim=-2), gate)
    assert torch.equal(torch.cat([half[1] for half in halves], dim=-2), up)
    assert torch.equal(torch.cat([rank.down for rank in ranks], dim=-1), layer.down)


def same(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return torch.equal(left, right)


def test_the_ranks_partial_outputs_add_up_to_the_whole_output(tmp_path: Path) -> None:
    """Why the output's bias is on one rank only."""
    folder = write_family_folder(tmp_path / "model", "llama_linear")
    spec = load_spec(folder)
    whole = load_weights(folder, spec, torch.float32, CPU).layers[1]
    attended = torch.rand(5, spec.query_heads * spec.head_dim)
    wanted = torch.nn.functional.linear(attended, whole.output, whole.output_bias)
    ranks = [part.layers[1] for part in slices(folder, spec, 4)]
    partial = [
        torch.nn.functional.linear(own, rank.output, rank.output_bias)
        for own, rank in zip(attended.chunk(4, dim=1), ranks, strict=True)
    ]
    torch.testing.assert_close(sum(partial), wanted)


@pytest.mark.parametrize("size", [3, 8])
def test_a_size_that_does_not_divide_is_refused_with_those_that_do(
    tmp_path: Path, size: int
) -> None:
    folder = write_family_folder(tmp_path / "model", "llama3")
    with pytest.raises(ConfigError, match=rf"over {size} ranks: 4 query heads.*use 1 or 2 or 4"):
        load_weights(folder, load_spec(folder), torch.float32, CPU, Shard(0, size))


def test_kv_heads_must_divide_or_be_divided(tmp_path: Path) -> None:
    spec = load_spec(write_family_folder(tmp_path / "model", "llama3"))
    odd = replace(spec, query_heads=12, kv_heads=3)
    assert rank_spec(odd, Shard(5, 6)).kv_heads == 1
    assert [Shard(rank, 6).kv_part(3).start for rank in range(6)] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ConfigError, match="over 2 ranks"):
        rank_spec(odd, Shard(0, 2))


MEASURE = """
import sys
from pathlib import Path
import torch
from baton.model.spec import load_spec
from engine.shard import Shard
from engine.weights import load_weights

def status(key):  # bytes, from Linux
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

spec = load_spec(Path(sys.argv[1]))
torch.ones(8, dtype=torch.bfloat16).float()
before = status("VmRSS:")
weights = load_weights(
    Path(sys.argv[1]), spec, torch.float32, torch.device("cpu"), Shard(1, int(sys.argv[2]))
)
slice_bytes = sum(
    part.nbytes for layer in weights.layers for part in (layer.qkv, layer.output, layer.gate_up,
    layer.down)
)
print(slice_bytes, status("VmHWM:") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_loading_takes_little_more_memory_than_the_slice(tmp_path: Path) -> None:
    """In a process of its own; its peak before loading only makes the measure stricter."""
    folder = write_wide_folder(tmp_path)
    command = [sys.executable, "-c", MEASURE, str(folder), "2"]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    slice_bytes, grown_bytes = map(int, run.stdout.split())
    assert slice_bytes > 50 << 20
    assert slice_bytes <= grown_bytes <= 1.2 * slice_bytes


def write_wide_folder(folder: Path) -> Path:
    """A model of 58 MiB in bfloat16; as float32 it is twice that, and half of it a slice."""
    hidden, inner, heads, kv_heads, head_dim = 1024, 4096, 16, 4, 64
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads}
    heads_shape = {"num_key_value_heads": kv_heads, "head_dim": head_dim, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(CONFIG | shape | heads_shape))
    (folder / "tokenizer.json").write_text("{}")
    sizes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    weights = {
        f"model.layers.{layer}.{name}.weight": torch.ones(size, dtype=torch.bfloat16)
        for layer in range(2)
        for name, size in sizes.items()
    }
    weights["model.embed_tokens.weight"] = torch.ones(97, hidden, dtype=torch.bfloat16)
    weights["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    save_file(weights, folder / "model.safetensors")
    return folder
