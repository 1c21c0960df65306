"""One link: a two-rank torch.distributed communicator between a P and a D rank, and its thread.

A link is apart from every other process group and needs no default one. It has a generation, named
by its id: when anything on it fails, that generation ends and a fresh one is made under a new id.
Each side posts from one thread only, in the order that the control stream fixes, and without tags:
the rules of NCCL, kept on gloo too.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import Any, Final, Generic, TypeVar

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore

from baton.config import Config, join_address, split_address
from baton.errors import LinkLost
from baton.kv_layout import Layout
from kvtransfer.layout import pieces

SENDER_RANK: Final = 0
RECEIVER_RANK: Final = 1
RENDEZVOUS_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """What every link of this node needs to know about the node."""

    node_id: str
    epoch: int
    layout: Layout
    block_size: int
    host: str  # the address of this node that links use
    config: Config


def open_store(host: str) -> tuple[TCPStore, str]:
    """A rendezvous store that listens on `host` only, on a free port; returns it and HOST:PORT.

    TCPStore would listen on every interface, so it is handed a socket that is bound already (P11).
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen(128)
    port = listener.getsockname()[1]
    store = TCPStore(
        host,
        port,
        None,
        True,
        timedelta(seconds=RENDEZVOUS_TIMEOUT_S),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, join_address(host, port)


class _RendezvousStore(Store):  # type: ignore[misc]
    """The peers' meeting place of one link, which gives no empty answer.

    TCPStore gives one for a key that was deleted after it had been waited for, as happens when the
    decode node ends a link that is still being made; and gloo, which parses it unchecked, crashes.
    """

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store

    def set(self, key: str, value: bytes) -> None:
        self._store.set(key, value)

    def wait(self, keys: list[str], *timeout: timedelta) -> None:
        self._store.wait(keys, *timeout)

    def get(self, key: str) -> bytes:
        value: bytes = self._store.get(key)
        if not value:
            raise RuntimeError("the other side ended it")
        return value


class PairLink:
    """A connected link. Every wait is bounded by `timeout_s`; any failure raises `LinkLost`."""

    def __init__(
        self, store_address: str, link_id: str, rank: int, host: str, timeout_s: float
    ) -> None:
        """Meet the peer in the store. Blocks for at most `RENDEZVOUS_TIMEOUT_S`.

        `host` is the address of this side that the peer connects to.
        """
        store_host, store_port = split_address(store_address)
        rendezvous_timeout = timedelta(seconds=RENDEZVOUS_TIMEOUT_S)
        options = ProcessGroupGloo._Options()
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = rendezvous_timeout
        options._threads = 1
        try:
            # A client of its own: one TCPStore client serves one call at a time.
            client = TCPStore(
                store_host, store_port, None, False, rendezvous_timeout, wait_for_workers=False
            )
            self._store = _RendezvousStore(PrefixStore(f"link/{link_id}/", client))
            self._group = ProcessGroupGloo(self._store, rank, 2, options)
        except RuntimeError as error:  # torch.distributed's own errors derive from it
            raise LinkLost(f"the link could not be made: {error}") from error
        self._peer = 1 - rank
        self._timeout = timedelta(seconds=timeout_s)

    def send(self, data: torch.Tensor) -> None:
        """Send a contiguous CPU tensor of bytes, in pieces that let a dead peer be noticed."""
        self._transfer(data, self._group.send)

    def receive(self, into: torch.Tensor) -> None:
        """Receive exactly as many bytes as `into` has. A shorter buffer would abort the process."""
        self._transfer(into, self._group.recv)

    def _transfer(
        self, data: torch.Tensor, post: Callable[[list[torch.Tensor], int, int], Any]
    ) -> None:
        try:
            for start, stop in pieces(data.numel()):
                post([data[start:stop]], self._peer, 0).wait(self._timeout)
        except RuntimeError as error:
            raise LinkLost(f"the link broke: {error}") from error

    def close(self) -> None:
        """End this generation. gloo closes its sockets when the group goes."""
        with contextlib.suppress(RuntimeError):
            self._group.abort()
        del self._group


Item = TypeVar("Item")


class _Stop(Enum):
    STOP = 0


class LinkThread(Generic[Item]):
    """The one thread that posts on a link: connects, then performs items in order until it ends.

    `ended` is called exactly once, with the error or None, when no item is being performed or will
    be: from the thread as its last act, or from `stop` while the thread still waits for its peer.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], PairLink],
        perform: Callable[[PairLink, Item], None],
        ended: Callable[[LinkLost | None], None],
    ) -> None:
        self._connect, self._perform, self._ended = connect, perform, ended
        self._items: queue.SimpleQueue[Item | _Stop] = queue.SimpleQueue()
        self._lock = threading.Lock()  # over the two flags below
        self._stopping = False
        self._thread_ends = False  # the thread met its peer, or failed to: its end is its to report
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        self._items.put(item)

    def stop(self) -> None:
        """Drop what is queued and end after the item in hand: within the link's timeout.

        A rendezvous with a dead peer takes longer than that, and nothing waits for its end.
        """
        with self._lock:
            never_connects = not self._stopping and not self._thread_ends
            self._stopping = True
        self._items.put(_Stop.STOP)
        if never_connects:
            self._ended(None)

    def _run(self) -> None:
        error: LinkLost | None = None
        link: PairLink | None = None
        try:
            link = self._connect()
            if self._claim_end():
                while not self._stopping and not isinstance(item := self._items.get(), _Stop):
                    self._perform(link, item)
        except LinkLost as lost:
            error = lost
        except Exception as unexpected:  # the thread must report its end, whatever ended it
            error = LinkLost(f"the link's thread failed: {unexpected!r}")
        finally:
            if link is not None:
                link.close()
            if self._claim_end():
                self._ended(error)

    def _claim_end(self) -> bool:
        """On the thread: whether it goes on and reports the end; not if `stop` has done so."""
        with self._lock:
            self._thread_ends = self._thread_ends or not self._stopping
            return self._thread_ends
