"""A cluster as its user has it: `baton up` as a process, and what is seen of it from outside."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from baton.client import Chunk, Client, Completion, Options, Prompt
from protos import node_pb2, node_pb2_grpc

START_S = 120.0
STOP_S = 30.0
_READY = re.compile(r"^(\S+) is ready at (\S+), process (\d+)$")


@dataclass
class RunningCluster:
    """`baton up` and the addresses it printed."""

    process: subprocess.Popen[str]
    grpc_address: str = ""
    http_address: str = ""
    nodes: dict[str, str] = field(default_factory=dict)
    """Addresses by name: router, prefill-0, decode-0, …"""
    pids: dict[str, int] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    """What it said on stderr."""

    def client(self) -> Client:
        return Client(self.grpc_address)

    def status(self, name: str) -> node_pb2.NodeStatus:
        """A node's own counters."""
        with grpc.insecure_channel(self.nodes[name]) as channel:
            stub = node_pb2_grpc.NodeStub(channel)
            return stub.GetStatus(node_pb2.GetStatusRequest(), timeout=10.0)

    def wait_quiet(self, *names: str) -> None:
        """Wait until these nodes hold nothing for anybody (P5)."""

        def quiet() -> bool:
            return all(is_quiet(self.status(name)) for name in names)

        wait_until(quiet, lambda: "\n".join(str(self.status(name)) for name in names))

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Send a signal and wait for the end; return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(STOP_S)


@contextmanager
def running_cluster(*arguments: str, **environment: str) -> Iterator[RunningCluster]:
    """Start `baton up` on free ports, wait until it can serve, and stop it at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "up", "--port=0", "--http-port=0", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | environment,
    )
    cluster = RunningCluster(process)
    ready = threading.Event()

    def read_stdout() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ready "):
                words = dict(word.split("=", 1) for word in line.split()[1:])
                cluster.grpc_address, cluster.http_address = words["grpc"], words["http"]
                ready.set()
        ready.set()  # its end is an answer too

    def read_stderr() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            cluster.lines.append(line.rstrip("\n"))
            if match := _READY.match(cluster.lines[-1]):
                cluster.nodes[match[1]] = match[2]
                cluster.pids[match[1]] = int(match[3])

    readers = [threading.Thread(target=read) for read in (read_stdout, read_stderr)]
    for reader in readers:
        reader.start()
    try:
        assert ready.wait(START_S), cluster.lines
        assert cluster.grpc_address, cluster.lines
        yield cluster
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for reader in readers:
            reader.join(STOP_S)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()


@dataclass(frozen=True, slots=True)
class Answered:
    token_ids: list[int]
    text: str
    completion: Completion


def answer(client: Client, prompt: Prompt, options: Options) -> Answered:
    """A whole answer; checks that token indices have no gap and no repeat (P2)."""
    token_ids: list[int] = []
    text = ""
    for update in client.generate(prompt, options):
        if isinstance(update, Chunk):
            assert update.index == len(token_ids)
            token_ids.extend(update.token_ids)
            text += update.text
        else:
            assert update.completion_tokens == len(token_ids)
            return Answered(token_ids, text, update)
    raise AssertionError("the stream ended without a Completion")


def is_quiet(status: node_pb2.NodeStatus) -> bool:
    return (
        status.blocks_free == status.blocks_total
        and status.transfers_in_flight == 0
        and status.requests_running == status.requests_waiting == 0
    )


def wait_until(
    holds: Callable[[], bool], describe: Callable[[], Any], within_s: float = 10
) -> None:
    """Ask again and again, for what has no event to wait on from outside."""
    deadline = time.monotonic() + within_s
    pause = threading.Event()
    while not holds():
        assert time.monotonic() < deadline, describe()
        pause.wait(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
