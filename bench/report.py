"""Sections of a Markdown report, each owned by one benchmark."""

from __future__ import annotations

from pathlib import Path


def write_section(file: Path, title: str, body: str) -> None:
    """Replace the section under `title` (a `## …` line), or add it at the end."""
    text = file.read_text("utf-8") if file.exists() else "# Benchmarks\n"
    before, found, rest = text.partition(f"{title}\n")
    if not found:
        before = text.rstrip() + "\n\n"
    _, following, after = rest.partition("\n## ")
    tail = f"\n## {after}" if following else ""
    file.write_text(f"{before}{title}\n\n{body.rstrip()}\n{tail}", "utf-8")
