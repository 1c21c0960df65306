"""Many sequences over few blocks: each ends with the tokens it would have alone; none starves."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from zlib import crc32

import pytest

from baton.ids import Ticket
from baton.leg_events import Fail, Finish, Released
from baton.sampling import SamplingParams, StopParams
from decode.events import (
    Action,
    Arrive,
    Committed,
    Reserve,
    Row,
    StepDone,
    Token,
)
from decode.scheduler import DecodeScheduler, Limits
from decode.stepper import Stepper
from engine.block_pool import BlockPool
from engine.generate import generate
from engine.runner import Runner
from engine.segments import Segment
from tests.engine.tiny import poison, tiny_runner, tiny_weights, write_folder

BLOCK = 4
STEPS = 6000
GREEDY = SamplingParams()

Tokens = tuple[int, ...]


class Model(Protocol):
    def prefill(self, prompt: Tokens, blocks: Tokens, sampling: SamplingParams) -> int:
        """Compute a prompt's KV into these blocks; the token after it."""

    def decode(self, rows: Sequence[Row], known: Sequence[Tokens]) -> list[Tokens]:
        """The tokens chosen in each row; `known` are all tokens of its sequence."""

    def forget(self, tickets: Sequence[Ticket]) -> None:
        """These have lost their blocks."""


@dataclass(frozen=True)
class Request:
    prompt: Tokens
    max_tokens: int
    sampling: SamplingParams = GREEDY


@dataclass
class World:
    """A decode node's memory and links, beside its scheduler."""

    scheduler: DecodeScheduler
    model: Model
    draw: random.Random
    requests: dict[Ticket, Request] = field(default_factory=dict)
    answers: dict[Ticket, list[int]] = field(default_factory=dict)
    receiving: dict[Ticket, Tokens] = field(default_factory=dict)
    released: list[Ticket] = field(default_factory=list)

    def run(self, requests: Sequence[Request], arrival: float, commit: float) -> None:
        """Let the requests come and go at random until all have ended."""
        waiting = [(Ticket(f"r{n}", 0, 1, 2), request) for n, request in enumerate(requests)]
        for _ in range(STEPS):
            self.scheduler.check_invariants()
            if waiting and self.draw.random() < arrival:
                self.arrive(*waiting.pop())
            if self.receiving and self.draw.random() < commit:
                self.commit(self.draw.choice(sorted(self.receiving, key=str)))
            self.step()
            if not waiting and not self.scheduler.tickets():
                return
        raise AssertionError("somebody starves")

    def arrive(self, ticket: Ticket, request: Request) -> None:
        self.requests[ticket] = request
        stop = StopParams(request.max_tokens, ignore_eos=True)
        event = Arrive(ticket, request.prompt, request.sampling, stop, float("inf"))
        self.perform(self.scheduler.handle(event))

    def commit(self, ticket: Ticket) -> None:
        request = self.requests[ticket]
        blocks = self.receiving.pop(ticket)
        first = self.model.prefill(request.prompt, blocks, request.sampling)
        self.answers[ticket] = [first]
        self.perform(self.scheduler.handle(Committed(ticket, first)))

    def step(self) -> None:
        step = self.scheduler.next_step()
        rows = step.rows
        self.model.forget(step.preempted)
        if not rows:
            return
        known = [(*self.requests[row.ticket].prompt, *self.answers[row.ticket]) for row in rows]
        for row, token_ids in zip(rows, known, strict=True):
            assert token_ids[row.start : row.start + len(row.token_ids)] == row.token_ids
        chosen = self.model.decode(rows, known)
        done = {row.ticket: tokens for row, tokens in zip(rows, chosen, strict=True)}
        self.perform(self.scheduler.handle(StepDone(done)))

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Reserve(ticket, _, blocks):
                    self.receiving[ticket] = blocks
                case Token(ticket, index, token_id):
                    assert index == len(self.answers[ticket])
                    self.answers[ticket].append(token_id)
                case Released(ticket):
                    self.released.append(ticket)
                    self.model.forget([ticket])
                case Fail(_, error):
                    raise AssertionError(f"nothing fails here: {error}")
                case Finish():
                    pass


