"""The folder where fetched and imported models are kept, shared by every process of a user.

Several nodes start at once on one machine, and each wants the same model. Whatever is made here is
made once: the first process takes the entry's lock and works in a place of its own, the others wait
and find the result. An entry appears in one rename, so nobody ever sees half of one; what a killed
process left behind is swept away by the next that takes the lock.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from baton.errors import ConfigError

LOCK_TIMEOUT_S = 3600.0
_POLL_S = 0.1
Progress = Callable[[str], None]


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`$BATON_CACHE`, else `$XDG_CACHE_HOME/baton`, else `~/.cache/baton`."""
    if own := environ.get("BATON_CACHE"):
        return Path(own).expanduser()
    if xdg := environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "baton"
    return Path("~/.cache/baton").expanduser()


def make_once(
    target: Path,
    make: Callable[[Path], None],
    progress: Progress,
    lock_timeout_s: float = LOCK_TIMEOUT_S,
) -> Path:
    """Return `target`, a file or folder in the cache, and have `make` create it where it is not.

    `make` is given a path beside `target` that does not exist, and creates the file or folder
    there. It runs in one process at a time. Raises `ConfigError` where the cache cannot be
    written, or another process holds the lock for longer than `lock_timeout_s`.
    """
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target, progress, lock_timeout_s):
            if not target.exists():
                _make(target, make)
    except OSError as error:
        raise ConfigError(
            f"the model cache cannot be written at {error.filename or target}: {error.strerror}; "
            "set BATON_CACHE to a folder with room"
        ) from error
    return target


def _make(target: Path, make: Callable[[Path], None]) -> None:
    partial = target.with_name(f".{target.name}.partial")
    _remove(partial)  # left by a process that was killed: we hold the lock, so nobody uses it
    try:
        make(partial)
        _flush(partial)
        os.replace(partial, target)
    finally:
        _remove(partial)


@contextmanager
def _locked(target: Path, progress: Progress, timeout_s: float) -> Iterator[None]:
    """Hold the entry's lock. The kernel frees it when its holder dies, however that happens."""
    lock = target.with_name(f".{target.name}.lock")
    with lock.open("wb") as file:
        deadline = time.monotonic() + timeout_s
        waiting = False
        while not _try_lock(file.fileno()):
            if not waiting:
                progress(f"waiting for another process that prepares {target.name}")
                waiting = True
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"another process has held {lock} for {timeout_s:g} s; stop it, then try again"
                )
            time.sleep(_POLL_S)
        yield  # closing the file frees the lock


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Bring the content to disk before the rename, or a power cut could leave an empty entry."""
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
