"""What the tests of links and hand-offs share: a small model's shape, and a node's settings."""

from __future__ import annotations

import threading

import torch

from baton.config import Config
from baton.kv_layout import Layout
from baton.model.spec import ModelSpec
from engine.kv_cache import dtype_name
from kvtransfer.link import LinkSettings

CPU = torch.device("cpu")
HOST = "127.0.0.1"
PATIENCE_S = 10.0
"""Longest wait for anything that should happen; reaching it fails the test."""


def make_spec(layers: int = 3, kv_heads: int = 2, head_dim: int = 8) -> ModelSpec:
    return ModelSpec(
        name="small",
        architecture="llama",
        layers=layers,
        query_heads=kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=kv_heads * head_dim,
        intermediate_size=32,
        vocabulary_size=97,
        context_length=4096,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tied_embeddings=True,
        bos_token_id=1,
        eos_token_ids=(2,),
        fingerprint="sha256:small",
    )


def layout_of(spec: ModelSpec, dtype: torch.dtype) -> Layout:
    return Layout(spec.fingerprint, dtype_name(dtype), spec.layers, spec.kv_heads, spec.head_dim)


def make_settings(
    node_id: str, epoch: int, layout: Layout, block_size: int, config: Config
) -> LinkSettings:
    return LinkSettings(node_id, epoch, layout, block_size, HOST, config)


def link_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("link ")]
