"""A model's weights: read from safetensors, checked by shape, packed for the forward pass.

q, k and v are one matrix and gate and up another, so that each layer's input is multiplied twice
and not five times. Tensor names are those of Hugging Face's Llama.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from baton.errors import UnsupportedModel
from baton.model.folder import weight_files
from baton.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. A matrix is [outputs, inputs]."""

    input_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [(query_heads + 2 * kv_heads) * head_dim, hidden]
    output: torch.Tensor  # [hidden, query_heads * head_dim]
    post_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2 * intermediate, hidden]
    down: torch.Tensor  # [hidden, intermediate]


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All of a model. `head` is `embedding` where the model ties them."""

    embedding: torch.Tensor  # [vocabulary, hidden]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [hidden]
    head: torch.Tensor  # [vocabulary, hidden]


def load_weights(
    folder: Path, spec: ModelSpec, dtype: torch.dtype, device: torch.device
) -> ModelWeights:
    """Read every tensor the model needs. Raises `UnsupportedModel` naming one that is not right."""
    with _Reader(folder, dtype, device) as reader:
        hidden, head_dim = spec.hidden_size, spec.head_dim
        queries, keys = spec.query_heads * head_dim, spec.kv_heads * head_dim
        middle = spec.intermediate_size

        def layer(number: int) -> LayerWeights:
            prefix = f"model.layers.{number}."
            attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
            return LayerWeights(
                input_norm=reader.get(f"{prefix}input_layernorm.weight", hidden),
                qkv=reader.packed(
                    (f"{attention}q_proj.weight", queries, hidden),
                    (f"{attention}k_proj.weight", keys, hidden),
                    (f"{attention}v_proj.weight", keys, hidden),
                ),
                output=reader.get(f"{attention}o_proj.weight", hidden, queries),
                post_norm=reader.get(f"{prefix}post_attention_layernorm.weight", hidden),
                gate_up=reader.packed(
                    (f"{mlp}gate_proj.weight", middle, hidden),
                    (f"{mlp}up_proj.weight", middle, hidden),
                ),
                down=reader.get(f"{mlp}down_proj.weight", hidden, middle),
            )

        embedding = reader.get("model.embed_tokens.weight", spec.vocabulary_size, hidden)
        head = (
            embedding
            if spec.tied_embeddings
            else reader.get("lm_head.weight", spec.vocabulary_size, hidden)
        )
        return ModelWeights(
            embedding=embedding,
            layers=tuple(layer(number) for number in range(spec.layers)),
            norm=reader.get("model.norm.weight", hidden),
            head=head,
        )


class _Reader:
    """Every safetensors file of a folder, opened once, as one map of names to tensors."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._folder, self._dtype, self._device = folder, dtype, device

    def __enter__(self) -> _Reader:
        files = weight_files(self._folder)
        self._file_of = {}
        try:
            for path in files:
                file = safe_open(path, framework="pt", device="cpu")
                self._file_of.update(dict.fromkeys(file.keys(), file))
        except SafetensorError as error:
            raise UnsupportedModel(f"{path} cannot be read as safetensors: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file_of.clear()

    def get(self, name: str, *shape: int) -> torch.Tensor:
        return self._read(name, shape).to(self._device, self._dtype).contiguous()

    def packed(self, *parts: tuple[str, int, int]) -> torch.Tensor:
        """Matrices with the same inputs, one below the other."""
        return torch.cat([self.get(name, *shape) for name, *shape in parts])

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        file = self._file_of.get(name)
        if file is None:
            raise UnsupportedModel(f"{self._folder} lacks the tensor {name}, wanted as {shape}")
        tensor: torch.Tensor = file.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise UnsupportedModel(
                f"the tensor {name} is {tuple(tensor.shape)}, but config.json makes it {shape}"
            )
        if not tensor.is_floating_point():
            raise UnsupportedModel(f"the tensor {name} is {tensor.dtype}; weights must be floats")
        return tensor
