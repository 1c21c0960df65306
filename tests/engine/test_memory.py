"""The cache's memory: what was asked for if it is there, or a share of what is free."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from baton.errors import ConfigError
from engine import memory
from engine.memory import KvMemory, free_bytes, kv_bytes

CPU = torch.device("cpu")
MIB = 1 << 20


def machine(root: Path, available_kib: int, limit: str | None = None, used: int = 0) -> Path:
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(
        f"MemTotal:       99999999 kB\nMemAvailable:   {available_kib} kB\n"
    )
    if limit is not None:
        (root / "sys/fs/cgroup").mkdir(parents=True)
        (root / "sys/fs/cgroup/memory.max").write_text(f"{limit}\n")
        (root / "sys/fs/cgroup/memory.current").write_text(f"{used}\n")
    return root


def test_free_memory_is_what_the_system_says_is_available(tmp_path: Path) -> None:
    assert free_bytes(CPU, machine(tmp_path, 3072)) == 3 * MIB


@pytest.mark.parametrize(
    ("limit", "used", "free"), [("max", 0, 8), (str(5 * MIB), 2 * MIB, 3), (str(MIB), 2 * MIB, 0)]
)
def test_a_control_group_has_no_more_than_its_limit(
    tmp_path: Path, limit: str, used: int, free: int
) -> None:
    assert free_bytes(CPU, machine(tmp_path, 8192, limit, used)) == free * MIB


def test_this_machine_has_some() -> None:
    assert free_bytes(CPU) > 0


@pytest.fixture
def thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1000 * MIB)


@pytest.mark.usefixtures("thousand")
@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        (KvMemory(300 * MIB), 300),
        (KvMemory(0, 200 * MIB), 800),
        (KvMemory(0, 200 * MIB, 0.25), 200),
    ],
)
def test_what_a_cache_may_have(wanted: KvMemory, given: int) -> None:
    assert kv_bytes(wanted, CPU) == given * MIB


@pytest.mark.usefixtures("thousand")
@pytest.mark.parametrize(
    ("wanted", "message"),
    [(KvMemory(1001 * MIB), "--kv-memory-mib asks"), (KvMemory(0, 1000 * MIB), "reserve")],
)
def test_what_is_not_there_is_refused_with_what_to_change(wanted: KvMemory, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kv_bytes(wanted, CPU)
