"""What several rooms' tests share: the default model, loaded once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from baton.model import load_spec, locate
from engine.memory import KvMemory
from engine.runner import Runner


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One compute thread, as a node has by default."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def default_runner() -> Runner:
    """The default model in float32; the first run on a machine fetches it."""
    folder = locate("smollm2-135m-instruct", lambda _: None)
    return Runner.load(folder, load_spec(folder), "float32", "cpu", 16, KvMemory(192 << 20))
