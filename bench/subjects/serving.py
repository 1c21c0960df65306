"""What every subject's process shares: tasks come as JSON lines on stdin, results go to stdout.

A subject runs in an environment of its own, in which Baton is not installed, so this file and the
subjects import nothing of the project. A task is a dict with `do` (the name of a method) and its
arguments; the answer is {"seconds": …} or {"error": …}. The first line says who is there.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

_answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # whatever a library prints, from its import on, must not mix with the answers


def serve(name: str, version: str, subject: Any) -> None:
    """Answer tasks until stdin closes."""
    _answers.write(json.dumps({"ready": name, "version": version}) + "\n")
    for line in sys.stdin:
        task = json.loads(line)
        try:
            answer = {"seconds": perform(subject, task), "peak_rss_mib": peak_rss_mib()}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        _answers.write(json.dumps(answer) + "\n")


def perform(subject: Any, task: dict[str, Any]) -> float:
    """Seconds that a task took. A subject may time itself, by returning a float."""
    arguments = {key: value for key, value in task.items() if key != "do"}
    begun = time.perf_counter()
    own = getattr(subject, task["do"])(**arguments)
    return own if isinstance(own, float) else time.perf_counter() - begun


def peak_rss_mib() -> float:
    """Most memory this process has held, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def prompt_ids(tokens: int, row: int = 0) -> list[int]:
    """The prompt that every subject reads: ordinary token ids, another for each row."""
    return [100 + (7919 * (position + 1) * (row + 1)) % 40_000 for position in range(tokens)]
