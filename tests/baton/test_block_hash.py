"""A block's name stands for its tokens, all tokens before them, the block size and the salt."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.block_hash import HASH_BYTES, BlockChain

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=40)


@given(TOKENS, st.integers(1, 7), st.lists(st.integers(0, 12), max_size=6))
def test_a_chain_is_the_same_however_its_tokens_come(
    tokens: list[int], size: int, cuts: list[int]
) -> None:
    chain = BlockChain(size)
    begin = 0
    for cut in [*cuts, len(tokens)]:
        chain.extend(tokens[begin : begin + cut])
        begin += cut
    assert chain.hashes == BlockChain(size, "", tokens).hashes
    assert len(chain.hashes) == len(tokens) // size


@given(TOKENS, TOKENS, st.integers(1, 5))
def test_names_agree_as_far_as_the_tokens_do_and_no_further(
    one: list[int], other: list[int], size: int
) -> None:
    names = [BlockChain(size, "", tokens).hashes for tokens in (one, other)]
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    agreeing = [a == b for a, b in zip(*names, strict=False)]
    assert agreeing == [(number + 1) * size <= same for number in range(len(agreeing))]


def test_size_and_salt_are_part_of_every_name() -> None:
    chains = [(1, ""), (2, ""), (1, "a"), (1, "b")]
    names = {BlockChain(size, salt, [5, 5]).hashes[-1] for size, salt in chains}
    assert len(names) == len(chains)
    assert all(len(name) == HASH_BYTES for name in names)
