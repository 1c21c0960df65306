"""How much of the default model is left in fewer bits: its perplexity on a fixed text.

The text is `bench/data/prose.txt`, pages about this project as they once were; it does not change.
It is read in windows of 512 tokens, each begun anew; every token but a window's first is predicted.
Perplexity is the exponential of the mean negative log-likelihood, in nats, of those.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from baton.model.catalog import DEFAULT_MODEL, locate
from baton.model.spec import load_spec
from baton.model.text import TextCodec
from bench.report import write_section
from engine.block_pool import blocks_for
from engine.memory import KvMemory
from engine.runner import Runner
from engine.segments import Segment

TEXT = Path(__file__).parent / "data" / "prose.txt"
WINDOW = 512
BLOCK = 16
TITLE = "## Perplexity"


@dataclass(frozen=True, slots=True)
class Precision:
    """How weights and KV are held, and how much more than bfloat16's the perplexity may be."""

    name: str
    dtype: str
    quantize: str = "none"
    kv_dtype: str = ""
    goal: float | None = None


PRECISIONS = (
    Precision("bfloat16", "bfloat16"),
    Precision("float32", "float32"),
    Precision("int8 weights", "bfloat16", "int8", goal=0.01),
    Precision("int4 weights", "bfloat16", "int4", goal=0.06),
    Precision("int8 KV", "bfloat16", kv_dtype="int8"),
)


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    perplexity: float
    over_bfloat16: float
    goal: float | None


def run_perplexity(options: argparse.Namespace) -> int:
    """Measure and print; 0 whatever the figures are."""
    torch.set_num_threads(options.threads)
    report = run(lambda line: print(line, file=sys.stderr, flush=True))
    if options.report:
        write_section(Path(options.report), TITLE, as_section(report))
    print(json.dumps(report) if options.json else as_table(report))
    return 0


def run(progress: Callable[[str], None]) -> dict[str, Any]:
    """All precisions, one after another, as plain data."""
    folder = locate(DEFAULT_MODEL, progress)
    token_ids = TextCodec.load(folder).encode(TEXT.read_text("utf-8"))
    found: dict[str, float] = {}
    for precision in PRECISIONS:
        progress(f"reading in {precision.name}")
        runner = Runner.load(
            folder,
            load_spec(folder),
            precision.dtype,
            "cpu",
            BLOCK,
            KvMemory(blocks=blocks_for(WINDOW, BLOCK)),
            precision.kv_dtype,
            precision.quantize,
        )
        found[precision.name] = perplexity(runner, token_ids)
    base = found["bfloat16"]
    rows = [Row(p.name, found[p.name], found[p.name] / base - 1, p.goal) for p in PRECISIONS]
    return {"model": DEFAULT_MODEL, "tokens": len(token_ids), "rows": [asdict(row) for row in rows]}


@torch.inference_mode()
def perplexity(runner: Runner, token_ids: Sequence[int]) -> float:
    """Of a text, in windows; each is decoded behind half of its tokens, so KV is read back."""
    table = tuple(range(blocks_for(WINDOW, runner.cache.block_size)))
    total, predicted = 0.0, 0
    for begin in range(0, len(token_ids) - 1, WINDOW):
        window = tuple(token_ids[begin : begin + WINDOW])
        half = max(1, len(window) // 2)
        for start, part in ((0, window[:half]), (half, window[half:])):
            if not part:
                continue
            logits = runner.logits([Segment(part, start, table, len(part))])
            following = torch.tensor(window[start + 1 : start + 1 + len(part)])
            losses = torch.nn.functional.cross_entropy(
                logits[: len(following)], following, reduction="sum"
            )
            total += float(losses)
            predicted += len(following)
    return math.exp(total / predicted)


def as_table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    lines = ["| precision | perplexity | over bfloat16 | goal |", "|---" * 4 + "|"]
    for row in report["rows"]:
        goal = "" if row["goal"] is None else f"{row['goal']:.0%}"
        lines.append(
            f"| {row['name']} | {row['perplexity']:.3f} | {row['over_bfloat16']:+.2%} | {goal} |"
        )
    return "\n".join(lines)


def as_section(report: dict[str, Any]) -> str:
    return f"""`baton bench perplexity --report docs/benchmarks.md`

Of {report["model"]} on {report["tokens"]} tokens of `bench/data/prose.txt`, in windows of {WINDOW},
{WINDOW // 2} tokens a step: quantised weights go the way of many rows, which steps of few
sequences do not.

{as_table(report)}
"""
