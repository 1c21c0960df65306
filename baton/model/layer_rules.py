"""Which layers of a model differ from the rest: windowed ones, ones without rotary, with experts.

A config says so in lists with an entry for each layer, or by an interval; what comes out here are
the numbers of the layers, from 0 on. Everything raises `UnsupportedModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from baton.errors import UnsupportedModel
from baton.model.config_fields import count, numbers, switch, whole
from baton.model.families import Family, WindowedLayers
from baton.model.folder import CONFIG_FILE

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: feed-forward networks of which each token is given a few."""

    count: int
    per_token: int
    intermediate_size: int
    normalised: bool
    """The weights of a token's chosen experts are scaled to add up to 1."""
    layers: tuple[int, ...]
    """The layers that have experts; the others have one network for all tokens."""


def layers_without_rope(config: Mapping[str, Any], family: Family, layers: int) -> tuple[int, ...]:
    """Those with a 0 in `no_rope_layers`; without that list, each `no_rope_layer_interval`th."""
    if not family.skips_rope:
        return ()
    if config.get("no_rope_layers") is None:
        interval = count(config, "no_rope_layer_interval", default=4)
        return tuple(range(interval - 1, layers, interval))
    marks = numbers(config, "no_rope_layers")
    _one_for_each_layer("no_rope_layers", len(marks), layers)
    return tuple(layer for layer in range(layers) if not marks[layer])


def windowed_layers(
    config: Mapping[str, Any], family: Family, layers: int, without_rope: tuple[int, ...]
) -> tuple[int | None, tuple[int, ...]]:
    """The window in tokens and the layers that have it; None and () where it hides nothing."""
    window = _window(config, family)
    if window is None:
        return None, ()
    chosen: tuple[int, ...]
    match family.windows:
        case WindowedLayers.NONE:
            raise UnsupportedModel(
                f"{CONFIG_FILE}: sliding_window is {window}, which this model_type does not have; "
                "supported is null, or a window at least as long as the context"
            )
        case WindowedLayers.ALL:
            chosen = tuple(range(layers))
        case WindowedLayers.UPPER:
            lowest = whole(config, "max_window_layers", default=28)
            chosen = _by_layer_types(config, layers, tuple(range(lowest, layers)))
        case WindowedLayers.WITHOUT_ROPE:
            chosen = _by_layer_types(config, layers, without_rope)
    return (window, chosen) if chosen else (None, ())


def experts(config: Mapping[str, Any], family: Family, layers: int) -> Experts | None:
    """Every `decoder_sparse_step`th layer has experts, but not those in `mlp_only_layers`."""
    if not family.experts:
        return None
    step = count(config, "decoder_sparse_step", default=1)
    dense = numbers(config, "mlp_only_layers")
    chosen = tuple(layer for layer in range(step - 1, layers, step) if layer not in dense)
    if not chosen:
        return None
    name = "num_experts" if "num_experts" in config else "num_local_experts"
    found = Experts(
        count=count(config, name),
        per_token=count(config, "num_experts_per_tok"),
        intermediate_size=count(config, "moe_intermediate_size"),
        normalised=switch(config, "norm_topk_prob"),
        layers=chosen,
    )
    if found.per_token > found.count:
        raise UnsupportedModel(
            f"{CONFIG_FILE}: num_experts_per_tok is {found.per_token}, more than {found.count} "
            "experts"
        )
    return found


def _window(config: Mapping[str, Any], family: Family) -> int | None:
    """The window in tokens, or None where there is none or it is as long as the context."""
    if family.window_switch and not switch(config, "use_sliding_window"):
        return None
    found = config.get("sliding_window", family.default_window)
    if found is None:
        return None
    window = count({"sliding_window": found}, "sliding_window")
    return window if window < count(config, "max_position_embeddings") else None


def _by_layer_types(
    config: Mapping[str, Any], layers: int, otherwise: tuple[int, ...]
) -> tuple[int, ...]:
    """The layers that `layer_types` calls sliding, where the config has that list."""
    types = config.get("layer_types")
    if types is None:
        return otherwise
    if not isinstance(types, list) or not all(name in (_FULL, _SLIDING) for name in types):
        raise UnsupportedModel(
            f"{CONFIG_FILE}: layer_types is {types!r}; supported are {_FULL!r} and {_SLIDING!r}"
        )
    _one_for_each_layer("layer_types", len(types), layers)
    return tuple(layer for layer in range(layers) if types[layer] == _SLIDING)


def _one_for_each_layer(field: str, entries: int, layers: int) -> None:
    if entries < layers:
        raise UnsupportedModel(
            f"{CONFIG_FILE}: {field} has {entries} entries and must have one for each of the "
            f"{layers} layers"
        )
