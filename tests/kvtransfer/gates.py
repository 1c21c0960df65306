"""Points at which a test waits for a shell, and at which a link's thread waits for the test."""

from __future__ import annotations

import asyncio
import threading
from itertools import count
from typing import Any

from tests.kvtransfer.settings import PATIENCE_S


class Gate:
    """Holds a link's thread before its `turn`-th call of a method of `owner`, from 1."""

    def __init__(self, owner: object, name: str, turn: int = 1) -> None:
        self.reached = asyncio.Event()
        self.calls = 0
        self._open = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._turn = turn
        self._method = getattr(owner, name)
        setattr(owner, name, self._call)

    def open(self) -> None:
        self._open.set()

    def _call(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls == self._turn:
            self._loop.call_soon_threadsafe(self.reached.set)
            assert self._open.wait(PATIENCE_S), "the test never opened the gate"
        return self._method(*args)


def seen(owner: object, name: str, times: int = 1) -> asyncio.Event:
    """Set once a method of `owner`, which is called on the loop, has returned so many times."""
    event = asyncio.Event()
    calls = count(1)
    method = getattr(owner, name)

    def call(*args: Any) -> Any:
        result = method(*args)
        if next(calls) == times:
            event.set()
        return result

    setattr(owner, name, call)
    return event
