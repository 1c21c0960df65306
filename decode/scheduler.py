"""What a decode node does next: continuous batching over paged blocks. Pure.

A leg is one ticket's stay on this node:

    Arrive ─▶ WAITING ─blocks─▶ RECEIVING ─Committed─▶ RUNNING ─last token─▶ (gone)
                 │                                 blocks │ ▲ blocks again
                 │                                run out ▼ │
                 │                                    PREEMPTED
                 └── Cancel, deadline, a failed hand-off: ENDING until no step and no link uses
                     the blocks ──────────────────────────────────────────▶ (gone)

A leg is taken in with blocks for its prompt, and grows by a block when it needs one. When none is
left, the leg that came last gives its blocks up; its KV is computed again, from what the prefix
cache still has of it, once it has blocks anew.

Kept true: whoever came first is never made to wait by who came later, but for hand-offs that have
begun, and those end; so the oldest leg always gets on, and then the next. Blocks are let go of
once, when no step is running on them and the hand-off has let go of them (P5, P7). Tokens leave in
the order of their index. A leg that goes ends with `Released`. After a step of several rows has
failed, each of them is tried alone, so that one leg's trouble ends no other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from baton.block_hash import BlockChain, BlockHash
from baton.errors import BatonError, DeadlineExceeded, Overloaded
from baton.ids import Ticket
from baton.leg_events import Cancel, CancelHandOff, Fail, Finish, Released, StepFailed
from baton.sampling import FinishReason, SamplingParams, StopParams
from decode.events import (
    Action,
    Arrive,
    Committed,
    Event,
    HandOffEnded,
    Reserve,
    Row,
    Step,
    StepDone,
    Token,
    Transferred,
)
from engine.block_pool import BlockPool, blocks_for


class LegState(Enum):
    WAITING = auto()
    RECEIVING = auto()
    RUNNING = auto()
    PREEMPTED = auto()
    ENDING = auto()


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step and the queue may hold at most."""

    max_running: int  # sequences in a step
    step_tokens: int  # tokens in a step, guesses not counted
    max_waiting: int
    watermark_blocks: int = 0  # kept free, when a leg is taken in beside others, for them to grow


