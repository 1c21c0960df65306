"""Nodes, a model and a codec that the router's tests share."""

from __future__ import annotations

from collections.abc import Sequence

from baton.errors import InvalidRequest
from baton.kv_layout import Layout
from baton.model.spec import ModelSpec
from router.life_events import Leg
from router.membership import NodeInfo

SPEC = ModelSpec(
    name="letters",
    architecture="llama",
    layers=2,
    query_heads=4,
    kv_heads=2,
    head_dim=8,
    hidden_size=32,
    intermediate_size=64,
    vocabulary_size=256,
    context_length=64,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    tied_embeddings=True,
    bos_token_id=None,
    eos_token_ids=(0,),
    fingerprint="f1",
)
LAYOUT = Layout("f1", "float32", 2, 2, 8)


def node(
    node_id: str, role: Leg, epoch: int, layout: Layout = LAYOUT, blocks_total: int = 64
) -> NodeInfo:
    return NodeInfo(node_id, role, epoch, "127.0.0.1:1", layout, 16, blocks_total, 8)


class LettersStream:
    """Holds every text back by one token, as a real stream holds back half a character."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, ids: Sequence[int]) -> str:
        text = self._held + "".join(chr(i) for i in ids)
        self._held = text[-1:]
        return text[:-1]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class LettersCodec:
    """Token id = code point."""

    has_chat_template = True

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        for role, _ in messages:
            if role not in ("system", "user", "assistant"):
                raise InvalidRequest(f"the model's chat template refuses these messages: {role}")
        return self.encode("".join(f"{role[0]}:{content}" for role, content in messages))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids)

    def stream(self) -> LettersStream:
        return LettersStream()
