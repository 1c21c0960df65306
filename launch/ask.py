"""`baton ask`: one prompt through the router, streamed, and where its time went."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Table

from baton.client import AsyncClient, Completion, Options, Prompt, Timing
from baton.config import read_token
from baton.errors import ConfigError

_PHASES = (
    ("queue", "prefill_started", "to the start of the prompt"),
    ("prefill", "first_token", "to the first token"),
    ("transfer", "transfer_done", "to the last of the KV"),
    ("decode", "finished", "to the last token"),
)
"""What ends each phase of a request. Phases follow each other, so that they add up to the total;
most of the transfer lies inside the prefill phase, since layers go over while others compute."""
_BAR_WIDTH = 28


@dataclass(frozen=True, slots=True)
class Answer:
    token_ids: tuple[int, ...]
    text: str
    completion: Completion

    def as_json(self) -> str:
        """One line."""
        return json.dumps(
            {
                "request_id": self.completion.request_id,
                "token_ids": self.token_ids,
                "text": self.text,
                "finish_reason": self.completion.finish_reason,
                "prompt_tokens": self.completion.prompt_tokens,
                "completion_tokens": self.completion.completion_tokens,
                "seed": self.completion.seed,
                "timing": self.completion.timing,
            },
            ensure_ascii=False,
        )


def run_ask(options: argparse.Namespace) -> int:
    """Ask a running cluster; raises `BatonError` with the router's sentence when it fails."""
    prompt = read_prompt(options.prompt, options.file, plain=options.plain, stdin=sys.stdin)
    sampling = Options(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        timeout_s=options.timeout_s,
    )
    token = read_token(options.token_file)
    answer = asyncio.run(ask(options.router, token, prompt, sampling, sys.stdout))
    print_timing(answer.completion, Console(stderr=True))
    if options.json:
        print(answer.as_json(), flush=True)
    return 0


def read_prompt(argument: str | None, file: str | None, *, plain: bool, stdin: TextIO) -> Prompt:
    """The prompt from the argument, a file or stdin. Raises `ConfigError`."""
    if argument is not None and file is not None:
        raise ConfigError("give the prompt as an argument or with --file, not both")
    try:
        if file is not None:
            text = Path(file).read_text("utf-8")
        elif argument is None or argument == "-":
            if stdin.isatty():
                print("type the prompt and end it with Ctrl-D", file=sys.stderr, flush=True)
            text = stdin.read()
        else:
            text = argument
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the prompt cannot be read: {error}") from error
    return text if plain else [("user", text.strip("\n"))]


async def ask(
    router: str, token: str | None, prompt: Prompt, options: Options, out: TextIO
) -> Answer:
    """Send one prompt, write the answer's text to `out` as it comes, return the whole."""
    token_ids: list[int] = []
    text: list[str] = []
    async with AsyncClient(router, token) as client:
        async for update in client.generate(prompt, options):
            if isinstance(update, Completion):
                out.write("\n")
                return Answer(tuple(token_ids), "".join(text), update)
            token_ids.extend(update.token_ids)
            text.append(update.text)
            out.write(update.text)
            out.flush()
    raise AssertionError("a stream that does not fail ends with a Completion")


def phases(timing: Timing) -> list[tuple[str, float, str]]:
    """The phases that a request went through: name, seconds, explanation."""
    found: list[tuple[str, float, str]] = []
    begun_s = timing.get("queued", 0.0)
    for name, end, explanation in _PHASES:
        if (ended_s := timing.get(end)) is not None:
            found.append((name, ended_s - begun_s, explanation))
            begun_s = ended_s
    return found


def print_timing(completion: Completion, console: Console) -> None:
    """A bar for each phase, and the rates that they make."""
    found = phases(completion.timing)
    total_s = sum(seconds for _, seconds, _ in found)
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for name, seconds, explanation in found:
        bar = "█" * round(_BAR_WIDTH * seconds / total_s) if total_s else ""
        table.add_row(name, f"{seconds * 1000:.0f} ms", f"{bar:<{_BAR_WIDTH}}", explanation)
    table.add_row("total", f"{total_s * 1000:.0f} ms")
    console.print(table)
    console.print(_summary(completion), highlight=False)


def _summary(completion: Completion) -> str:
    summary = (
        f"{completion.prompt_tokens} prompt tokens, {completion.completion_tokens} answered, "
        f"ended by {completion.finish_reason}"
    )
    timing = completion.timing
    if completion.completion_tokens > 1 and "first_token" in timing and "finished" in timing:
        span_s = timing["finished"] - timing["first_token"]
        per_token_ms = span_s * 1000 / (completion.completion_tokens - 1)
        summary += f", {per_token_ms:.0f} ms a token"
    return summary
