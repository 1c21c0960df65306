"""One rank's part of a model under tensor parallelism. Pure: ranges and counts, no tensors.

Attention is cut by heads and the feed-forward network by its inner dimension (Megatron-LM, Shoeybi
et al. 2019), so that a layer needs one sum over the ranks after each of the two. Where there are
more ranks than KV heads, neighbouring ranks hold the same KV head. Norms, the experts' router, the
embedding and the head are whole on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from baton.errors import ConfigError
from baton.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `size`, counted from 0."""

    rank: int
    size: int

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, f"rank {self.rank} of {self.size}"

    @property
    def first(self) -> bool:
        """The rank that adds what must be added once, such as the bias of a summed output."""
        return self.rank == 0

    def part(self, total: int) -> range:
        """This rank's even share of `total` rows, columns or heads."""
        share = total // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def kv_part(self, kv_heads: int) -> range:
        """This rank's KV heads: an even share, or the one that it has in common with others."""
        if self.size <= kv_heads:
            return self.part(kv_heads)
        shared = self.rank * kv_heads // self.size
        return range(shared, shared + 1)


WHOLE = Shard(0, 1)


def check_divides(spec: ModelSpec, size: int) -> None:
    """Raise `ConfigError` with the sizes that would do where `size` ranks cannot share a model."""
    if not _divides(spec, size):
        possible = [other for other in range(1, spec.query_heads + 1) if _divides(spec, other)]
        raise ConfigError(
            f"{spec.name} cannot be split over {size} ranks: {spec.query_heads} query heads, "
            f"{spec.kv_heads} KV heads and {' and '.join(map(str, _inner_sizes(spec)))} inner "
            f"dimensions must divide evenly; use {' or '.join(map(str, possible))}"
        )


def rank_spec(spec: ModelSpec, shard: Shard) -> ModelSpec:
    """The spec with this rank's counts of heads and inner dimensions. Raises `ConfigError`."""
    check_divides(spec, shard.size)
    experts = spec.experts
    if experts is not None:
        inner = len(shard.part(experts.intermediate_size))
        experts = replace(experts, intermediate_size=inner)
    return replace(
        spec,
        query_heads=len(shard.part(spec.query_heads)),
        kv_heads=len(shard.kv_part(spec.kv_heads)),
        intermediate_size=len(shard.part(spec.intermediate_size)),
        experts=experts,
    )


def _divides(spec: ModelSpec, size: int) -> bool:
    heads = spec.query_heads % size == 0
    kv_heads = spec.kv_heads % size == 0 or size % spec.kv_heads == 0
    return heads and kv_heads and all(inner % size == 0 for inner in _inner_sizes(spec))


def _inner_sizes(spec: ModelSpec) -> list[int]:
    if spec.experts is None:
        return [spec.intermediate_size]
    dense = len(spec.experts.layers) < spec.layers
    return [spec.experts.intermediate_size] + [spec.intermediate_size] * dense
