"""`make run`: a whole cluster for one question. Fetch, start, ask, show where the time went, stop.

python -m launch.demo "Why is the sky blue?"
"""

from __future__ import annotations

import asyncio
import sys
import time

from rich.console import Console

from baton.client import Options
from baton.errors import BatonError
from baton.model.catalog import DEFAULT_MODEL, locate
from launch.ask import ask, print_timing
from launch.local import ClusterPlan, local_cluster

QUESTION = "What is the capital of France, and what is it known for?"
OPTIONS = Options(max_tokens=128, timeout_s=300.0)


def main() -> int:
    """Ask one question of a cluster made for it; 0 when it was answered and all has stopped."""
    question = " ".join(sys.argv[1:]) or QUESTION
    console = Console(stderr=True, highlight=False)
    try:
        locate(DEFAULT_MODEL, console.print)
        asyncio.run(_demonstrate(question, console))
    except BatonError as error:
        console.print(f"baton: {error.message} ({error.code})", style="red")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


async def _demonstrate(question: str, console: Console) -> None:
    begun = time.monotonic()

    def progress(line: str) -> None:
        console.print(f"[{time.monotonic() - begun:5.1f} s] {line}", markup=False)

    async with local_cluster(ClusterPlan(port=0, http_port=0), progress) as cluster:
        progress("the cluster can serve")
        console.print(f"\n> {question}\n", markup=False)
        prompt = [("user", question)]
        answer = await ask(cluster.grpc_address, None, prompt, OPTIONS, sys.stdout)
        console.print()
        print_timing(answer.completion, console)
        console.print()
    progress("every process has ended")


if __name__ == "__main__":
    sys.exit(main())
