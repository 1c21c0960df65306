"""The one way of a request, for both doors: validate, admit, tokenise, place, stream, end.

    async with frontend.answer(ask, deadline_s) as answer:
        async for update in answer.updates():     # Tokens … Tokens, Completed, or a BatonError

Leaving the block ends the request on both nodes, whatever the reason. The life of each request is
decided by `RequestLife`; this shell performs its actions.

Kept true: a request counts against max_requests from its admission until its terminal status; it is
known by its ticket until both nodes have let go of it, and messages with any other ticket are
dropped and counted (P6).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence

import structlog

from baton.config import Config
from baton.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    DuplicateRequest,
    LinkLost,
    NodeStopping,
    Overloaded,
)
from baton.ids import Ticket, new_request_id, new_seed
from baton.model.spec import ModelSpec
from baton.model.text import TextCodec
from router import life_events as life
from router.answer import Answer, Completed, Tokens, Work
from router.cluster import Cluster
from router.commands import StartCommand, start_commands
from router.life_events import Leg
from router.placement import Placement, PlacementRequest
from router.validation import Ask, ChatTurn, check_ask, check_tokens, resolve_sampling, resolve_stop

log = structlog.get_logger()

INLINE_TEXT_CHARACTERS = 2000
"""Longer prompts are tokenised off the event loop, so that nobody's tokens wait for them."""

MAX_UPDATES_UNREAD = 4096
"""A client that leaves more updates than this unread loses its request, and nobody else does."""

MAX_TIMEOUT_S = 24 * 3600.0

RELEASE_TIMEOUT_S = 30.0
"""After its end a request is remembered this long for its nodes to say that they let go of it."""


