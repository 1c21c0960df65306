"""One request in flight, as the frontend keeps it and as its door reads it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from baton.errors import BatonError
from baton.ids import Ticket
from baton.model.text_stream import TextStream
from baton.sampling import FinishReason, SamplingParams, StopParams
from router.life_events import Leg
from router.request_life import RequestLife


@dataclass(frozen=True, slots=True)
class Tokens:
    """The next tokens of the answer and the text that they make certain."""

    index: int
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Completed:
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    seed: int
    cached_tokens: int


Update = Tokens | Completed


@dataclass(frozen=True, slots=True)
class Work:
    """A leg's place: the life of the node it is on, and its tokens of work there."""

    epoch: int
    tokens: int


class Answer:
    """A valid request and what has become of it.

    The ticket, the nodes, the text and the timers are kept here, because the life must not know
    them. Updates wait here for their reader; the frontend ends a request whose reader lets
    `unread` grow beyond its limit.
    """

    def __init__(
        self,
        request_id: str,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        stop: StopParams,
        text: TextStream,
        received_at: float,
        cache_salt: str = "",
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.sampling = sampling
        self.stop = stop
        self.text = text
        self.cache_salt = cache_salt
        self.life = RequestLife(received_at, stop.max_tokens)
        self.ticket: Ticket | None = None
        self.legs: dict[Leg, Work] = {}
        self.timer: asyncio.TimerHandle | None = None
        self._updates: asyncio.Queue[Update | BatonError] = asyncio.Queue()

    @property
    def unread(self) -> int:
        return self._updates.qsize()

    def timing(self) -> dict[str, float | list[str]]:
        """Seconds since the request was received at each step, and what was not as configured."""
        return self.life.timing()

    def put(self, update: Update | BatonError) -> None:
        """Queue the next update for the reader; an error is the last one."""
        self._updates.put_nowait(update)

    def set_timer(self, timer: asyncio.TimerHandle | None) -> None:
        """Replace the one timer of the request: first its deadline, then that of its release."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = timer

    async def updates(self) -> AsyncIterator[Update]:
        """The answer as it comes, up to `Completed`; raises the `BatonError` it ended with."""
        while True:
            update = await self._updates.get()
            if isinstance(update, BatonError):
                raise update
            yield update
            if isinstance(update, Completed):
                return
