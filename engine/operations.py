"""The tensor operations of a decoder layer as torch computes them: the reference everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, computed in float32 (Zhang, Sennrich 2019)."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight * (wide * scale).to(x.dtype)


def rotary_table(
    head_dim: int,
    positions: int,
    theta: float,
    device: torch.device,
    divisors: Sequence[float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for positions 0, 1, …: each float32 [positions, head_dim] (Su et al. 2021).

    The two halves of a head rotate together, so each angle stands twice, and in the first half the
    sine is negative: `rotate` then needs no sign of its own. `divisors`, one for each of the
    head_dim / 2 frequencies, slow them down (see `baton.model.rope`).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / theta**exponents  # [head_dim / 2]
    if divisors is not None:
        frequencies = frequencies / torch.tensor(divisors)
    angles = torch.arange(positions).float()[:, None] * frequencies[None, :]
    cosines, sines = angles.cos(), angles.sin()
    return (
        torch.cat((cosines, cosines), dim=-1).to(device),
        torch.cat((-sines, sines), dim=-1).to(device),
    )


def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotate [tokens, heads, head_dim] by [tokens, head_dim] of a `rotary_table`, of its dtype."""
    turned = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cosines[:, None, :], turned, sines[:, None, :])


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SiLU of the first half of the last dimension, times the second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def mixture(
    hidden: torch.Tensor,
    router: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    per_token: int,
    normalised: bool,
) -> torch.Tensor:
    """Give each token to the `per_token` experts that the router likes best; add what they say.

    hidden [tokens, hidden]; router [experts, hidden]; gate_up [experts, 2 * intermediate, hidden];
    down [experts, hidden, intermediate]. An expert's answer is weighed by its probability among
    all experts, or among the chosen where `normalised` (Qwen3MoeTopKRouter in transformers, in
    float32). Returns [tokens, hidden].
    """
    probabilities = F.linear(hidden, router).softmax(-1, dtype=torch.float32)
    weights, chosen = probabilities.topk(per_token, dim=-1)  # [tokens, per_token]
    if normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights.to(hidden.dtype)
    out = torch.zeros_like(hidden)
    for expert in sorted(set(chosen.flatten().tolist())):
        tokens, rank = torch.where(chosen == expert)
        inner = silu_mul(F.linear(hidden[tokens], gate_up[expert]))
        answer = F.linear(inner, down[expert]) * weights[tokens, rank, None]
        out.index_add_(0, tokens, answer)
    return out


def chunk_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Causal attention of one sequence's chunk over all of its tokens so far.

    queries [tokens, query_heads, head_dim]; keys and values [context, kv_heads, head_dim], the
    chunk's own tokens last; mask bool [tokens, context], or None where the chunk is all there is
    and each token sees all before it.
    Returns [tokens, query_heads * head_dim].
    """
    out = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    return out[0].transpose(0, 1).reshape(queries.shape[0], -1)


def batch_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Attention of a few new tokens of each sequence over that sequence's context.

    queries [rows, tokens, query_heads, head_dim]; keys and values [rows, context, kv_heads,
    head_dim], padded; mask bool [rows, tokens, context], False on padding. Returns [rows, tokens,
    query_heads * head_dim].
    """
    rows, tokens, query_heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    group = query_heads // kv_heads
    # The query heads that share a KV head become its rows, so that each key is read once for them.
    grouped = queries.view(rows, tokens, kv_heads, group, head_dim)
    grouped = grouped.permute(0, 2, 3, 1, 4).reshape(rows, kv_heads, group * tokens, head_dim)
    if tokens == 1:
        seen = mask[:, None]  # [rows, 1, 1, context]
    else:
        seen = mask[:, None].expand(-1, group, -1, -1).flatten(1, 2)[:, None]
    out = F.scaled_dot_product_attention(
        grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=seen
    )
    ordered = out.view(rows, kv_heads, group, tokens, head_dim).permute(0, 3, 1, 2, 4)
    return ordered.reshape(rows, tokens, query_heads * head_dim)
