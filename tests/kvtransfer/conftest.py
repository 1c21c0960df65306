"""What the tests of the hand-off share."""

from __future__ import annotations

import pytest

from kvtransfer import link


@pytest.fixture
def short_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests in which one side of a link never comes, and the other's thread must end first."""
    monkeypatch.setattr(link, "RENDEZVOUS_TIMEOUT_S", 0.5)