class Hashes:
    """A model that is no model: the KV of a token is the sequence up to it.

    The token that follows is a hash of all that attention would read: one wrong block, and the
    answer is another. Some guesses are right.
    """

    vocabulary = 3  # few, so that sequences share prefixes

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.memory: dict[tuple[int, int], Tokens] = {}

    def prefill(self, prompt: Tokens, blocks: Tokens, sampling: SamplingParams) -> int:
        self.write(blocks, prompt, 0, len(prompt))
        return self.next_token(blocks, len(prompt))

    def decode(self, rows: Sequence[Row], known: Sequence[Tokens]) -> list[Tokens]:
        return [self.one(row, list(tokens)) for row, tokens in zip(rows, known, strict=True)]

    def forget(self, tickets: Sequence[Ticket]) -> None:
        pass

    def one(self, row: Row, known: list[int]) -> Tokens:
        self.write(row.block_table, tuple(known), row.start, row.start + len(row.token_ids))
        chosen: list[int] = []
        while row.last:
            chosen.append(self.next_token(row.block_table, len(known)))
            if len(chosen) > row.guesses or self.draw.random() < 0.5:
                break
            known.append(chosen[-1])
            self.write(row.block_table, tuple(known), len(known) - 1, len(known))
        return tuple(chosen)

    def write(self, blocks: Tokens, tokens: Tokens, start: int, stop: int) -> None:
        for place in range(start, stop):
            self.memory[blocks[place // BLOCK], place % BLOCK] = tokens[: place + 1]

    def next_token(self, blocks: Tokens, length: int) -> int:
        kv = [self.memory[blocks[place // BLOCK], place % BLOCK] for place in range(length)]
        return crc32(repr(kv).encode()) % self.vocabulary

    def alone(self, request: Request) -> list[int]:
        token_ids = list(request.prompt)
        for _ in range(request.max_tokens):
            kv = [tuple(token_ids[: place + 1]) for place in range(len(token_ids))]
            token_ids.append(crc32(repr(kv).encode()) % self.vocabulary)
        return token_ids[len(request.prompt) :]


@pytest.mark.parametrize("seed", range(60))
def test_each_of_many_sequences_ends_as_it_would_alone(seed: int) -> None:
    draw = random.Random(seed)
    blocks = draw.randint(8, 16)
    requests = []
    for _ in range(40):
        prompt = tuple(draw.randrange(Hashes.vocabulary) for _ in range(draw.randint(1, 14)))
        most = min(blocks * BLOCK - len(prompt), 24)
        requests.append(Request(prompt, draw.randint(1, most)))
    limits = Limits(
        max_running=draw.choice([2, 5, 99]),
        step_tokens=draw.choice([3, 8, 64]),
        max_waiting=99,
        watermark_blocks=draw.randint(0, 2),
    )
    pool = BlockPool(blocks)
    guesses = 3 if seed % 3 == 0 else 0
    model = Hashes(draw)
    world = World(DecodeScheduler(pool, BLOCK, limits, (), guesses), model, draw)
    world.run(requests, arrival=0.3, commit=0.6)
    assert len(world.released) == len(requests)
    for ticket, request in world.requests.items():
        assert world.answers[ticket] == model.alone(request)
    assert pool.leased == 0
    assert world.scheduler.preemptions > 0, "the pool was too large to show anything"


class Engine:
    """The real engine over a tiny model, with or without one that guesses."""

    def __init__(self, runner: Runner, draft: Runner | None = None) -> None:
        self.runner = runner
        self.stepper = Stepper(runner, draft)

    def prefill(self, prompt: Tokens, blocks: Tokens, sampling: SamplingParams) -> int:
        return self.runner.step([Segment(prompt, 0, blocks, 1, sampling)])[0][0]

    def decode(self, rows: Sequence[Row], known: Sequence[Tokens]) -> list[Tokens]:
        chosen = self.stepper.run(rows)
        return [chosen[row.ticket] for row in rows]

    def forget(self, tickets: Sequence[Ticket]) -> None:
        self.stepper.forget(tickets)


@pytest.mark.parametrize(
    ("seed", "guesses", "draft_seed"),
    [(0, 0, None), (1, 0, None), (2, 4, None), (3, 4, None), (4, 3, 0), (5, 3, 1)],
    ids=["plain", "plain too", "lookup", "lookup too", "its own draft", "another draft"],
)
def test_64_sequences_on_the_engine_end_as_each_would_alone(
    tmp_path: Path, seed: int, guesses: int, draft_seed: int | None
) -> None:
    """Greedy and sampled, joining and leaving at random, over a pool that forces preemption.

    Also where tokens are guessed: from the text, by the same model, or by one that knows nothing.
    """
    draw = random.Random(seed)
    blocks = 24
    requests = []
    for number in range(64):
        shared = [7] * draw.choice([0, 0, 8])
        prompt = (*shared, *(draw.randrange(97) for _ in range(draw.randint(1, 30))))
        sampling = SamplingParams(temperature=1.0, seed=number) if number % 2 else GREEDY
        requests.append(Request(prompt, draw.randint(1, 30), sampling))
    folder = write_folder(tmp_path / "model", tiny_weights())
    draft = None
    if draft_seed is not None:
        weights = tiny_weights(seed=draft_seed)
        draft = tiny_runner(write_folder(tmp_path / "draft", weights), blocks, BLOCK)
        poison(draft.cache)
    runner = tiny_runner(folder, blocks, BLOCK)
    poison(runner.cache)
    limits = Limits(max_running=16, step_tokens=24, max_waiting=64, watermark_blocks=1)
    pool = BlockPool(blocks)
    engine = Engine(runner, draft)
    world = World(DecodeScheduler(pool, BLOCK, limits, (), guesses), engine, draw)
    world.run(requests, arrival=0.5, commit=0.8)
    tried, right = (engine.stepper.counters[f"guesses_{what}"] for what in ("tried", "right"))
    if draft_seed == 0:
        assert right == tried > 100, "a model that guesses for itself is always right"
    elif guesses:
        assert tried > right > 0
    assert world.scheduler.preemptions > 3
    assert pool.leased == 0
    alone = tiny_runner(folder, blocks, BLOCK)
    for ticket, request in world.requests.items():
        stop = StopParams(request.max_tokens, ignore_eos=True)
        wanted = generate(alone, request.prompt, request.sampling, stop).token_ids
        assert tuple(world.answers[ticket]) == wanted
