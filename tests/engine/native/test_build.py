"""Kernels are built once however many start, and their absence is said and survived."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from engine.linear import Linear
from engine.native import build

HAVE = build.library() is not None


@pytest.fixture
def fresh() -> Iterator[None]:
    """As in a new process: nothing is loaded yet."""
    build.library.cache_clear()
    yield
    build.library.cache_clear()


@pytest.mark.skipif(not HAVE, reason="needs a C compiler and a CPU with AVX512-BF16")
def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    code = "from engine.native.build import library; assert library() is not None"
    environ = os.environ | {"BATON_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environ) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert len(list((tmp_path / "native").glob("kernels-*.so"))) == 1


@pytest.mark.parametrize("lack", ["compiler", "instructions", "working compiler"])
def test_torch_computes_where_kernels_cannot_and_the_log_says_why(
    lack: str,
    fresh: None,
    one_thread: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path))
    flags = frozenset({"sse2"}) if lack == "instructions" else build._NEEDED
    monkeypatch.setattr(build, "_processor_flags", lambda: flags)
    if lack == "compiler":
        monkeypatch.setattr(build.shutil, "which", lambda name: None)
    elif lack == "working compiler":
        monkeypatch.setattr(build, "_compiler", lambda: "/bin/false")
    weight, x = torch.randn(6, 4).bfloat16(), torch.randn(3, 4).bfloat16()
    with capture_logs() as logs:
        for _ in range(2):
            got = Linear(weight)(x)
    torch.testing.assert_close(got.float(), x.float() @ weight.float().T, rtol=2e-2, atol=5e-2)
    assert [line["event"] for line in logs] == ["no native kernels: torch computes bfloat16"]
    assert logs[0]["reason"]
