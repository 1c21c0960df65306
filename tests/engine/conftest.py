"""The tiny model's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.tiny import tiny_weights, write_folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "tiny-llama", tiny_weights())
