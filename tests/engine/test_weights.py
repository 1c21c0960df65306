"""Loading weights: from one file or shards, and an error that names whatever is not right."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from baton.errors import UnsupportedModel
from baton.model.spec import load_spec
from engine.weights import ModelWeights, load_weights
from tests.engine.tiny import CPU, Weights, tiny_weights, write_folder

QUERY = "model.layers.1.self_attn.q_proj.weight"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> ModelWeights:
    return load_weights(folder, load_spec(folder), dtype, CPU)


def tensors(weights: ModelWeights) -> list[torch.Tensor]:
    found = [weights.embedding, weights.norm, weights.head]
    for layer in weights.layers:
        parts = [getattr(layer, field.name) for field in fields(layer)]
        found += [part for part in parts if part is not None]
    return found


def test_shards_give_the_same_weights_as_one_file(tmp_path: Path) -> None:
    one = load(write_folder(tmp_path / "one", tiny_weights(tied=False)))
    three = load(write_folder(tmp_path / "three", tiny_weights(tied=False), shards=3))
    for left, right in zip(tensors(one), tensors(three), strict=True):
        assert torch.equal(left, right)


def test_packed_matrices_stand_in_order(tiny_folder: Path) -> None:
    source, layer = tiny_weights(), load(tiny_folder).layers[2]
    attention, mlp = "model.layers.2.self_attn", "model.layers.2.mlp"
    parts = [source[f"{attention}.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(layer.qkv, torch.cat(parts))
    parts = [source[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(layer.gate_up, torch.cat(parts))


def test_a_tied_head_is_the_embedding_and_takes_no_memory(tiny_folder: Path) -> None:
    weights = load(tiny_folder)
    assert weights.head is weights.embedding


def test_weights_are_contiguous_and_of_the_dtype_asked_for(tiny_folder: Path) -> None:
    for tensor in tensors(load(tiny_folder, torch.bfloat16)):
        assert tensor.dtype == torch.bfloat16
        assert tensor.is_contiguous()


def test_tensors_that_the_model_does_not_need_are_ignored(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)}
    load(write_folder(tmp_path / "model", tiny_weights() | extra))


def altered(**change: torch.Tensor | None) -> Weights:
    weights = tiny_weights()
    del weights[QUERY]
    tensor = change["query"]
    return weights if tensor is None else weights | {QUERY: tensor}


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (None, r"lacks the tensor model\.layers\.1\.self_attn\.q_proj.* wanted as \(48, 40\)"),
        (torch.rand(40, 48), r"q_proj\.weight is \(40, 48\), but config\.json makes it \(48, 40\)"),
        (torch.ones(48, 40, dtype=torch.int8), r"q_proj\.weight is I8; weights must be"),
    ],
    ids=["missing", "transposed", "integers"],
)
def test_a_tensor_that_is_not_right_is_named(
    tmp_path: Path, query: torch.Tensor | None, message: str
) -> None:
    folder = write_folder(tmp_path / "model", altered(query=query))
    with pytest.raises(UnsupportedModel, match=message):
        load(folder)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", tiny_weights())
    spec = load_spec(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match=f"{folder}.*safetensors"):
        load_weights(folder, spec, torch.float32, CPU)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", tiny_weights())
    spec = load_spec(folder)
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(UnsupportedModel, match=r"model\.safetensors cannot be read"):
        load_weights(folder, spec, torch.float32, CPU)


def test_a_file_that_was_cut_off_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", tiny_weights())
    spec = load_spec(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UnsupportedModel, match=r"model\.safetensors is cut off before its last"):
        load_weights(folder, spec, torch.float32, CPU)


@pytest.mark.parametrize("stored", [torch.float16, torch.float64, torch.bfloat16])
def test_stored_numbers_become_the_dtype_asked_for(tmp_path: Path, stored: torch.dtype) -> None:
    source = {name: weight.to(stored) for name, weight in tiny_weights().items()}
    weights = load(write_folder(tmp_path / "model", source))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(weights.layers[1].down, source[name].float())


def test_rows_are_read_in_pieces_where_a_matrix_is_large(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is not stored as it is wanted goes through a scratch of this many bytes."""
    exact = load(tiny_folder)
    for piece_bytes in (1, 1000):  # less than a row, and some rows at a time
        monkeypatch.setattr("engine.weight_stream.PIECE_BYTES", piece_bytes)
        rounded = load(tiny_folder, torch.bfloat16)
        for left, right in zip(tensors(rounded), tensors(exact), strict=True):
            assert torch.equal(left, right.bfloat16())
