"""Generate the Python stubs beside the `.proto` files, or check that they are up to date.

python -m protos.generate           writes the stubs
python -m protos.generate --check   exits with 1 when a committed stub differs
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOM = Path(__file__).parent
MESSAGES_ONLY = {"common"}
"""Files without a service: protoc would write an empty `_pb2_grpc.py` for them."""


def generate(into: Path) -> list[Path]:
    """Write the stubs of every `.proto` file below `into`; return their paths relative to it."""
    from grpc_tools import protoc  # development dependency

    names = sorted(path.stem for path in ROOM.glob("*.proto"))
    for name in names:
        outputs = ["--python_out", "--pyi_out"]
        if name not in MESSAGES_ONLY:
            outputs.append("--grpc_python_out")
        flags = [f"{output}={into}" for output in outputs]
        status = protoc.main(["protoc", f"-I{ROOM.parent}", *flags, f"protos/{name}.proto"])
        if status != 0:
            raise SystemExit(f"protoc failed on protos/{name}.proto")
    return sorted(path.relative_to(into) for path in (into / "protos").glob("*_pb2*"))


def stale_stubs() -> list[Path]:
    """Committed stubs that differ from what the `.proto` files give now."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        made = generate(fresh)
        committed = {path.relative_to(ROOM.parent) for path in ROOM.glob("*_pb2*")}
        differing = {
            path
            for path in made
            if path not in committed
            or (ROOM.parent / path).read_bytes() != (fresh / path).read_bytes()
        }
        return sorted(differing | (committed - set(made)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    if not parser.parse_args().check:
        generate(ROOM.parent)
        return
    if stale := stale_stubs():
        print("stale stubs, run `make protos`:", *stale, sep="\n  ", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