class Frontend:
    """All requests in flight."""

    def __init__(
        self,
        config: Config,
        spec: ModelSpec,
        codec: TextCodec,
        cluster: Cluster,
    ) -> None:
        self.spec = spec
        self.codec = codec
        self.counters: Counter[str] = Counter()
        self._config = config
        self._cluster = cluster
        self._admitted: dict[str, Answer | None] = {}  # by request id; None until it is placed
        self._answers: dict[Ticket, Answer] = {}  # until both nodes have let go
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._loop = asyncio.get_running_loop()
        cluster.on_event = self._on_leg_event
        cluster.on_lost = self._on_node_lost

    @property
    def in_flight(self) -> int:
        """Requests that were admitted and have not had their terminal status."""
        return len(self._admitted)

    @contextlib.asynccontextmanager
    async def answer(self, ask: Ask, deadline_s: float | None) -> AsyncIterator[Answer]:
        """Admit a request and send it to its nodes. Raises the `BatonError` that refuses it."""
        answer = await self._begin(ask, deadline_s)
        try:
            yield answer
        finally:
            self.end(answer, Cancelled("the client went away"))

    def end(self, answer: Answer, error: BatonError) -> None:
        """End a request; one that has ended stays as it is."""
        self._handle(answer, life.End(error))

    def abort(self, request_id: str) -> bool:
        """End a request by its id; False if no such request is running."""
        answer = self._admitted.get(request_id)
        if answer is None:
            return False
        self.end(answer, Cancelled("the request was aborted"))
        return True

    def refuse_new(self) -> None:
        self._draining = True

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, let what runs end within the limit, then end the rest."""
        self.refuse_new()
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("requests cut off at the end of the drain", requests=self.in_flight)
            for answer in list(self._admitted.values()):
                if answer is not None:
                    self.end(answer, NodeStopping("the router is stopping; ask another one"))

    # --- from an ask to two legs ---

    async def _begin(self, ask: Ask, deadline_s: float | None) -> Answer:
        received_at = self._loop.time()
        timeout_s = self._config.request_timeout_s if deadline_s is None else deadline_s
        timeout_s = min(timeout_s, MAX_TIMEOUT_S)
        check_ask(ask, self.spec.name)
        sampling = resolve_sampling(ask, new_seed())
        request_id = ask.request_id or new_request_id()
        self._admit(request_id)
        try:
            async with asyncio.timeout(timeout_s):
                prompt = await self._tokenise(ask)
            check_tokens(prompt, self.spec)
            stop = resolve_stop(ask, len(prompt), self.spec, self._config.default_max_tokens)
            text = self.codec.stream()
            answer = Answer(request_id, prompt, sampling, stop, text, received_at, ask.cache_salt)
            answer.life.queued(self._loop.time())
            placement = self._cluster.place(PlacementRequest(len(prompt), stop.max_tokens))
            self._place(answer, placement, received_at, timeout_s)
        except TimeoutError as error:
            self._leave(request_id)
            raise _late(timeout_s) from error
        except BaseException:
            if (placed := self._admitted.get(request_id)) is not None:
                self.end(placed, Cancelled("the request was not sent"))
            self._leave(request_id)
            raise
        return answer

    def _admit(self, request_id: str) -> None:
        if self._draining:
            raise NodeStopping("the router is stopping; ask another one")
        if request_id in self._admitted:
            raise DuplicateRequest(f"the request {request_id} is in flight; use a new request_id")
        if self.in_flight >= self._config.max_requests:
            self.counters["refused"] += 1
            raise Overloaded(
                f"{self.in_flight} requests are in flight, the most this router takes; "
                "try again in a second"
            )
        self.counters["requests"] += 1
        self._admitted[request_id] = None
        self._idle.clear()

    def _leave(self, request_id: str) -> None:
        self._admitted.pop(request_id, None)
        if not self._admitted:
            self._idle.set()

    async def _tokenise(self, ask: Ask) -> tuple[int, ...]:
        prompt = ask.prompt
        assert prompt is not None, "check_ask refuses it"
        if isinstance(prompt, str):
            if len(prompt) <= INLINE_TEXT_CHARACTERS:
                return tuple(self.codec.encode(prompt))
            return tuple(await asyncio.to_thread(self.codec.encode, prompt))
        turns = [(turn.role, turn.content) for turn in prompt if isinstance(turn, ChatTurn)]
        if turns:
            if sum(len(content) for _, content in turns) <= INLINE_TEXT_CHARACTERS:
                return tuple(self.codec.encode_chat(turns))
            return tuple(await asyncio.to_thread(self.codec.encode_chat, turns))
        return tuple(token_id for token_id in prompt if isinstance(token_id, int))

    def _place(
        self, answer: Answer, placement: Placement, received_at: float, timeout_s: float
    ) -> None:
        prefill, decode = placement.prefill, placement.decode
        # An id may come again while a node still holds the last request of that name.
        used = [t.attempt for t in self._answers if t.request_id == answer.request_id]
        ticket = Ticket(answer.request_id, max(used, default=0) + 1, prefill.epoch, decode.epoch)
        answer.ticket = ticket
        self._admitted[answer.request_id] = answer
        self._answers[ticket] = answer
        deadline = received_at + timeout_s
        answer.set_timer(self._loop.call_at(deadline, self.end, answer, _late(timeout_s)))
        log.info(
            "placed",
            request_id=answer.request_id,
            prefill=prefill.node_id,
            decode=decode.node_id,
            prompt_tokens=len(answer.prompt),
        )
        now = self._loop.time()
        for action in answer.life.handle(life.Placed(), now):
            assert isinstance(action, life.StartLegs)
            commands = start_commands(
                ticket,
                answer.prompt,
                answer.sampling,
                answer.stop,
                placement,
                deadline - now,
                answer.cache_salt,
            )
            prompt_tokens = len(answer.prompt)
            decode_work = Work(decode.epoch, prompt_tokens + answer.stop.max_tokens)
            self._start_leg(answer, Leg.DECODE, commands[Leg.DECODE], decode_work)
            prefill_work = Work(prefill.epoch, prompt_tokens)
            self._start_leg(answer, Leg.PREFILL, commands[Leg.PREFILL], prefill_work)

    def _start_leg(self, answer: Answer, leg: Leg, command: StartCommand, work: Work) -> None:
        if answer.life.terminal:  # the other leg could not be sent
            self._handle(answer, life.LegLost(leg, LinkLost("the leg was not sent")))
            return
        try:
            self._cluster.start(work.epoch, command, work.tokens)
        except BatonError as error:
            self._handle(answer, life.LegLost(leg, error))
        else:
            answer.legs[leg] = work

    # --- from the nodes' events to updates ---

    def _on_leg_event(self, ticket: Ticket, event: life.Event) -> None:
        answer = self._answers.get(ticket)
        if answer is None:
            self.counters["stale_events"] += 1
            return
        try:
            self._handle(answer, event)
        except Exception as error:  # one request's trouble must not end its node's stream
            log.exception("request failed", request_id=answer.request_id)
            failure = BatonError(f"the router failed: {error!r}")
            self.end(answer, failure)
            if answer.request_id in self._admitted:  # it broke while its end was being told
                answer.put(failure)
                self._ended(answer, "failed_internal", failure.message)

    def _on_node_lost(self, epoch: int, leg: Leg, error: BatonError) -> None:
        for answer in list(self._answers.values()):
            if leg in answer.legs and answer.legs[leg].epoch == epoch:
                self._handle(answer, life.LegLost(leg, error))

    def _handle(self, answer: Answer, event: life.Event) -> None:
        if isinstance(event, life.LegReleased | life.LegLost):
            self._leg_over(answer, event.leg)
        self._perform(answer, answer.life.handle(event, self._loop.time()))

    def _perform(self, answer: Answer, actions: Sequence[life.Action]) -> None:
        for action in actions:
            match action:
                case life.Emit(index, token_ids):
                    self._emit(answer, index, token_ids)
                case life.Finish(reason):
                    count = answer.life.tokens_emitted
                    if rest := answer.text.flush():
                        answer.put(Tokens(count, (), rest))
                    seed = answer.sampling.seed
                    cached = answer.life.cached_tokens
                    answer.put(Completed(reason, len(answer.prompt), count, seed, cached))
                    self._ended(answer, "finished", reason)
                case life.Fail(error):
                    answer.put(error)
                    self._ended(answer, f"failed_{error.code.lower()}", error.message)
                case life.CancelLeg(leg, reason):
                    if leg in answer.legs and answer.ticket is not None:
                        self._cluster.cancel(answer.legs[leg].epoch, answer.ticket, reason)
                case life.Forget():
                    self._forget(answer)

    def _emit(self, answer: Answer, index: int, token_ids: tuple[int, ...]) -> None:
        self.counters["tokens"] += len(token_ids)
        answer.put(Tokens(index, token_ids, answer.text.push(token_ids)))
        if answer.unread > MAX_UPDATES_UNREAD:
            unread = f"the client left {answer.unread} updates unread; read faster or ask for less"
            self.end(answer, Overloaded(unread))

    def _ended(self, answer: Answer, outcome: str, why: str) -> None:
        """The client has its terminal status; the nodes have a while to let go."""
        self.counters[outcome] += 1
        overdue = life.ReleaseOverdue()
        answer.set_timer(self._loop.call_later(RELEASE_TIMEOUT_S, self._handle, answer, overdue))
        self._leave(answer.request_id)
        log.info("ended", request_id=answer.request_id, why=why, timing=answer.timing())

    def _leg_over(self, answer: Answer, leg: Leg) -> None:
        work = answer.legs.pop(leg, None)
        if work is not None:
            self._cluster.leg_over(work.epoch, work.tokens)

    def _forget(self, answer: Answer) -> None:
        answer.set_timer(None)
        for leg in list(answer.legs):
            self._leg_over(answer, leg)
        if answer.ticket is not None:
            self._answers.pop(answer.ticket, None)


def _late(timeout_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"the request did not end within {timeout_s:g} s; set a later deadline or ask for less"
    )
