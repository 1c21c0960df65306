"""The command line: `baton up`, `ask`, `router`, `prefill`, `decode`, `model`, `bench`.

Only what a command needs is imported, so `--help` and a router start without torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from baton.config import Config, NodeKind, load_config, option_names
from baton.errors import BatonError, ConfigError

_NODE_HELP: dict[NodeKind, tuple[str, str]] = {
    "router": (
        "serve clients over gRPC and HTTP, and drive prefill and decode nodes",
        "A router needs no GPU and no torch. Nodes join it by themselves, with their --router.",
    ),
    "prefill": (
        "compute prompts and hand their KV to decode nodes",
        "Start as many as prompts need; each joins the router and leaves when it stops.",
    ),
    "decode": (
        "take KV over from prefill nodes and write answers",
        "Start as many as answers need; each joins the router and leaves when it stops.",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the process's exit status."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except ConfigError as error:
        print(f"baton: {error.message}", file=sys.stderr)
        return 2
    except BatonError as error:
        print(f"baton: {error.message} ({error.code})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="baton",
        description="Serve a large language model from many machines: prefill nodes compute the "
        "prompt's KV cache and hand it to decode nodes, which write the answer.",
        epilog="Begin with `baton up` in one terminal and `baton ask 'Why is the sky blue?'` in "
        "another.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_up(commands)
    _add_ask(commands)
    for kind in _NODE_HELP:
        _add_node(commands, kind)
    _add_model(commands)
    _add_bench(commands)
    return parser


def _add_up(commands: Any) -> None:
    parser = commands.add_parser(
        "up",
        help="a cluster on this machine, in the foreground",
        description="Start a router and nodes on this machine. Prints `ready grpc=HOST:PORT "
        "http=HOST:PORT` when it can serve. Ctrl-C lets running requests end, then stops "
        "everything.",
    )
    parser.add_argument("--prefill", type=_count, default=1, metavar="N", help="prefill nodes (1)")
    parser.add_argument("--decode", type=_count, default=1, metavar="N", help="decode nodes (1)")
    parser.add_argument("--model", default=_default("model"), help=_describe("model"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--quantize",
        choices=["none", "int8", "int4"],
        default=_default("quantize"),
        help=_describe("quantize"),
    )
    parser.add_argument("--port", type=_port, default=7000, help="gRPC port; 0 picks one (7000)")
    parser.add_argument(
        "--http-port", type=_port, default=8000, help="HTTP port; 0 picks one (8000)"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="compute threads per node; 0 shares the cores out"
    )
    parser.add_argument(
        "--kv-memory-mib",
        type=int,
        default=_default("kv_memory_mib"),
        help=f"{_describe('kv_memory_mib')}, of each node",
    )
    parser.add_argument(
        "--drain-timeout-s", type=float, default=10.0, help="longest wait for requests at a stop"
    )
    parser.add_argument(
        "--log-level", choices=["debug", "info", "warning", "error"], default="warning"
    )
    parser.set_defaults(command=_up)


def _up(options: argparse.Namespace) -> int:
    from launch.up import run_up

    return run_up(options)


def _add_ask(commands: Any) -> None:
    parser = commands.add_parser(
        "ask",
        help="one prompt through the router, streamed to the terminal",
        description="Send a prompt (an argument, a file, or stdin) to a running cluster and print "
        "the answer as it comes, then where the time went.",
    )
    parser.add_argument("prompt", nargs="?", help="the prompt; `-` or nothing reads stdin")
    parser.add_argument("--file", metavar="F", help="read the prompt from a file")
    parser.add_argument(
        "--plain", action="store_true", help="send the text as it is, without the chat template"
    )
    parser.add_argument("--router", default="127.0.0.1:7000", metavar="HOST:PORT")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer, tokens")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--seed", type=int, metavar="S", help="repeat a sampled answer exactly")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print, as the last line, one object: token_ids, text, finish_reason, timing",
    )
    parser.add_argument("--timeout-s", type=float, default=600.0, help="give up after (600)")
    parser.add_argument("--token-file", default="", help=_describe("token_file"))
    parser.set_defaults(command=_ask)


def _ask(options: argparse.Namespace) -> int:
    from launch.ask import run_ask

    return run_ask(options)


def _add_node(commands: Any, kind: NodeKind) -> None:
    summary, advice = _NODE_HELP[kind]
    parser = commands.add_parser(
        kind,
        help=summary,
        description=f"Run one {kind} node in the foreground: {summary}. {advice}",
        epilog="Each option can also be set in the environment as BATON_NAME, or in the YAML file "
        "given by --config. The command line wins over the environment, and that over the file.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", default=None, help="YAML file with options")
    parser.add_argument(
        "--stop-with-parent",
        action="store_true",
        default=False,
        help="stop when stdin closes, so that the node never outlives what started it",
    )
    for name in option_names(kind):
        default = _default(name)
        shown = f" ({default})" if default != "" else ""
        parser.add_argument(
            f"--{name.replace('_', '-')}", dest=name, metavar="X", help=_describe(name) + shown
        )
    parser.set_defaults(command=_node, kind=kind)


def _node(options: argparse.Namespace) -> int:
    from launch.nodes import run_node_process

    names = option_names(options.kind)
    flags = {name: value for name, value in vars(options).items() if name in names}
    config = load_config(options.kind, flags, file=options.config)
    run_node_process(options.kind, config, stop_with_parent=options.stop_with_parent)
    return 0


def _add_model(commands: Any) -> None:
    parser = commands.add_parser(
        "model",
        help="get and inspect a model",
        description="A model is named by `smollm2-135m-instruct` (the default), a GGUF file, a "
        "Hugging Face folder, or hf:org/name.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    fetch = actions.add_parser("fetch", help="get a model and make it ready to load")
    fetch.add_argument("name", nargs="?", default=_default("model"), help=_describe("model"))
    fetch.set_defaults(command=_model_fetch)
    show = actions.add_parser("show", help="print what a model is")
    show.add_argument("name", nargs="?", default=_default("model"), help=_describe("model"))
    show.set_defaults(command=_model_show)


def _model_fetch(options: argparse.Namespace) -> int:
    from baton.model.catalog import locate

    print(locate(options.name, _progress))
    return 0


def _model_show(options: argparse.Namespace) -> int:
    import dataclasses

    from baton.model.catalog import locate
    from baton.model.spec import load_spec

    folder = locate(options.name, _progress)
    for name, value in {"folder": folder, **dataclasses.asdict(load_spec(folder))}.items():
        print(f"{name:<18} {value}")
    return 0


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure, beside peers and the machine's limits",
        description="Each benchmark runs its subjects in turn in one run and prints ratios.",
    )
    benches = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    engine = benches.add_parser(
        "engine",
        help="prefill and decode of the engine alone, beside the peers that are installed",
        description="Measure the engine on the default model beside transformers, vLLM's CPU build "
        "and llama.cpp, where `make bench-peers` has installed them.",
    )
    engine.add_argument("--rounds", type=_count, default=3, metavar="N", help="rounds in turn (3)")
    engine.add_argument("--threads", type=_count, default=1, metavar="N", help="for each (1)")
    engine.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    engine.add_argument("--json", action="store_true", help="print one object instead of a table")
    engine.add_argument("--report", metavar="FILE", help="write the table to a Markdown file too")
    engine.set_defaults(command=_bench_engine)
    perplexity = benches.add_parser(
        "perplexity",
        help="what fewer bits cost: the default model's perplexity on a fixed text",
        description="Read a fixed text in bfloat16, float32, int8 and int4 and compare how well it "
        "is predicted.",
    )
    perplexity.add_argument("--threads", type=_count, default=1, metavar="N", help="to use (1)")
    perplexity.add_argument("--json", action="store_true", help="print one object, not a table")
    perplexity.add_argument("--report", metavar="FILE", help="write a Markdown file's section too")
    perplexity.set_defaults(command=_bench_perplexity)


def _bench_perplexity(options: argparse.Namespace) -> int:
    from bench.perplexity import run_perplexity

    return run_perplexity(options)


def _bench_engine(options: argparse.Namespace) -> int:
    from bench.engine import run_engine

    return run_engine(options)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _default(name: str) -> Any:
    return Config.model_fields[name].default


def _describe(name: str) -> str:
    return Config.model_fields[name].description or ""


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError("give a number from 1 to 64")
    return int(text)


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError("give a port from 0 to 65535")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
