"""Subjects measured in turn: one process each, one at work while all others are stopped.

A round gives every subject the same task once, in an order that turns with each round, so that a
machine that slows down or speeds up does so for all. Reported are medians over the rounds.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUBJECTS = Path(__file__).parent / "subjects"
START_S = 600.0
TASK_S = 300.0

Task = Mapping[str, Any]


class SubjectFailed(Exception):
    """A subject could not start, or ended, or took too long; the message has its last words."""


@dataclass(frozen=True, slots=True)
class Subject:
    """How to start a subject."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


class Running:
    """A subject's process. Stopped (SIGSTOP) whenever it has no task."""

    def __init__(self, subject: Subject, log: Path) -> None:
        self.name = subject.name
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                subject.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=SUBJECTS,
                env={**os.environ, **subject.environment},
                start_new_session=True,
            )
        self.version = str(self._answer(START_S)["version"])
        self._stop()

    def perform(self, task: Task) -> dict[str, Any]:
        """Do one task; {"seconds", "peak_rss_mib"} or {"error"}."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._answer(TASK_S)
        self._stop()
        return answer

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(timeout_s) else b""
        if not line:
            words = self._log.read_text(errors="replace").splitlines()[-5:]
            self.close()
            raise SubjectFailed(f"{self.name} gave no answer: " + " / ".join(words))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _stop(self) -> None:
        """Stop the process, and return when it has stopped or ended."""
        self._signal(signal.SIGSTOP)
        if self._process.poll() is None:
            # WNOWAIT leaves the status of an ended process to Popen; that of a stop is taken.
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOHANG)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One task on one subject, over all rounds."""

    subject: str
    task: str
    seconds: tuple[float, ...]
    peak_rss_mib: float
    error: str = ""

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds) if self.seconds else float("nan")


def measure(
    running: Sequence[Running], tasks: Mapping[str, Task], rounds: int
) -> list[Measurement]:
    """Every task on every subject, in turn; the first time of each does not count."""
    seconds: dict[tuple[str, str], list[float]] = {}
    memory: dict[tuple[str, str], float] = {}
    errors: dict[tuple[str, str], str] = {}
    for name, task in tasks.items():
        for number in range(rounds + 1):
            turn = number % len(running)
            for subject in (*running[turn:], *running[:turn]):
                key = (subject.name, name)
                if key in errors:
                    continue
                answer = subject.perform(task)
                if "error" in answer:
                    errors[key] = answer["error"]
                    continue
                memory[key] = answer["peak_rss_mib"]
                if number:
                    seconds.setdefault(key, []).append(answer["seconds"])
    return [
        Measurement(
            subject.name,
            name,
            tuple(seconds.get((subject.name, name), ())),
            memory.get((subject.name, name), 0.0),
            errors.get((subject.name, name), ""),
        )
        for name in tasks
        for subject in running
    ]
