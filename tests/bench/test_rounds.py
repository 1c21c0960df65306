"""Subjects are measured in turn, one at work; one that fails is told, and takes no other along."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.rounds import Running, Subject, SubjectFailed, measure

WORKER = """
import sys
from serving import serve

class Worker:
    def work(self, seconds):
        print("noise on stdout")
        return float(seconds)

    def fail(self):
        raise ValueError("not today")

serve(sys.argv[1], "1.0", Worker())
"""


def worker(name: str) -> Subject:
    code = f"import sys; sys.path.insert(0, '.'); {WORKER!r}; exec({WORKER!r})"
    return Subject(name, (sys.executable, "-c", code, name))


@contextmanager
def two(folder: Path) -> Iterator[list[Running]]:
    running = [Running(worker(name), folder / f"{name}.log") for name in ("first", "second")]
    try:
        yield running
    finally:
        for subject in running:
            subject.close()


def test_every_task_is_done_by_every_subject_in_every_round(tmp_path: Path) -> None:
    tasks = {"short": {"do": "work", "seconds": 0.5}, "long": {"do": "work", "seconds": 2.0}}
    with two(tmp_path) as running:
        found = measure(running, tasks, rounds=3)
        assert [subject.version for subject in running] == ["1.0", "1.0"]
    assert {(item.subject, item.task, item.seconds) for item in found} == {
        (subject, task, (seconds,) * 3)
        for subject in ("first", "second")
        for task, seconds in (("short", 0.5), ("long", 2.0))
    }
    assert all(item.peak_rss_mib > 1 for item in found)


def test_a_subject_that_fails_says_why_and_has_no_figure(tmp_path: Path) -> None:
    with two(tmp_path) as running:
        found = measure(running, {"bad": {"do": "fail"}}, rounds=2)
    assert [item.error for item in found] == ["ValueError: not today"] * 2
    assert all(math.isnan(item.median_s) for item in found)


def test_a_subject_stops_between_tasks(tmp_path: Path) -> None:
    with two(tmp_path) as running:
        running[0].perform({"do": "work", "seconds": 1.0})
        states = [
            Path(f"/proc/{subject._process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            for subject in running
        ]
    assert states == ["T", "T"]


def test_a_subject_that_cannot_start_is_named_with_its_last_words(tmp_path: Path) -> None:
    broken = Subject("broken", (sys.executable, "-c", "raise SystemExit('no such model')"))
    with pytest.raises(SubjectFailed, match=r"broken gave no answer: no such model"):
        Running(broken, tmp_path / "broken.log")
