"""What the importer promises: the same weights, the same tokens, or a refusal by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from baton.errors import UnsupportedModel
from baton.model import TextCodec, load_spec
from baton.model.gguf_import import import_gguf
from tests.baton.model.conftest import CONFIG, add_quantised, quiet, tiny_weights, write_gguf


def imported(tmp_path: Path, gguf: Path) -> Path:
    folder = tmp_path / "imported"
    folder.mkdir()
    import_gguf(gguf, folder, quiet)
    return folder


def test_weights_survive_the_row_order_of_llama_cpp(tmp_path: Path) -> None:
    folder = imported(tmp_path, write_gguf(tmp_path / "tiny.gguf"))
    found = load_file(folder / "model.safetensors")
    wanted = tiny_weights()
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        np.testing.assert_array_equal(found[name], weight, err_msg=name)


def test_spec_of_an_import_is_that_of_the_original(tmp_path: Path) -> None:
    spec = load_spec(imported(tmp_path, write_gguf(tmp_path / "tiny.gguf")))
    assert (spec.layers, spec.query_heads, spec.kv_heads, spec.head_dim) == (2, 4, 2, 8)
    assert (spec.hidden_size, spec.intermediate_size, spec.vocabulary_size) == (32, 64, 260)
    assert (spec.rope_theta, spec.rms_norm_eps) == (CONFIG["rope_theta"], CONFIG["rms_norm_eps"])
    assert (spec.bos_token_id, spec.eos_token_ids) == (256, (257,))
    assert spec.tied_embeddings


def test_untied_head_is_kept(tmp_path: Path) -> None:
    head = np.ones((260, 32), np.float32)
    gguf = write_gguf(tmp_path / "t.gguf", lambda writer: writer.add_tensor("output.weight", head))
    folder = imported(tmp_path, gguf)
    assert not load_spec(folder).tied_embeddings
    np.testing.assert_array_equal(load_file(folder / "model.safetensors")["lm_head.weight"], head)


def test_control_tokens_are_skipped_and_user_defined_ones_are_text(tmp_path: Path) -> None:
    codec = TextCodec.load(imported(tmp_path, write_gguf(tmp_path / "tiny.gguf")))
    ids = codec.encode("he<tool></s>")
    assert ids == [259, 258, 257]
    assert codec.decode(ids) == "he<tool>"
    assert codec.encode_chat([("user", "he")]) == [258, 259, 257]


@pytest.mark.parametrize(("add_bos", "wanted"), [(True, [256, 259]), (False, [259])])
def test_bos_stands_before_text_only_where_the_file_says_so(
    tmp_path: Path, add_bos: bool, wanted: list[int]
) -> None:
    gguf = write_gguf(tmp_path / "tiny.gguf", add_bos=add_bos)
    codec = TextCodec.load(imported(tmp_path, gguf))
    assert codec.encode("he") == wanted
    assert codec.encode_chat([("user", "he")])[0] == 258


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.array([1, 1, 2, 8], np.float32)),
            "rope_freqs.weight",
        ),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(5, np.float32) * 2), "rope_freqs"),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(32, np.float32)), "attn_q.bias"),
        (lambda w: w.add_tensor("blk.2.attn_q.weight", np.ones((32, 32), np.float32)), "blk.2"),
        (lambda w: w.add_string("llama.rope.scaling.type", "yarn"), "yarn"),
        (lambda w: w.add_expert_count(8), "expert_count"),
        (lambda w: w.add_key_length(16), "16 dimensions"),
        (lambda w: add_quantised(w, "output.weight", GGMLQuantizationType.Q8_1), "Q8_1"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(
    tmp_path: Path, edit: Callable[[GGUFWriter], None], named: str
) -> None:
    gguf = write_gguf(tmp_path / "tiny.gguf", edit)
    with pytest.raises(UnsupportedModel, match=named):
        imported(tmp_path, gguf)


def test_other_architecture_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"'gemma2'; supported are 'llama', 'qwen2', .*moe'"):
        imported(tmp_path, write_gguf(tmp_path / "tiny.gguf", architecture="gemma2"))


def test_unknown_text_split_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"'tekken'.*supported are .*smollm"):
        imported(tmp_path, write_gguf(tmp_path / "tiny.gguf", pre="tekken"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 something else"])
def test_file_that_is_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.gguf").write_bytes(content)
    with pytest.raises(UnsupportedModel, match="no GGUF file"):
        imported(tmp_path, tmp_path / "other.gguf")


@pytest.mark.parametrize("kept", [6, 20, 300, 5000, 20000])
def test_file_that_was_cut_off_is_refused(tmp_path: Path, kept: int) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    assert kept < len(whole)
    (tmp_path / "part.gguf").write_bytes(whole[:kept])
    with pytest.raises(UnsupportedModel, match="cut off"):
        imported(tmp_path, tmp_path / "part.gguf")


def test_default_model_cuts_digits_off_before_anything_else(default_folder: Path) -> None:
    """As SmolLM2's own tokenizer.json; the GGUF loader of transformers leaves that step out."""
    tokenizer = Tokenizer.from_file(str(default_folder / "tokenizer.json"))
    assert tokenizer.encode("x1234").tokens == ["x", "1", "2", "3", "4"]
    assert tokenizer.encode("x  12").tokens == ["x", "ĠĠ", "1", "2"]
