"""The report shows every subject's figures, and leaves alone what a person wrote below them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.engine import HAND_WRITTEN, write_report


def report(speed: float) -> dict[str, Any]:
    return {
        "machine": "a machine",
        "dtype": "bfloat16",
        "rounds": 3,
        "versions": {"baton": "1", "peer": "2"},
        "limits": {"read_gb_per_s": 20.0, "copy_gb_per_s": 10.0, "matmul_tflop_per_s": 0.2},
        "rows": [
            {
                "task": "decode 1",
                "tokens_per_s": {"baton": speed, "peer": 50.0},
                "best_peer": "peer",
                "ratio_to_best_peer": speed / 50.0,
                "goal": 1.0,
                "of_limit": 0.5,
                "bound": "bandwidth",
            }
        ],
        "measurements": [
            {"subject": name, "peak_rss_mib": 300.0} for name in ("baton", "peer", "peer")
        ],
    }


def test_the_table_has_each_subject_and_the_ratio(tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.md"
    write_report(file, report(25.0))
    assert "| decode 1 | 25 | 50 | peer | 0.50 | 1.0 | 50% of bandwidth |" in file.read_text()


def test_a_new_report_keeps_what_was_written_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.md"
    write_report(file, report(25.0))
    file.write_text(file.read_text() + f"\n{HAND_WRITTEN}\n\nThe weather.\n")
    for speed in (40.0, 60.0):
        write_report(file, report(speed))
        text = file.read_text()
        assert f"| decode 1 | {speed:.0f} |" in text
        assert text.count("The weather.") == text.count(HAND_WRITTEN) == 1
