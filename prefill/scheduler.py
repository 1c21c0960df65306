"""What a prefill node computes next: chunks of several prompts, packed into steps. Pure.

A leg is one ticket's stay on this node:

    Arrive ─▶ WAITING ─blocks─▶ COMPUTING ─last chunk─▶ HANDING_OFF ─HandOffEnded─▶ (gone)
                 └── Cancel, deadline, a failed hand-off: ENDING until no step and no link uses
                     the blocks ─────────────────────────────────────────────────▶ (gone)

Who has the least slack is served first: slack is the time until a leg's first token is due, less
what computing it still takes. A leg that has waited for longer than the age limit goes before all
that have not, in order of arrival, so that none starves. A prompt begins with what the prefix cache
has of it, but for its last token, which is always computed: it chooses the first of the answer.

Kept true: a leg's blocks are leased from COMPUTING on, and let go of once, when no step is running
on them and the hand-off has let go of them (P5, P7). Nothing can be hit that is not computed. A leg
that goes always ends with `Released`. After a step of several chunks has failed, each of them is
tried alone, so that one leg's trouble ends no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from baton.block_hash import BlockHash, chain_of
from baton.errors import BatonError, Cancelled, DeadlineExceeded, Overloaded
from baton.ids import Ticket
from baton.leg_events import Cancel, CancelHandOff, Fail, Finish, Released, StepFailed
from baton.sampling import FinishReason, StopParams
from engine.block_pool import BlockPool, blocks_for
from prefill.events import (
    Action,
    Arrive,
    BeginHandOff,
    Chunk,
    EndHandOff,
    Event,
    HandOffEnded,
    StepDone,
    Token,
)

_RATE_SHARE = 0.2
"""How much the latest step counts in the estimate of seconds per token."""

_LEAST_SHARE = 4
"""A chunk in the middle of a prompt has at least this part, a quarter, of a step's tokens: each
costs a message and a checksum for every layer."""


class LegState(Enum):
    WAITING = auto()
    COMPUTING = auto()
    HANDING_OFF = auto()
    ENDING = auto()


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step and the queue may hold at most, and how long a leg may be passed over."""

    step_tokens: int
    max_waiting: int
    age_limit_s: float = 5.0


@dataclass(slots=True)
class _Leg:
    arrival: int
    arrived_at: float
    prompt_tokens: int
    hashes: list[BlockHash]  # of the prompt's full blocks
    stop: StopParams
    due: float
    deadline: float
    state: LegState = LegState.WAITING
    block_table: tuple[int, ...] = ()
    begun: bool = False  # a chunk of it has been planned
    cached_tokens: int = 0  # of the computed, found in the prefix cache
    computed: int = 0
    handing_off: bool = False  # the hand-off may still read the blocks
    alone: bool = False  # a step with it and others has failed

    @property
    def pending(self) -> int:
        return self.prompt_tokens - self.computed


