"""The manifest: what is about to be handed over, in msgpack, checked before a byte moves. Pure."""

from __future__ import annotations

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from baton.errors import IncompatiblePeer
from baton.kv_layout import Layout, difference
from kvtransfer.layout import MAX_UNIT_BYTES

MAX_MANIFEST_BYTES = 16 << 10
CHECKSUM = "xxh3_64"


class Manifest(BaseModel):
    """One prompt's KV: its layout, its length, and its longest unit (in tokens)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model_fingerprint: str = Field(max_length=128)
    dtype: str = Field(pattern="^(float32|bfloat16|int8)$")
    layers: int = Field(ge=1, le=4096)
    kv_heads: int = Field(ge=1, le=4096)
    head_dim: int = Field(ge=1, le=4096)
    prompt_tokens: int = Field(ge=1, le=1 << 24)
    unit_tokens: int = Field(ge=1, le=1 << 24)
    checksum: str = Field(pattern=f"^{CHECKSUM}$")

    @property
    def layout(self) -> Layout:
        return Layout(self.model_fingerprint, self.dtype, self.layers, self.kv_heads, self.head_dim)


def make_manifest(layout: Layout, prompt_tokens: int, unit_tokens: int) -> bytes:
    """The encoded manifest of one prompt."""
    manifest = Manifest(
        model_fingerprint=layout.model_fingerprint,
        dtype=layout.dtype,
        layers=layout.layers,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        prompt_tokens=prompt_tokens,
        unit_tokens=unit_tokens,
        checksum=CHECKSUM,
    )
    encoded: bytes = msgpack.packb(manifest.model_dump())
    return encoded


def read_manifest(encoded: bytes, mine: Layout) -> Manifest:
    """Decode and check a peer's manifest against our layout. Raises `IncompatiblePeer`."""
    if len(encoded) > MAX_MANIFEST_BYTES:
        raise IncompatiblePeer(
            f"the manifest has {len(encoded)} bytes, more than {MAX_MANIFEST_BYTES}"
        )
    try:
        content = msgpack.unpackb(
            encoded,
            strict_map_key=True,
            max_map_len=64,
            max_array_len=64,
            max_str_len=1024,
            max_bin_len=0,
            max_ext_len=0,
        )
        manifest = Manifest.model_validate(content)
    except (ValueError, msgpack.UnpackException, ValidationError, RecursionError) as error:
        raise IncompatiblePeer(f"the manifest cannot be read: {error}") from error
    if sentence := difference(mine, manifest.layout):
        raise IncompatiblePeer(sentence)
    if mine.unit_bytes(manifest.unit_tokens) > MAX_UNIT_BYTES:
        raise IncompatiblePeer(
            f"units of {manifest.unit_tokens} tokens exceed {MAX_UNIT_BYTES >> 20} MiB; "
            "lower --step-tokens on the prefill node"
        )
    return manifest
