"""Baton's engine alone: the runner that stands behind prefill and decode nodes."""

from __future__ import annotations

import argparse
import os
import time
from importlib.metadata import version
from pathlib import Path

import torch
from serving import prompt_ids, serve

from baton.model.spec import load_spec
from engine.memory import KvMemory
from engine.runner import Runner
from engine.segments import Segment

_BLOCK = 16
_CHUNK_TOKENS = 512


class Engine:
    def __init__(self, folder: Path, dtype: str) -> None:
        self._runner = Runner.load(
            folder, load_spec(folder), dtype, "cpu", _BLOCK, KvMemory(1536 << 20)
        )
        self._runner.warm_up()

    def prefill(self, tokens: int) -> None:
        """One prompt, to its first token."""
        self._prefill(prompt_ids(tokens), tuple(range(tokens // _BLOCK + 1)))

    def decode(self, batch: int, context: int, steps: int) -> float:
        """Steps of a whole batch, after prompts of this many tokens each."""
        each = (context + steps) // _BLOCK + 1
        tables = [tuple(range(row * each, (row + 1) * each)) for row in range(batch)]
        token_ids = [self._prefill(prompt_ids(context, row), tables[row]) for row in range(batch)]
        begun = time.perf_counter()
        for step in range(steps):
            rows = [
                Segment((token_id,), context + step, table, 1)
                for token_id, table in zip(token_ids, tables, strict=True)
            ]
            token_ids = [token_id for [token_id] in self._runner.step(rows)]
        return time.perf_counter() - begun

    def _prefill(self, prompt: list[int], table: tuple[int, ...]) -> int:
        for start in range(0, len(prompt), _CHUNK_TOKENS):
            part = tuple(prompt[start : start + _CHUNK_TOKENS])
            last = start + _CHUNK_TOKENS >= len(prompt)
            [chosen] = self._runner.step([Segment(part, start, table, int(last))])
        return chosen[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    torch.set_num_threads(options.threads)
    serve("baton", version("torch"), Engine(options.folder, options.dtype))