class PrefillScheduler:
    """Decides over one pool of blocks; the caller runs at most one step at a time."""

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        limits: Limits,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._limits = limits
        self._eos_token_ids = frozenset(eos_token_ids)
        self._arrivals = 0
        self._legs: dict[Ticket, _Leg] = {}
        self._running: dict[Ticket, Chunk] = {}
        self._token_s = 0.0  # what a prompt token takes to compute, estimated
        self.cache_queries = 0
        """Prompt tokens that were looked for in the prefix cache."""
        self.cache_hits = 0
        """Those that were there."""

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event in. Events of legs that are gone change nothing (P6)."""
        match event:
            case Arrive():
                return self._arrive(event, now)
            case StepDone(token_ids, seconds):
                return self._step_done(token_ids, seconds) + self._admit(now)
            case StepFailed(error):
                return self._step_failed(error) + self._admit(now)
        leg = self._legs.get(event.ticket)
        if leg is None:
            return []
        match event:
            case Cancel():
                actions = self._end(event.ticket, leg, event.error)
            case HandOffEnded():
                actions = self._hand_off_ended(event.ticket, leg, event.error)
        return actions + self._admit(now)

    def next_step(self, now: float) -> list[Chunk]:
        """The chunks of the next step, empty when there is nothing to do.

        The step runs until its `StepDone` or `StepFailed`.
        """
        assert not self._running, "one step at a time"
        turns = self._in_order(LegState.COMPUTING, now)
        turns = [turn for turn in turns if turn[1].alone][:1] or turns
        budget = self._limits.step_tokens
        for ticket, leg in turns:
            tokens = min(leg.pending, budget)
            least = min(leg.pending, -(-self._limits.step_tokens // _LEAST_SHARE))
            if tokens < least:
                continue
            stop = leg.computed + tokens
            last = stop == leg.prompt_tokens
            self._running[ticket] = Chunk(
                ticket, leg.computed, stop, leg.block_table, not leg.begun, last
            )
            leg.begun = True
            budget -= tokens
            if budget == 0:
                break
        return list(self._running.values())

    def tick(self, now: float) -> list[Action]:
        """End the legs whose deadline has passed (P1)."""
        actions: list[Action] = []
        for ticket, leg in list(self._legs.items()):
            if now >= leg.deadline and leg.state is not LegState.ENDING:
                error = DeadlineExceeded("the deadline passed on the prefill node")
                actions += [Fail(ticket, error), *self._end(ticket, leg, error)]
        return actions + self._admit(now) if actions else []

    def tickets(self) -> list[Ticket]:
        return list(self._legs)

    def count(self, *states: LegState) -> int:
        return sum(leg.state in states for leg in self._legs.values())

    def check_invariants(self) -> None:
        self._pool.check_invariants()
        held = {block for leg in self._legs.values() for block in leg.block_table}
        assert self._pool.leased == len(held)
        for ticket, leg in self._legs.items():
            assert leg.block_table == self._pool.owned(ticket)
            assert leg.handing_off or leg.state in (LegState.WAITING, LegState.ENDING)
            assert (leg.state is LegState.WAITING) <= (not leg.block_table)
            assert leg.cached_tokens <= leg.computed <= leg.prompt_tokens
            assert (leg.state is LegState.COMPUTING) <= (leg.pending > 0)

    # --- who is next ---

    def _in_order(self, state: LegState, now: float) -> list[tuple[Ticket, _Leg]]:
        legs = [(ticket, leg) for ticket, leg in self._legs.items() if leg.state is state]
        return sorted(legs, key=lambda turn: self._urgency(turn[1], now))

    def _urgency(self, leg: _Leg, now: float) -> tuple[bool, float, int]:
        """What sorts legs: the smallest goes first."""
        aged = now - leg.arrived_at >= self._limits.age_limit_s
        slack = leg.due - leg.pending * self._token_s  # less now, which is the same for all
        return not aged, 0.0 if aged else slack, leg.arrival

    def _admit(self, now: float) -> list[Action]:
        """Lease blocks to waiting legs, the most urgent first, until one does not fit."""
        actions: list[Action] = []
        for ticket, leg in self._in_order(LegState.WAITING, now):
            count = blocks_for(leg.prompt_tokens, self._block_size)
            sought = leg.hashes[: (leg.prompt_tokens - 1) // self._block_size]
            found = sought[: self._pool.match(sought)]
            if not self._pool.fits(count, found):
                break
            leg.block_table = self._pool.lease(ticket, count, leg.deadline, found)
            leg.computed = leg.cached_tokens = len(found) * self._block_size
            leg.state = LegState.COMPUTING
            leg.handing_off = True
            self.cache_queries += leg.prompt_tokens
            self.cache_hits += leg.cached_tokens
            actions.append(BeginHandOff(ticket, leg.block_table, leg.cached_tokens))
        return actions

    # --- events ---

    def _arrive(self, event: Arrive, now: float) -> list[Action]:
        ticket, prompt_tokens = event.ticket, len(event.prompt)
        if ticket in self._legs:
            return []  # a repeated command
        if blocks_for(prompt_tokens, self._block_size) > self._pool.total:
            error = Overloaded(
                f"the prompt's {prompt_tokens} tokens exceed this node's KV cache of "
                f"{self._pool.total * self._block_size}; raise --kv-memory-mib"
            )
            return [Fail(ticket, error), Released(ticket)]
        self._arrivals += 1
        self._legs[ticket] = _Leg(
            self._arrivals,
            now,
            prompt_tokens,
            chain_of(self._block_size, event.cache_salt, event.prompt),
            event.stop,
            event.due,
            event.deadline,
        )
        actions = self._admit(now)
        if self.count(LegState.WAITING) <= self._limits.max_waiting:
            return actions
        if self._legs[ticket].state is LegState.WAITING:
            del self._legs[ticket]
            error = Overloaded("the prefill node's queue is full; try again later")
            actions += [Fail(ticket, error), Released(ticket)]
        return actions

    def _step_done(self, token_ids: Mapping[Ticket, int], seconds: float) -> list[Action]:
        chunks, self._running = self._running, {}
        assert token_ids.keys() == {ticket for ticket, chunk in chunks.items() if chunk.last}
        tokens = sum(chunk.stop - chunk.start for chunk in chunks.values())
        share = _RATE_SHARE if self._token_s else 1.0
        self._token_s += share * (seconds / tokens - self._token_s)
        actions: list[Action] = []
        for ticket, chunk in chunks.items():
            leg = self._legs[ticket]
            if leg.state is LegState.ENDING:
                actions += self._release_if_idle(ticket, leg)
                continue
            leg.alone = False
            leg.computed = chunk.stop
            self._pool.publish(ticket, leg.hashes[: leg.computed // self._block_size])
            if chunk.last:
                actions += self._computed(ticket, leg, token_ids[ticket])
        return actions

    def _computed(self, ticket: Ticket, leg: _Leg, token_id: int) -> list[Action]:
        leg.state = LegState.HANDING_OFF
        ended = Cancelled("the answer ended with its first token")
        if token_id in self._eos_token_ids and not leg.stop.ignore_eos:
            return [Finish(ticket, FinishReason.STOP), *self._end(ticket, leg, ended)]
        if leg.stop.max_tokens == 1:
            finish = Finish(ticket, FinishReason.LENGTH)
            return [Token(ticket, token_id), finish, *self._end(ticket, leg, ended)]
        return [Token(ticket, token_id), EndHandOff(ticket, token_id)]

    def _step_failed(self, error: BatonError) -> list[Action]:
        failed, self._running = list(self._running), {}
        actions: list[Action] = []
        for ticket in failed:
            leg = self._legs[ticket]
            if leg.state is LegState.ENDING:  # the router knows already why it ends
                actions += self._release_if_idle(ticket, leg)
            elif len(failed) > 1:
                leg.alone = True
            else:
                actions += [Fail(ticket, error), *self._end(ticket, leg, error)]
        return actions

    def _hand_off_ended(self, ticket: Ticket, leg: _Leg, error: BatonError | None) -> list[Action]:
        leg.handing_off = False
        actions: list[Action] = []
        if leg.state is not LegState.ENDING:
            leg.state = LegState.ENDING
            if error is not None:
                actions.append(Fail(ticket, error))
        return actions + self._release_if_idle(ticket, leg)

    def _end(self, ticket: Ticket, leg: _Leg, error: BatonError) -> list[Action]:
        if leg.state is LegState.ENDING:
            return self._release_if_idle(ticket, leg)
        leg.state = LegState.ENDING
        if leg.handing_off:
            return [CancelHandOff(ticket, error)]
        return self._release_if_idle(ticket, leg)

    def _release_if_idle(self, ticket: Ticket, leg: _Leg) -> list[Action]:
        if leg.handing_off or ticket in self._running:
            return []
        if leg.block_table:
            self._pool.release(ticket)
        del self._legs[ticket]
        return [Released(ticket)]
