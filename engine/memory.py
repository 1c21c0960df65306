"""How much memory a node's KV cache may have: what was asked for, or a share of what is free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from baton.errors import ConfigError


@dataclass(frozen=True, slots=True)
class KvMemory:
    """What a cache may have. `blocks`, where set, decides alone."""

    asked_bytes: int = 0  # 0: what is free, less the reserve, times the share
    reserve_bytes: int = 0
    share: float = 1.0
    blocks: int = 0


def kv_bytes(wanted: KvMemory, device: torch.device) -> int:
    """Bytes for the cache, once the weights are loaded. Raises `ConfigError` with what to change.

    The cache is given out whole at the start and never grows.
    """
    free = free_bytes(device)
    if wanted.asked_bytes:
        if wanted.asked_bytes > free:
            raise ConfigError(
                f"--kv-memory-mib asks for {wanted.asked_bytes >> 20} MiB and {free >> 20} MiB are "
                "free; lower it, or give 0 to take a share of what is free"
            )
        return wanted.asked_bytes
    room = int((free - wanted.reserve_bytes) * wanted.share)
    if room <= 0:
        raise ConfigError(
            f"{free >> 20} MiB are free and --memory-reserve-mib keeps {wanted.reserve_bytes >> 20}"
            " of them; free some, or lower the reserve"
        )
    return room


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Memory that can be had on a device now: of a CPU, within the limit of our control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = (root / "proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = root / "sys/fs/cgroup"
    limit, used = _number(group / "memory.max"), _number(group / "memory.current")
    return free if limit is None or used is None else max(0, min(free, limit - used))


def _number(file: Path) -> int | None:
    """The number in a control group's file; None where there is none, or no limit."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
