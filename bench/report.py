"""Sections of a Markdown report, each owned by one benchmark."""

from __future__ import annotations

from pathlib import Path


def write_section(file: Path, title: str, body: str, keep_from: str = "") -> None:
    """Replace the section under `title` (a `## …` line), or add it at the end.

    What stood in it from `keep_from` on, where that is given and was there, stays below `body`.
    """
    text = file.read_text("utf-8") if file.exists() else "# Benchmarks\n"
    before, found, rest = text.partition(f"{title}\n")
    if not found:
        before = text.rstrip() + "\n\n"
    old, following, after = rest.partition("\n## ")
    if keep_from and keep_from in old:
        body = f"{body.rstrip()}\n\n{old[old.index(keep_from) :]}"
    tail = f"\n## {after}" if following else ""
    file.write_text(f"{before}{title}\n\n{body.rstrip()}\n{tail}", "utf-8")
