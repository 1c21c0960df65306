"""A model's weights: laid out for the forward pass, and read straight into their places.

q, k and v are one matrix and gate and up another, so that each layer's input is multiplied twice
and not five times. Tensor names are those of Hugging Face's Llama, and of its Qwen3-MoE where a
layer has experts. A rank of a tensor-parallel group reads its own slice and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from baton.model.folder import weight_files
from baton.model.spec import ModelSpec
from engine.shard import WHOLE, Shard, rank_spec
from engine.weight_stream import Placement, fill

Kept = tuple[range, range]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. A matrix is [outputs, inputs]; heads and intermediate are this rank's."""

    input_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [(query_heads + 2 * kv_heads) * head_dim, hidden]
    output: torch.Tensor  # [hidden, query_heads * head_dim]
    post_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2 * intermediate, hidden]; with experts, [experts, …, …]
    down: torch.Tensor  # [hidden, intermediate]; with experts, [experts, …, …]
    qkv_bias: torch.Tensor | None = None  # [(query_heads + 2 * kv_heads) * head_dim]
    output_bias: torch.Tensor | None = None  # [hidden]; on the first rank only: it is added once
    query_norm: torch.Tensor | None = None  # [head_dim]
    key_norm: torch.Tensor | None = None  # [head_dim]
    router: torch.Tensor | None = None  # [experts, hidden], where the layer has experts


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All of a model. `head` is `embedding` where the model ties them.

    Who takes a layer out of the list owns it, and can let go of a matrix that it lays out anew.
    """

    embedding: torch.Tensor  # [vocabulary, hidden]
    layers: list[LayerWeights]
    norm: torch.Tensor  # [hidden]
    head: torch.Tensor  # [vocabulary, hidden]
    kept: Mapping[str, Kept] = field(default_factory=dict)
    """The rows and columns of each stored tensor that are here."""


def load_weights(
    folder: Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard = WHOLE,
) -> ModelWeights:
    """Read what `shard` needs of the model; `spec` is that of the whole model.

    Raises `UnsupportedModel` naming a tensor that is not right, `ConfigError` where the model
    cannot be split so.
    """
    files = weight_files(folder)
    plan = _Plan(spec, shard, dtype, device)
    embedding = plan.whole("model.embed_tokens.weight", spec.vocabulary_size, spec.hidden_size)
    weights = ModelWeights(
        embedding=embedding,
        layers=[plan.layer(number) for number in range(spec.layers)],
        norm=plan.whole("model.norm.weight", spec.hidden_size),
        head=embedding
        if spec.tied_embeddings
        else plan.whole("lm_head.weight", spec.vocabulary_size, spec.hidden_size),
        kept={part.name: (part.rows, part.columns) for part in plan.placements},
    )
    fill(folder, files, plan.placements)
    return weights


@dataclass(frozen=True, slots=True)
class _Part:
    """What a rank keeps of one stored tensor: a run of its rows, or of its columns, or all."""

    name: str
    shape: tuple[int, ...]
    rows: range | None = None
    columns: range | None = None

    def kept(self) -> tuple[range, range]:
        width = self.shape[1] if len(self.shape) == 2 else 1
        return self.rows or range(self.shape[0]), self.columns or range(width)


class _Plan:
    """Gives out memory that is not filled yet, and notes what must be read into it."""

    def __init__(
        self, spec: ModelSpec, shard: Shard, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.placements: list[Placement] = []
        self._spec, self._shard = spec, shard
        self._rank = rank_spec(spec, shard)
        self._dtype, self._device = dtype, device

    def whole(self, name: str, *shape: int) -> torch.Tensor:
        target = self._empty(*shape)
        self._place(target, _Part(name, shape))
        return target

    def layer(self, number: int) -> LayerWeights:
        spec, hidden = self._spec, self._spec.hidden_size
        prefix = f"model.layers.{number}."
        attention = f"{prefix}self_attn."
        queries = spec.query_heads * spec.head_dim
        output = self._empty(hidden, self._rank.query_heads * spec.head_dim)
        columns = _scaled(self._shard.part(spec.query_heads), spec.head_dim)
        self._place(output, _Part(f"{attention}o_proj.weight", (hidden, queries), columns=columns))
        router, gate_up, down = self._feed_forward(number, f"{prefix}mlp.")
        return LayerWeights(
            input_norm=self.whole(f"{prefix}input_layernorm.weight", hidden),
            qkv=self._query_key_value(attention, "weight", hidden),
            output=output,
            post_norm=self.whole(f"{prefix}post_attention_layernorm.weight", hidden),
            gate_up=gate_up,
            down=down,
            qkv_bias=self._query_key_value(attention, "bias") if spec.qkv_bias else None,
            output_bias=self.whole(f"{attention}o_proj.bias", hidden)
            if spec.output_bias and self._shard.first
            else None,
            query_norm=self.whole(f"{attention}q_norm.weight", spec.head_dim)
            if spec.qk_norm
            else None,
            key_norm=self.whole(f"{attention}k_norm.weight", spec.head_dim)
            if spec.qk_norm
            else None,
            router=router,
        )

    def _query_key_value(self, attention: str, kind: str, *inputs: int) -> torch.Tensor:
        """The three projections, one below the other: their weights, or their biases."""
        spec, shard = self._spec, self._shard
        kept = {
            "q": (spec.query_heads, shard.part(spec.query_heads)),
            "k": (spec.kv_heads, shard.kv_part(spec.kv_heads)),
            "v": (spec.kv_heads, shard.kv_part(spec.kv_heads)),
        }
        parts = [
            _Part(
                f"{attention}{letter}_proj.{kind}",
                (heads * spec.head_dim, *inputs),
                rows=_scaled(run, spec.head_dim),
            )
            for letter, (heads, run) in kept.items()
        ]
        heads = self._rank.query_heads + 2 * self._rank.kv_heads
        return self._stack(self._empty(heads * spec.head_dim, *inputs), parts)

    def _feed_forward(
        self, number: int, mlp: str
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """The router, gate and up, and down: of one network, or of every expert."""
        hidden, experts = self._spec.hidden_size, self._spec.experts_of(number)
        if experts is None:
            inner = self._spec.intermediate_size
            kept = len(self._shard.part(inner))
            gate_up, down = self._empty(2 * kept, hidden), self._empty(hidden, kept)
            self._network(mlp, inner, gate_up, down)
            return None, gate_up, down
        inner = experts.intermediate_size
        kept = len(self._shard.part(inner))
        gate_up = self._empty(experts.count, 2 * kept, hidden)
        down = self._empty(experts.count, hidden, kept)
        for expert in range(experts.count):
            self._network(f"{mlp}experts.{expert}.", inner, gate_up[expert], down[expert])
        return self.whole(f"{mlp}gate.weight", experts.count, hidden), gate_up, down

    def _network(self, prefix: str, inner: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        hidden, kept = self._spec.hidden_size, self._shard.part(inner)
        names = (f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight")
        self._stack(gate_up, [_Part(name, (inner, hidden), rows=kept) for name in names])
        self._place(down, _Part(f"{prefix}down_proj.weight", (hidden, inner), columns=kept))

    def _stack(self, target: torch.Tensor, parts: list[_Part]) -> torch.Tensor:
        """The parts one below the other, which fill the target."""
        below = 0
        for part in parts:
            rows, _ = part.kept()
            self._place(target[below : below + len(rows)], part)
            below += len(rows)
        assert below == len(target), f"{below} rows for {len(target)}"
        return target

    def _place(self, target: torch.Tensor, part: _Part) -> None:
        rows, columns = part.kept()
        view = target.view(len(rows), len(columns))
        self.placements.append(Placement(part.name, part.shape, rows, columns, view))

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)


def _scaled(run: range, by: int) -> range:
    """A run of heads as the run of their rows."""
    return range(run.start * by, run.stop * by)
