"""What two nodes must have in common before KV may pass between them. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
SCALE_BYTES = 4


def row_bytes(dtype: str, head_dim: int) -> int:
    """Bytes of one token's key or value in one head; an int8 one has a float32 scale behind it."""
    return head_dim * ELEMENT_BYTES[dtype] + (SCALE_BYTES if dtype == "int8" else 0)


@dataclass(frozen=True, slots=True)
class Layout:
    """What both sides of a hand-off must have in common."""

    model_fingerprint: str
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int

    def head_bytes(self, tokens: int) -> int:
        """Bytes of one head's keys and values in a unit of this many tokens."""
        return 2 * tokens * row_bytes(self.dtype, self.head_dim)

    def unit_bytes(self, tokens: int) -> int:
        return self.kv_heads * self.head_bytes(tokens)

    def prompt_bytes(self, tokens: int) -> int:
        """Bytes of a whole prompt's KV."""
        return self.layers * self.unit_bytes(tokens)


def difference(mine: Layout, theirs: Layout) -> str | None:
    """A sentence that says where two layouts differ and what to do, or None if they are equal."""
    parts = [
        f"{field.name} {getattr(theirs, field.name)!r} there and {getattr(mine, field.name)!r} here"
        for field in fields(Layout)
        if getattr(mine, field.name) != getattr(theirs, field.name)
    ]
    if not parts:
        return None
    return (
        "the nodes differ in "
        + ", ".join(parts)
        + "; start both with the same --model and --kv-dtype"
    )
