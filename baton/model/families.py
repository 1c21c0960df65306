"""The model families that Baton computes, in one table of what sets each apart.

All of them are one decoder: RMSNorm, grouped-query attention with rotary positions, SwiGLU. A row
of `FAMILIES` says what a `model_type` adds to it and which of its config's fields count; a field
that no row mentions is read alike for all (see `spec`). Defaults are those that transformers takes
where a config leaves a field out. To add a family that needs no new arithmetic, add a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from baton.errors import UnsupportedModel
from baton.model.folder import CONFIG_FILE


class Biases(Enum):
    """Which of a layer's attention projections add a bias."""

    NONE = auto()
    QUERY_KEY_VALUE = auto()
    AS_CONFIGURED = auto()
    """All four, where `attention_bias` is true."""


class WindowedLayers(Enum):
    """Which layers see only the last `sliding_window` tokens, where the config gives a window."""

    NONE = auto()
    ALL = auto()
    UPPER = auto()
    """From `max_window_layers` on, or those that `layer_types` names."""
    WITHOUT_ROPE = auto()
    """Those without rotary positions, or those that `layer_types` names."""


@dataclass(frozen=True, slots=True)
class Family:
    """What one `model_type` adds to the common decoder."""

    biases: Biases = Biases.AS_CONFIGURED
    qk_norm: bool = False
    """An RMSNorm over each query and key head, before it is rotated."""
    windows: WindowedLayers = WindowedLayers.NONE
    window_switch: bool = False
    """The window counts only where `use_sliding_window` is true."""
    default_window: int | None = None
    skips_rope: bool = False
    """`no_rope_layers` marks layers without rotary positions with a 0."""
    experts: bool = False
    """Layers choose some of many feed-forward networks for each token."""
    rope_theta: float = 10_000.0
    head_dim: int | None = None
    """Where the config names none; else hidden_size / num_attention_heads."""
    tied_embeddings: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family(),  # Llama 2 and 3.x, SmolLM2
    "mistral": Family(biases=Biases.NONE, windows=WindowedLayers.ALL, default_window=4096),
    "qwen2": Family(
        biases=Biases.QUERY_KEY_VALUE,
        windows=WindowedLayers.UPPER,
        window_switch=True,
        default_window=4096,
    ),
    "qwen3": Family(
        qk_norm=True,
        windows=WindowedLayers.UPPER,
        window_switch=True,
        default_window=4096,
        head_dim=128,
    ),
    "qwen3_moe": Family(
        qk_norm=True,
        windows=WindowedLayers.ALL,
        window_switch=True,
        default_window=4096,
        experts=True,
    ),
    "smollm3": Family(
        windows=WindowedLayers.WITHOUT_ROPE,
        window_switch=True,
        skips_rope=True,
        rope_theta=2_000_000.0,
        tied_embeddings=True,
    ),
}


def family_of(config: Mapping[str, Any]) -> tuple[str, Family]:
    """The config's `model_type` and its row. Raises `UnsupportedModel` with the list of all."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnsupportedModel(
            f"{CONFIG_FILE}: model_type is {name!r}; supported are "
            + ", ".join(repr(known) for known in FAMILIES)
        )
    return name, FAMILIES[name]
