"""P1, P9, P11: a link carries bytes exactly, and whatever ends it is noticed in bounded time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import monotonic

import pytest
import torch
from torch.distributed import TCPStore

from baton.config import split_address
from baton.errors import LinkLost
from kvtransfer import link as link_module
from kvtransfer.layout import PIECE_BYTES
from kvtransfer.link import RECEIVER_RANK, SENDER_RANK, PairLink, open_store
from tests.kvtransfer.settings import HOST, PATIENCE_S

Store = tuple[TCPStore, str]
Pair = tuple[PairLink, PairLink]
RANKS = (SENDER_RANK, RECEIVER_RANK)


@pytest.fixture
def store() -> Store:
    return open_store(HOST)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def connect_pair(store: Store, pool: ThreadPoolExecutor, link_id: str, timeout_s: float) -> Pair:
    ends = [pool.submit(PairLink, store[1], link_id, rank, HOST, timeout_s) for rank in RANKS]
    sender, receiver = (end.result(PATIENCE_S) for end in ends)
    return sender, receiver


@pytest.fixture
def connect(store: Store, pool: ThreadPoolExecutor) -> Iterator[Callable[..., Pair]]:
    """Make both ends of a link; closed after the test."""
    made: list[PairLink] = []

    def connect(link_id: str = "one", timeout_s: float = PATIENCE_S) -> Pair:
        pair = connect_pair(store, pool, link_id, timeout_s)
        made.extend(pair)
        return pair

    yield connect
    for end in made:
        end.close()


def random_bytes(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


def lost(future: Future[None]) -> LinkLost:
    error = future.exception(PATIENCE_S)
    assert isinstance(error, LinkLost)
    return error


# --- the store ---


def listens_everywhere(port: int) -> bool:
    """Whether a socket listens at `port` on every address of this machine.

    Asked of the kernel: a connection to another address could reach a stranger with the same port.
    """
    rows = [
        line.split()
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        if Path(table).exists()
        for line in Path(table).read_text().splitlines()[1:]
    ]
    listening = [local.split(":") for _, local, _, state, *_ in rows if state == "0A"]
    return any(int(at, 16) == port and int(host, 16) == 0 for host, at in listening)


def test_a_store_listens_on_its_host_and_on_no_other_address() -> None:
    _, address = open_store("127.0.0.1")
    host, port = split_address(address)
    assert host == "127.0.0.1"
    socket.create_connection((host, port), PATIENCE_S).close()
    assert not listens_everywhere(port)


def test_a_store_may_listen_on_an_ipv6_address() -> None:
    try:
        _, address = open_store("::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    host, port = split_address(address)
    assert address == f"[::1]:{port}"
    socket.create_connection((host, port), PATIENCE_S).close()
    assert not listens_everywhere(port)


def test_a_store_that_is_handed_no_socket_listens_everywhere() -> None:
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    assert listens_everywhere(store.port)  # else the two tests above could not fail


# --- bytes over a link ---


@pytest.mark.parametrize(
    "size",
    [0, 1, 4096, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 17],
)
def test_what_is_received_is_what_was_sent(
    connect: Callable[..., Pair], pool: ThreadPoolExecutor, size: int
) -> None:
    sender, receiver = connect()
    data = random_bytes(size)
    received = torch.zeros(size + 1, dtype=torch.uint8)
    sending = pool.submit(sender.send, data)
    receiver.receive(received[:size])
    sending.result(PATIENCE_S)
    assert torch.equal(received[:size], data)
    assert received[size] == 0


def test_units_arrive_in_the_order_they_were_sent(
    connect: Callable[..., Pair], pool: ThreadPoolExecutor
) -> None:
    sender, receiver = connect()
    units = [random_bytes(size, seed=size) for size in (7, PIECE_BYTES + 3, 0, 1, 4096)]

    def send_all() -> None:
        for unit in units:
            sender.send(unit)

    sending = pool.submit(send_all)
    for unit in units:
        received = torch.zeros_like(unit)
        receiver.receive(received)
        assert torch.equal(received, unit)
    sending.result(PATIENCE_S)


def test_two_links_on_one_store_do_not_mix(
    connect: Callable[..., Pair], pool: ThreadPoolExecutor
) -> None:
    links = {seed: connect(f"link-{seed}") for seed in (1, 2)}
    received = {seed: torch.zeros(2 * PIECE_BYTES, dtype=torch.uint8) for seed in links}
    waiting = [
        *(pool.submit(receiver.receive, received[seed]) for seed, (_, receiver) in links.items()),
        *(
            pool.submit(links[seed][0].send, random_bytes(2 * PIECE_BYTES, seed))
            for seed in reversed(links)
        ),
    ]
    for future in waiting:
        future.result(PATIENCE_S)
    for seed, data in received.items():
        assert torch.equal(data, random_bytes(2 * PIECE_BYTES, seed))


# --- every wait ends ---


@pytest.mark.parametrize("rank", RANKS)
def test_a_peer_that_never_comes_is_given_up(
    store: Store, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr(link_module, "RENDEZVOUS_TIMEOUT_S", 0.2)
    began = monotonic()
    with pytest.raises(LinkLost, match="could not be made"):
        PairLink(store[1], "alone", rank, HOST, PATIENCE_S)
    assert monotonic() - began < PATIENCE_S / 2


def test_a_store_that_is_gone_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "RENDEZVOUS_TIMEOUT_S", 0.2)
    with socket.socket() as unused:
        unused.bind((HOST, 0))
        port = unused.getsockname()[1]
    began = monotonic()
    with pytest.raises(LinkLost, match="could not be made"):
        PairLink(f"{HOST}:{port}", "nowhere", SENDER_RANK, HOST, PATIENCE_S)
    assert monotonic() - began < PATIENCE_S


def test_a_link_whose_keys_are_deleted_while_it_is_made_is_lost_and_no_process_with_it(
    store: Store,
) -> None:
    """gloo reads past the end of the empty answer that it then gets; that ended the process."""
    store[0].set("link/gone//0/0", "")
    with pytest.raises(LinkLost, match="the other side ended it"):
        PairLink(store[1], "gone", RECEIVER_RANK, HOST, PATIENCE_S)


def test_a_silent_peer_is_given_up_after_the_links_timeout(connect: Callable[..., Pair]) -> None:
    _, receiver = connect(timeout_s=0.2)
    began = monotonic()
    with pytest.raises(LinkLost, match="broke"):
        receiver.receive(torch.zeros(1, dtype=torch.uint8))
    assert 0.2 <= monotonic() - began < PATIENCE_S / 2


def test_a_peer_that_does_not_read_is_given_up_after_the_links_timeout(
    connect: Callable[..., Pair],
) -> None:
    sender, _ = connect(timeout_s=0.2)
    began = monotonic()
    with pytest.raises(LinkLost, match="broke"):
        sender.send(torch.zeros(64 * PIECE_BYTES, dtype=torch.uint8))
    assert monotonic() - began < PATIENCE_S / 2


def test_a_peer_that_closes_its_end_in_the_middle_of_a_unit_is_noticed(
    store: Store, pool: ThreadPoolExecutor
) -> None:
    sender, receiver = connect_pair(store, pool, "left", 60.0)
    receiving = pool.submit(receiver.receive, torch.zeros(2 * PIECE_BYTES, dtype=torch.uint8))
    sender.send(torch.zeros(PIECE_BYTES, dtype=torch.uint8))
    sender.close()
    assert "broke" in lost(receiving).message
    receiver.close()


HALFWAY = """
import sys
import torch
from kvtransfer.layout import PIECE_BYTES
from kvtransfer.link import RECEIVER_RANK, SENDER_RANK, PairLink

