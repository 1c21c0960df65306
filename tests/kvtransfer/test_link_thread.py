"""P1, P5, P7: a link's thread performs in order, and reports its end exactly once, when it is over.

What `ended` promises is what lets blocks be released: nothing touches them after it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import pytest

from baton.errors import LinkLost
from kvtransfer.link import LinkThread, PairLink
from tests.kvtransfer.settings import PATIENCE_S, link_threads


class FakeLink:
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class Scene:
    """A link's thread and everything it did.

    A callable put as an item is called on the thread; `connect` is called in place of a rendezvous.
    """

    def __init__(self, connect: Callable[[], None] = lambda: None) -> None:
        self.link = FakeLink()
        self.performed: list[Any] = []
        self.ends: list[LinkLost | None] = []
        self.closed_at_end: list[int] = []
        self.ended = threading.Event()
        self._connect = connect
        self.thread: LinkThread[Any] = LinkThread(
            "link of a test", self._meet, self._perform, self._ended
        )

    def _meet(self) -> PairLink:
        self._connect()
        return cast(PairLink, self.link)

    def _perform(self, link: PairLink, item: Any) -> None:
        assert link is cast(PairLink, self.link)
        assert not self.ends, "an item is performed after the end"
        if callable(item):
            item()
        self.performed.append(item)

    def _ended(self, error: LinkLost | None) -> None:
        self.closed_at_end.append(self.link.closed)
        self.ends.append(error)
        self.ended.set()

    def wait_for_end(self) -> None:
        assert self.ended.wait(PATIENCE_S)

    def join(self) -> None:
        """Until the thread itself is gone, so that a second report could have been seen."""
        self.thread._thread.join(PATIENCE_S)
        assert not link_threads()


class Gate:
    """A point at which the thread waits until the test lets it go on."""

    def __init__(self, error: Exception | None = None) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self.error = error

    def __call__(self) -> None:
        self.reached.set()
        assert self.open.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error

    def wait_until_reached(self) -> None:
        assert self.reached.wait(PATIENCE_S)


def test_items_are_performed_in_order_from_before_the_connection_on() -> None:
    rendezvous, last = Gate(), Gate()
    scene = Scene(rendezvous)
    rendezvous.wait_until_reached()
    for item in range(50):
        scene.thread.put(item)
    rendezvous.open.set()
    for item in (*range(50, 100), last):
        scene.thread.put(item)
    last.wait_until_reached()
    assert scene.performed == list(range(100))
    last.open.set()
    scene.thread.stop()
    scene.join()


def test_a_stop_drops_what_is_queued_and_ends_after_the_item_in_hand() -> None:
    in_hand = Gate()
    scene = Scene()
    for item in (in_hand, 1, 2):
        scene.thread.put(item)
    in_hand.wait_until_reached()
    scene.thread.stop()
    scene.thread.put(3)
    assert not scene.ends, "the item in hand may still touch blocks"
    in_hand.open.set()
    scene.join()
    assert scene.performed == [in_hand]
    assert scene.ends == [None]


def test_a_stop_ends_a_thread_that_waits_for_work_and_closes_its_link_first() -> None:
    first = Gate()
    first.open.set()
    scene = Scene()
    scene.thread.put(first)
    first.wait_until_reached()
    scene.thread.stop()
    scene.join()
    assert scene.ends == [None]
    assert scene.closed_at_end == [1]


def test_a_broken_link_ends_with_its_own_error_and_performs_nothing_more() -> None:
    error = LinkLost("the wire was cut")
    breaking = Gate(error)
    scene = Scene()
    for item in (0, breaking, 1):
        scene.thread.put(item)
    breaking.open.set()
    scene.join()
    assert scene.performed == [0]
    assert scene.ends == [error]
    assert scene.closed_at_end == [1]


def test_whatever_an_item_raises_the_end_is_reported() -> None:
    failing = Gate(ZeroDivisionError("no such block"))
    failing.open.set()
    scene = Scene()
    scene.thread.put(failing)
    scene.join()
    [error] = scene.ends
    assert isinstance(error, LinkLost)
    assert "no such block" in error.message
    assert scene.closed_at_end == [1]


@pytest.mark.parametrize(
    "failure", [LinkLost("nobody came"), OSError("nobody came")], ids=["lost", "unexpected"]
)
def test_a_rendezvous_that_fails_ends_the_link(failure: Exception) -> None:
    rendezvous = Gate(failure)
    rendezvous.open.set()
    scene = Scene(rendezvous)
    scene.thread.put(1)
    scene.join()
    [error] = scene.ends
    assert isinstance(error, LinkLost)
    assert "nobody came" in error.message
    assert scene.performed == []


@pytest.mark.parametrize("failure", [None, LinkLost("nobody came")], ids=["met", "failed"])
def test_a_stop_before_the_peer_has_come_ends_at_once_and_for_good(
    failure: LinkLost | None,
) -> None:
    """Also when the peer comes after all: nothing is performed, and the end is not told twice."""
    rendezvous = Gate(failure)
    scene = Scene(rendezvous)
    rendezvous.wait_until_reached()
    scene.thread.put(1)
    scene.thread.stop()
    assert scene.ends == [None]  # while the thread still waits
    rendezvous.open.set()
    scene.join()
    assert scene.ends == [None]
    assert scene.performed == []
    assert scene.link.closed == (0 if failure else 1)


def test_stopping_again_changes_nothing() -> None:
    rendezvous = Gate()
    waiting = Scene(rendezvous)
    waiting.thread.stop()
    waiting.thread.stop()
    rendezvous.open.set()
    waiting.join()
    waiting.thread.stop()
    assert waiting.ends == [None]


def test_a_stop_after_the_end_changes_nothing() -> None:
    error = LinkLost("nobody came")
    rendezvous = Gate(error)
    rendezvous.open.set()
    scene = Scene(rendezvous)
    scene.wait_for_end()
    scene.thread.stop()
    scene.join()
    assert scene.ends == [error]


@pytest.mark.parametrize("failure", [None, LinkLost("nobody came")], ids=["met", "failed"])
def test_the_end_is_told_once_however_stops_and_the_rendezvous_race(
    failure: LinkLost | None,
) -> None:
    for _ in range(50):
        start = threading.Barrier(4)

        def race(start: threading.Barrier = start) -> None:
            start.wait(PATIENCE_S)
            if failure is not None:
                raise failure

        scene = Scene(race)
        scene.thread.put(1)

        def stop(scene: Scene = scene, start: threading.Barrier = start) -> None:
            start.wait(PATIENCE_S)
            scene.thread.stop()

        stoppers = [threading.Thread(target=stop) for _ in range(3)]
        for stopper in stoppers:
            stopper.start()
        for stopper in stoppers:
            stopper.join(PATIENCE_S)
        scene.join()
        assert len(scene.ends) == 1
        assert scene.ends[0] in (None, failure)
        assert scene.performed in ([], [1])
