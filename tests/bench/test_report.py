"""A benchmark replaces its own section of a report and leaves the others alone."""

from __future__ import annotations

from pathlib import Path

from bench.report import write_section


def test_a_section_is_added_and_replaced_between_others(tmp_path: Path) -> None:
    file = tmp_path / "report.md"
    for title in ("## One", "## Two", "## Three"):
        write_section(file, title, f"about {title[3:]}\n\n### Details\n")
    whole = file.read_text()
    assert [line for line in whole.splitlines() if line.startswith("## ")] == [
        "## One",
        "## Two",
        "## Three",
    ]
    write_section(file, "## Two", "anew")
    text = file.read_text()
    assert "about Two" not in text
    assert text.index("about One") < text.index("## Two\n\nanew\n\n## Three") < len(text)
    write_section(file, "## Two", "about Two\n\n### Details\n")
    assert file.read_text() == whole
