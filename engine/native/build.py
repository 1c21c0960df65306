"""Kernels in C, compiled at first use by the system's compiler into the user's cache.

The library's name holds a hash of source, flags and compiler, and the processor is asked before
each load, so what does not fit this machine is never loaded; several processes that start at once
build it once (`make_once`).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
from pathlib import Path

import structlog
import torch

from baton.errors import ConfigError
from baton.model.cache import cache_folder, make_once

_SOURCES = [Path(__file__).with_name(name) for name in ("gemm.c", "attention.c")]
_FLAGS = ("-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-shared", "-fPIC")
_NEEDED = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_bf16"})
_BUILD_TIMEOUT_S = 120.0
_log = structlog.get_logger()


class NoKernels(Exception):
    """Why there are no native kernels here."""


def kernels_for(device: torch.device) -> ctypes.CDLL | None:
    """The kernels where they compute on this device: a CPU, of which torch uses one thread."""
    return library() if device.type == "cpu" and torch.get_num_threads() == 1 else None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None with one line in the log that says why torch computes instead."""
    try:
        return _load()
    except (NoKernels, ConfigError, OSError, subprocess.SubprocessError) as error:
        _log.warning("no native kernels: torch computes bfloat16", reason=str(error))
        return None


def _load() -> ctypes.CDLL:
    missing = _NEEDED - _processor_flags()
    if missing:
        raise NoKernels(f"the processor lacks {', '.join(sorted(missing))}")
    compiler = _compiler()
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, timeout=_BUILD_TIMEOUT_S
    ).stdout
    parts = (*(source.read_bytes() for source in _SOURCES), " ".join(_FLAGS).encode(), version)
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    target = cache_folder() / "native" / f"kernels-{key}.so"
    path = make_once(target, functools.partial(_build, compiler), _log.info, _BUILD_TIMEOUT_S)
    loaded = ctypes.CDLL(str(path))
    product = loaded.baton_linear_bf16
    product.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3
    product.restype = None
    attention = loaded.baton_attention_bf16
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    attention.argtypes = [
        *(pointer, number, pointer, pointer, pointer, pointer, number, pointer),
        *(number,) * 5,
        ctypes.c_float,
    ]
    attention.restype = ctypes.c_int
    return loaded


def _processor_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return next(
        (frozenset(line.split()) for line in lines if line.startswith("flags")), frozenset()
    )


def _compiler() -> str:
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return found
    raise NoKernels("there is no C compiler (cc, gcc or clang) on the PATH")


def _build(compiler: str, target: Path) -> None:
    done = subprocess.run(
        [compiler, *_FLAGS, "-o", str(target), *map(str, _SOURCES), "-lm"],
        capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S,
    )  # fmt: skip
    if done.returncode:
        raise NoKernels(f"{compiler} failed: {done.stderr.strip()[-500:]}")
