"""One cluster that most tests share. A test that harms a cluster starts its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from baton.client import Client
from tests.cluster.running import RunningCluster, running_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[RunningCluster]:
    with running_cluster() as running:
        yield running
        running.wait_quiet("prefill-0", "decode-0")
        assert [line for line in running.lines if "Traceback" in line] == []


@pytest.fixture
def client(cluster: RunningCluster) -> Iterator[Client]:
    with cluster.client() as connected:
        yield connected