@dataclass(slots=True)
class _Leg:
    arrival: int
    prompt_tokens: int
    token_ids: list[int]  # prompt and answer
    sampling: SamplingParams
    stop: StopParams
    deadline: float
    chain: BlockChain  # of the tokens, brought up to date when it is asked
    state: LegState = LegState.WAITING
    block_table: tuple[int, ...] = ()
    receiving: bool = False  # the hand-off may still write the blocks
    computed: int = 0  # of the tokens, whose KV is in the blocks
    alone: bool = False  # a step with it and others has failed

    @property
    def answered(self) -> int:
        """Tokens of the answer so far, prefill's first one included."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def kv_tokens(self) -> int:
        """Most tokens whose KV this leg keeps: the last token of an answer is never fed."""
        return self.prompt_tokens + self.stop.max_tokens - 1

    @property
    def pending(self) -> int:
        """Tokens that are known and not computed: one, but for a leg that was preempted."""
        return len(self.token_ids) - self.computed


class DecodeScheduler:
    """Decides over one pool of blocks; the caller runs at most one step at a time."""

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        limits: Limits,
        eos_token_ids: tuple[int, ...],
        max_guesses: int = 0,
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._limits = limits
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_guesses = max_guesses
        self._arrivals = 0
        self._legs: OrderedDict[Ticket, _Leg] = OrderedDict()  # in the order of their turns
        self._running: dict[Ticket, Row] = {}
        self.preemptions = 0
        self.recomputed_tokens = 0

    def handle(self, event: Event) -> list[Action]:
        """Take one event in. Events of legs that are gone change nothing (P6)."""
        match event:
            case Arrive():
                return self._arrive(event)
            case StepDone(token_ids):
                return self._step_done(token_ids)
            case StepFailed(error):
                return self._step_failed(error)
        leg = self._legs.get(event.ticket)
        if leg is None:
            return []
        match event:
            case Committed(ticket, first_token_id):
                actions = self._committed(ticket, leg, first_token_id)
            case HandOffEnded(ticket, error):
                actions = self._hand_off_ended(ticket, leg, error)
            case Cancel(ticket, error):
                actions = self._end(ticket, leg, error)
        return actions + self._admit()

    def next_step(self) -> Step:
        """The next step, empty when there is nothing to do.

        Every running leg gets one token, as far as the limits reach, and what is left of the budget
        goes to those that have more to compute, the oldest first. When there are more legs than fit
        in a step, those served go to the end, so all take turns.
        """
        assert not self._running, "one step at a time"
        turns = [(t, leg) for t, leg in self._legs.items() if leg.state is LegState.RUNNING]
        suspects = [turn for turn in turns if turn[1].alone]
        preempted: list[Ticket] = []
        for group in ([turn] for turn in suspects):
            if self._fill(group, preempted):
                break
        else:
            self._fill([turn for turn in turns if not turn[1].alone], preempted)
        return Step(tuple(self._running.values()), tuple(preempted))

    def _fill(self, turns: list[tuple[Ticket, _Leg]], preempted: list[Ticket]) -> bool:
        """Plan a step of these legs; whether there is anything in it."""
        budget = self._limits.step_tokens
        chosen = turns[: min(self._limits.max_running, budget)]
        if len(chosen) < len(turns):
            for ticket, _ in chosen:
                self._legs.move_to_end(ticket)
        budget -= len(chosen)
        for ticket, leg in sorted(chosen, key=lambda turn: turn[1].arrival):
            more = min(leg.pending - 1, budget)
            # A leg that was chosen may have lost its blocks to an older one by now.
            if leg.state is LegState.RUNNING and self._make_room(ticket, leg, 1 + more, preempted):
                budget -= more
                self._running[ticket] = self._row(ticket, leg, 1 + more)
        return bool(self._running)

    def tick(self, now: float) -> list[Action]:
        """End the legs whose deadline has passed (P1)."""
        actions: list[Action] = []
        for ticket, leg in list(self._legs.items()):
            if now >= leg.deadline and leg.state is not LegState.ENDING:
                error = DeadlineExceeded("the deadline passed on the decode node")
                actions += [Fail(ticket, error), *self._end(ticket, leg, error)]
        return actions + self._admit() if actions else []

    def tickets(self) -> list[Ticket]:
        return list(self._legs)

    def count(self, *states: LegState) -> int:
        return sum(leg.state in states for leg in self._legs.values())

    def check_invariants(self) -> None:
        self._pool.check_invariants()
        held = {block for leg in self._legs.values() for block in leg.block_table}
        assert self._pool.leased == len(held)
        assert self._running.keys() <= self._legs.keys()
        for ticket, leg in self._legs.items():
            assert leg.block_table == self._pool.owned(ticket)
            assert leg.receiving <= (leg.state in (LegState.RECEIVING, LegState.ENDING))
            assert (leg.state is LegState.RECEIVING) <= leg.receiving
            assert bool(leg.block_table) >= (leg.state in (LegState.RECEIVING, LegState.RUNNING))
            assert not leg.block_table or leg.state not in (LegState.WAITING, LegState.PREEMPTED)
            assert leg.computed <= len(leg.block_table) * self._block_size
            if leg.state in (LegState.RUNNING, LegState.PREEMPTED):
                assert 1 <= leg.answered < leg.stop.max_tokens
                assert leg.pending >= 1

    def _row(self, ticket: Ticket, leg: _Leg, tokens: int) -> Row:
        stop = leg.computed + tokens
        last = stop == len(leg.token_ids)
        room = min(len(leg.block_table) * self._block_size, leg.kv_tokens) - stop
        guesses = min(self._max_guesses, room) if last else 0
        return Row(
            ticket,
            tuple(leg.token_ids[leg.computed : stop]),
            leg.computed,
            leg.block_table,
            leg.sampling,
            last,
            guesses,
            tuple(leg.token_ids) if guesses else (),
        )

    # --- blocks ---

    def _make_room(self, ticket: Ticket, leg: _Leg, tokens: int, preempted: list[Ticket]) -> bool:
        """See to it that the leg has blocks for so many more tokens, at the cost of younger ones.

        Room for guesses is taken only where it is to spare.
        """
        stop = leg.computed + tokens
        held = len(leg.block_table)
        wanted = blocks_for(stop, self._block_size) - held
        while wanted > self._pool.free:
            running = [(t, v) for t, v in self._legs.items() if v.state is LegState.RUNNING]
            victim, youngest = max(running, key=lambda turn: turn[1].arrival)
            if youngest is leg:
                return False  # what is missing is with hand-offs or older legs
            self._preempt(victim, youngest)
            preempted.append(victim)
        guessed = min(stop + self._max_guesses, leg.kv_tokens)
        more = blocks_for(guessed, self._block_size) - held
        wanted = max(wanted, min(more, self._pool.free - self._limits.watermark_blocks))
        if wanted > 0:
            self._pool.extend(ticket, wanted)
            leg.block_table = self._pool.owned(ticket)
        return True

    def _preempt(self, ticket: Ticket, leg: _Leg) -> None:
        self._let_go(ticket, leg)
        leg.state = LegState.PREEMPTED
        self.preemptions += 1

    def _let_go(self, ticket: Ticket, leg: _Leg) -> None:
        """Give the blocks back; what is computed of them can be hit until it is evicted."""
        self._pool.publish(ticket, self._hashes(leg, leg.computed))
        self._pool.release(ticket)
        leg.block_table = ()
        leg.computed = 0

    def _hashes(self, leg: _Leg, tokens: int) -> list[BlockHash]:
        """The names of the full blocks of the leg's first tokens."""
        leg.chain.extend(leg.token_ids[leg.chain.tokens :])
        return leg.chain.hashes[: tokens // self._block_size]

    def _admit(self) -> list[Action]:
        """Lease blocks to legs that have none, in order of arrival, until one does not fit."""
        idle = (LegState.WAITING, LegState.PREEMPTED)
        waiting = [(t, leg) for t, leg in self._legs.items() if leg.state in idle]
        actions: list[Action] = []
        for ticket, leg in sorted(waiting, key=lambda turn: turn[1].arrival):
            # Room for the token after the prompt, or after what was computed before: it is fed.
            count = blocks_for(min(len(leg.token_ids) + 1, leg.kv_tokens), self._block_size)
            found: list[BlockHash] = []
            if leg.state is LegState.PREEMPTED:
                sought = self._hashes(leg, len(leg.token_ids) - 1)
                found = sought[: self._pool.match(sought)]
            spare = self._limits.watermark_blocks if self._pool.leased else 0
            if not self._pool.fits(count, found, spare):
                break
            leg.block_table = self._pool.lease(ticket, count, leg.deadline, found)
            if leg.state is LegState.PREEMPTED:
                leg.state = LegState.RUNNING
                leg.computed = len(found) * self._block_size
                self.recomputed_tokens += leg.pending - 1
            else:
                leg.state = LegState.RECEIVING
                leg.receiving = True
                actions.append(Reserve(ticket, leg.prompt_tokens, leg.block_table, leg.deadline))
        return actions

    # --- events ---

    def _arrive(self, event: Arrive) -> list[Action]:
        ticket = event.ticket
        if ticket in self._legs:
            return []  # a repeated command
        self._arrivals += 1
        leg = _Leg(
            self._arrivals,
            len(event.prompt),
            list(event.prompt),
            event.sampling,
            event.stop,
            event.deadline,
            BlockChain(self._block_size, event.cache_salt),
        )
        if blocks_for(leg.kv_tokens, self._block_size) > self._pool.total:
            error = Overloaded(
                f"prompt and max_tokens need {leg.kv_tokens} tokens of KV, more than this node's "
                f"{self._pool.total * self._block_size}; raise --kv-memory-mib or lower max_tokens"
            )
            return [Fail(ticket, error), Released(ticket)]
        self._legs[ticket] = leg
        actions = self._admit()
        if self.count(LegState.WAITING) > self._limits.max_waiting:
            del self._legs[ticket]
            error = Overloaded("the decode node's queue is full; try again later")
            return [*actions, Fail(ticket, error), Released(ticket)]
        return actions

    def _committed(self, ticket: Ticket, leg: _Leg, first_token_id: int) -> list[Action]:
        leg.receiving = False
        if leg.state is LegState.ENDING:
            return self._release_if_idle(ticket, leg)
        assert leg.state is LegState.RECEIVING
        leg.state = LegState.RUNNING
        leg.computed = leg.prompt_tokens
        leg.token_ids.append(first_token_id)
        actions: list[Action] = [Transferred(ticket, leg.prompt_tokens)]
        if leg.answered >= leg.stop.max_tokens:
            actions += [Finish(ticket, FinishReason.LENGTH), *self._end(ticket, leg, None)]
        return actions

    def _step_done(self, token_ids: Mapping[Ticket, tuple[int, ...]]) -> list[Action]:
        assert token_ids.keys() == self._running.keys(), "an entry for each row of the step"
        rows, self._running = self._running, {}
        actions: list[Action] = []
        for ticket, row in rows.items():
            leg = self._legs[ticket]
            chosen = token_ids[ticket]
            assert row.last == bool(chosen), "a row that reaches the end chooses a token"
            assert len(chosen) <= 1 + row.guesses
            if leg.state is LegState.ENDING:
                actions += self._release_if_idle(ticket, leg)
                continue
            leg.alone = False
            leg.computed += len(row.token_ids)
            for token_id in chosen:
                actions += self._take(ticket, leg, token_id)
                if ticket not in self._legs:  # it has ended
                    break
        return actions + self._admit()

    def _take(self, ticket: Ticket, leg: _Leg, token_id: int) -> list[Action]:
        """The answer's next token. Those behind it were guessed right: its KV is there already."""
        leg.computed = len(leg.token_ids)
        if token_id in self._eos_token_ids and not leg.stop.ignore_eos:
            return [Finish(ticket, FinishReason.STOP), *self._end(ticket, leg, None)]
        actions: list[Action] = [Token(ticket, leg.answered, token_id)]
        leg.token_ids.append(token_id)
        if leg.answered >= leg.stop.max_tokens:
            actions += [Finish(ticket, FinishReason.LENGTH), *self._end(ticket, leg, None)]
        return actions

    def _step_failed(self, error: BatonError) -> list[Action]:
        failed, self._running = list(self._running), {}
        actions: list[Action] = []
        for ticket in failed:
            leg = self._legs[ticket]
            if leg.state is LegState.ENDING:
                actions += self._release_if_idle(ticket, leg)
            elif len(failed) > 1:
                leg.alone = True
            else:
                actions += [Fail(ticket, error), *self._end(ticket, leg, error)]
        return actions + self._admit()

    def _hand_off_ended(self, ticket: Ticket, leg: _Leg, error: BatonError) -> list[Action]:
        leg.receiving = False
        actions: list[Action] = []
        if leg.state is not LegState.ENDING:
            leg.state = LegState.ENDING
            actions.append(Fail(ticket, error))
        return actions + self._release_if_idle(ticket, leg)

    def _end(self, ticket: Ticket, leg: _Leg, error: BatonError | None) -> list[Action]:
        if leg.state is not LegState.ENDING:
            leg.state = LegState.ENDING
            if leg.receiving:
                assert error is not None, "an answer does not end before its prompt is here"
                return [CancelHandOff(ticket, error)]
        return self._release_if_idle(ticket, leg)

    def _release_if_idle(self, ticket: Ticket, leg: _Leg) -> list[Action]:
        if leg.receiving or ticket in self._running:
            return []
        if leg.block_table:
            self._let_go(ticket, leg)
        del self._legs[ticket]
        return [Released(ticket)]
