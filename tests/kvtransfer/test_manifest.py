"""P4, P8: what does not fit is refused before a byte moves, whatever bytes a peer sends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import Code, IncompatiblePeer
from baton.kv_layout import Layout, difference
from baton.wire import layout_from_proto, layout_to_proto
from kvtransfer.layout import MAX_UNIT_BYTES
from kvtransfer.manifest import MAX_MANIFEST_BYTES, make_manifest, read_manifest

MINE = Layout("sha256:mine", "float32", 30, 3, 64)
GOOD = make_manifest(MINE, prompt_tokens=100, unit_tokens=32)
FIELDS: dict[str, Any] = msgpack.unpackb(GOOD)


def changed(**fields: Any) -> bytes:
    """The good manifest with some fields replaced or added."""
    return msgpack.packb({**FIELDS, **fields})


def refusal(encoded: bytes, mine: Layout = MINE) -> str:
    """The sentence with which a manifest is refused; any other exception fails the test."""
    with pytest.raises(IncompatiblePeer) as refused:
        read_manifest(encoded, mine)
    assert refused.value.code is Code.FAILED_PRECONDITION
    return refused.value.message


@given(
    st.builds(
        Layout,
        model_fingerprint=st.text(max_size=128),
        dtype=st.sampled_from(["float32", "bfloat16"]),
        layers=st.integers(1, 4096),
        kv_heads=st.integers(1, 64),
        head_dim=st.integers(1, 256),
    ),
    st.integers(1, 1 << 24),
    st.integers(1, 1 << 10),
)
def test_a_manifest_says_what_was_put_into_it(
    layout: Layout, prompt_tokens: int, unit_tokens: int
) -> None:
    encoded = make_manifest(layout, prompt_tokens, unit_tokens)
    assert len(encoded) <= MAX_MANIFEST_BYTES
    manifest = read_manifest(encoded, layout)
    assert manifest.layout == layout
    assert (manifest.prompt_tokens, manifest.unit_tokens) == (prompt_tokens, unit_tokens)
    assert manifest.checksum == "xxh3_64"


@pytest.mark.parametrize(
    ("field", "theirs"),
    [
        ("model_fingerprint", "sha256:theirs"),
        ("dtype", "bfloat16"),
        ("layers", 31),
        ("kv_heads", 4),
        ("head_dim", 128),
    ],
)
def test_another_layout_is_refused_with_both_values_and_the_remedy(
    field: str, theirs: str | int
) -> None:
    sentence = refusal(make_manifest(replace(MINE, **{field: theirs}), 100, 32))
    assert f"{field} {theirs!r} there and {getattr(MINE, field)!r} here" in sentence
    assert "start both with the same --model" in sentence
    others = {"model_fingerprint", "dtype", "layers", "kv_heads", "head_dim"} - {field}
    assert not [other for other in others if f"{other} " in sentence]


def test_every_difference_is_named_at_once() -> None:
    sentence = refusal(make_manifest(Layout("sha256:other", "bfloat16", 1, 2, 4), 100, 32))
    for field in ("model_fingerprint", "dtype", "layers", "kv_heads", "head_dim"):
        assert f"{field} " in sentence


def test_block_sizes_may_differ() -> None:
    assert not [name for name in FIELDS if "block" in name]
    theirs = layout_from_proto(layout_to_proto(MINE, block_size=16))
    assert difference(layout_from_proto(layout_to_proto(MINE, block_size=32)), theirs) is None


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_a_manifest_without_one_of_its_fields_is_refused_by_its_name(field: str) -> None:
    rest = {name: value for name, value in FIELDS.items() if name != field}
    assert field in refusal(msgpack.packb(rest))


@pytest.mark.parametrize("field", sorted(FIELDS))
@pytest.mark.parametrize("value", [None, True, -1, 0, 0.5, 32.0, "32", "", [], {}, 1 << 63])
def test_a_field_of_a_wrong_type_or_range_is_refused(field: str, value: Any) -> None:
    refusal(changed(**{field: value}))


def test_an_unknown_checksum_or_dtype_is_refused() -> None:
    assert "checksum" in refusal(changed(checksum="crc32"))
    assert "dtype" in refusal(changed(dtype="float8"))


def test_a_field_that_this_release_does_not_know_is_refused() -> None:
    assert "compression" in refusal(changed(compression="zstd"))


@pytest.mark.parametrize("content", [None, 1, "text", [], list(FIELDS.items()), {}, {1: 2}])
def test_what_is_no_manifest_at_all_is_refused(content: Any) -> None:
    assert "cannot be read" in refusal(msgpack.packb(content))


def test_a_manifest_too_large_is_refused_unread() -> None:
    sentence = refusal(b"\xff" * (MAX_MANIFEST_BYTES + 1))
    assert f"{MAX_MANIFEST_BYTES + 1} bytes" in sentence
    refusal(changed(model_fingerprint="x" * MAX_MANIFEST_BYTES))
    refusal(changed(model_fingerprint="x" * 129))


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_a_truncated_manifest_is_refused(length: int) -> None:
    refusal(GOOD[:length])


def test_bytes_after_a_manifest_are_refused() -> None:
    refusal(GOOD + b"\x00")
    refusal(GOOD + GOOD)


@pytest.mark.parametrize(
    "nested",
    [b"\x91" * MAX_MANIFEST_BYTES, b"\x81\xa1x" * 5000, b"\x91" * 900 + b"\xc0"],
    ids=["lists", "maps", "below the parser's own limit"],
)
def test_a_manifest_nested_deeply_is_refused(nested: bytes) -> None:
    refusal(nested)


@pytest.mark.parametrize(
    "claim",
    [
        b"\xdf\xff\xff\xff\xff",  # a map of 2^32 entries
        b"\xdd\xff\xff\xff\xff",  # a list
        b"\xdb\xff\xff\xff\xff",  # a text
        b"\xc6\xff\xff\xff\xff",  # bytes
        b"\xc9\xff\xff\xff\xff\x01",  # an extension
        b"\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"\xc1",  # never used
    ],
    ids=["map", "list", "text", "bytes", "extension", "timestamp", "reserved"],
)
def test_a_claim_that_the_bytes_do_not_keep_is_refused(claim: bytes) -> None:
    refusal(claim)
    refusal(b"\x81\xa6layers" + claim)


def test_units_too_long_for_the_staging_buffer_are_refused_with_the_option_to_lower() -> None:
    most = MAX_UNIT_BYTES // MINE.unit_bytes(1)
    assert read_manifest(changed(unit_tokens=most), MINE).unit_tokens == most
    for tokens in (most + 1, 1 << 24):
        sentence = refusal(changed(unit_tokens=tokens))
        assert f"{tokens} tokens" in sentence
        assert "--step-tokens" in sentence


@given(st.binary(max_size=512))
def test_random_bytes_are_refused_and_raise_nothing_else(encoded: bytes) -> None:
    refusal(encoded)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.sampled_from(sorted(FIELDS)), JSON)
def test_any_value_in_any_field_is_taken_or_refused_and_raises_nothing_else(
    field: str, value: Any
) -> None:
    try:
        manifest = read_manifest(changed(**{field: value}), MINE)
    except IncompatiblePeer:
        return
    assert manifest.layout == MINE
    assert type(getattr(manifest, field)) is type(value)
    assert getattr(manifest, field) == value


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_damaged_byte_raises_nothing_but_the_refusal(position: int, flip: int) -> None:
    damaged = bytearray(GOOD)
    damaged[position] ^= flip
    try:
        manifest = read_manifest(bytes(damaged), MINE)
    except IncompatiblePeer:
        return
    assert manifest.layout == MINE