store_address, host = sys.argv[1:]
piece = torch.zeros(PIECE_BYTES, dtype=torch.uint8)
print("ready", flush=True)
up = PairLink(store_address, "up", SENDER_RANK, host, 60.0)
down = PairLink(store_address, "down", RECEIVER_RANK, host, 60.0)
up.send(piece)
down.receive(piece)
print("halfway", flush=True)
sys.stdin.read()
"""


def test_a_peer_killed_in_the_middle_of_a_unit_is_noticed_and_other_links_live_on(
    store: Store, connect: Callable[..., Pair], pool: ThreadPoolExecutor
) -> None:
    """At once, not by the timeout of 60 s, whether this side is receiving or sending."""
    peer = subprocess.Popen(
        [sys.executable, "-c", HALFWAY, store[1], HOST],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with peer:
        try:
            assert peer.stdout is not None
            assert peer.stdout.readline() == b"ready\n"
            receiver = PairLink(store[1], "up", RECEIVER_RANK, HOST, 60.0)
            sender = PairLink(store[1], "down", SENDER_RANK, HOST, 60.0)
            unit = torch.zeros(64 * PIECE_BYTES, dtype=torch.uint8)
            waiting = [
                pool.submit(receiver.receive, unit[: 3 * PIECE_BYTES]),
                pool.submit(sender.send, unit.clone()),
            ]
            assert peer.stdout.readline() == b"halfway\n"
            assert not [future for future in waiting if future.done()]
        finally:
            os.kill(peer.pid, signal.SIGKILL)
        for future in waiting:
            assert "broke" in lost(future).message
    for end in (receiver, sender):
        end.close()
    this_side, other_side = connect("survivor")
    data = random_bytes(100)
    received = torch.zeros_like(data)
    sending = pool.submit(this_side.send, data)
    other_side.receive(received)
    sending.result(PATIENCE_S)
    assert torch.equal(received, data)
