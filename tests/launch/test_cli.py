"""The command line teaches its reader, refuses in a sentence, and loads no more than it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from baton.config import option_names
from launch.cli import main

COMMANDS = {
    (): ("up", "ask", "router", "prefill", "decode", "model", "baton up"),
    ("up",): ("--prefill", "--decode", "--model", "--port", "ready grpc=HOST:PORT", "Ctrl-C"),
    ("ask",): ("--max-tokens", "--temperature", "--seed", "--json", "--file", "stdin"),
    ("router",): ("--listen", "--http", "--lease-s", "--token-file", "BATON_NAME", "--config"),
    ("prefill",): ("--router", "--step-tokens", "--kv-memory-mib", "BATON_NAME", "--config"),
    ("decode",): ("--router", "--max-running", "--kv-memory-mib", "BATON_NAME", "--config"),
    ("model",): ("fetch", "show", "smollm2-135m-instruct", "GGUF", "hf:org/name"),
    ("model", "fetch"): ("name",),
    ("model", "show"): ("name",),
}


def help_of(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_names_what_there_is_to_know(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = help_of(command, capsys)
    assert [word for word in COMMANDS[command] if word not in text] == []


@pytest.mark.parametrize("kind", ["router", "prefill", "decode"])
def test_the_help_of_a_node_lists_every_option_it_reads(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of((kind,), capsys)
    wanted = [f"--{name.replace('_', '-')} " for name in option_names(kind)]
    assert [flag for flag in wanted if flag not in text] == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["prefill", "--listen", "nonsense"], "listen: 'nonsense' is not HOST:PORT"),
        (["decode", "--threads", "0"], "threads: "),
        (["decode", "--dtype", "float16"], "dtype: "),
        (["router", "--listen", "0.0.0.0:0"], "--token-file"),
        (["router", "--lease-s", "0.5"], "heartbeat_s must be less than lease_s"),
        (["prefill", "--config", "/nowhere/baton.yaml"], "/nowhere/baton.yaml cannot be read"),
    ],
    ids=" ".join,
)
def test_a_value_that_cannot_be_ends_in_a_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("baton: ")
    assert sentence in printed
    assert printed.count("\n") == 1, "one line, and no traceback"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["serve"],
        ["up", "--prefill", "0"],
        ["up", "--decode", "65"],
        ["up", "--port", "70000"],
        ["up", "--dtype", "float16"],
        ["ask", "hello", "--max-tokens", "many"],
        ["prefill", "--treads", "2"],
        ["router", "--step-tokens", "2"],
        ["model"],
    ],
    ids=" ".join,
)
def test_what_the_parser_does_not_know_exits_with_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: baton" in capsys.readouterr().err


def test_a_model_that_is_not_there_exits_with_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model", "show", str(tmp_path / "none")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


@pytest.mark.parametrize("heavy", ["torch", "grpc", "numpy", "gguf", "uvicorn"])
def test_the_command_line_itself_loads_nothing_heavy(heavy: str) -> None:
    """So that `--help` answers at once, and a router starts without torch."""
    check = f"import sys, launch.cli; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60, check=False).returncode == 0


def test_help_runs_as_a_module() -> None:
    end = subprocess.run(
        [sys.executable, "-m", "launch.cli", "--help"],
        timeout=60,
        check=False,
        capture_output=True,
        text=True,
    )
    assert end.returncode == 0
    assert "baton ask" in end.stdout
