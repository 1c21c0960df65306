"""What a model folder holds, and how its small files are read.

Baton reads one layout, that of Hugging Face: `config.json`, `tokenizer.json`,
`tokenizer_config.json` and one or more `*.safetensors`. Whatever else a model comes as is turned
into such a folder first (see `catalog`). Files that unpickle to code are never opened.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from baton.errors import UnsupportedModel

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
WEIGHT_FILE = "model.safetensors"
INT4_FILE = "int4.blocks"
"""Beside `model.safetensors`, what an import kept of a GGUF file's 4-bit blocks. It is of the same
format, but others that read the folder load every `*.safetensors` in it as weights."""
WEIGHT_INDEX_FILE = "model.safetensors.index.json"


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in one JSON file of `folder`. Raises `UnsupportedModel` with what to change."""
    try:
        content = json.loads((folder / name).read_bytes())
    except FileNotFoundError as error:
        raise UnsupportedModel(
            f"{folder} has no {name}; give a Hugging Face model folder or a .gguf file"
        ) from error
    except OSError as error:
        raise UnsupportedModel(f"{folder / name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UnsupportedModel(
            f"{folder / name} is not valid JSON ({error}); fetch the model again"
        ) from error
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{folder / name} must hold a JSON object; fetch the model again")
    return content


def read_json_if_present(folder: Path, name: str) -> dict[str, Any]:
    """As `read_json`, and an empty object where there is no such file."""
    return read_json(folder, name) if (folder / name).exists() else {}


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files that hold the model's weights, sorted by name.

    An index decides where there is one: repositories often carry a second copy of the weights
    (`consolidated.safetensors`) beside those the index names.
    Raises `UnsupportedModel` where there are none, or one that the index names is missing.
    """
    if (folder / WEIGHT_INDEX_FILE).exists():
        names = read_json(folder, WEIGHT_INDEX_FILE).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise UnsupportedModel(f"{folder / WEIGHT_INDEX_FILE} has no weight_map")
        files = sorted({folder / Path(str(name)).name for name in names.values()})
    elif (folder / WEIGHT_FILE).exists():
        files = [folder / WEIGHT_FILE]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if missing := [file.name for file in files if not file.is_file()]:
        raise UnsupportedModel(f"{folder} lacks {', '.join(missing)}; fetch the model again")
    if not files:
        raise UnsupportedModel(
            f"{folder} has no *.safetensors; Baton reads no other weight files (pickled .bin files "
            "can run code), so convert the weights to safetensors"
        )
    return tuple(files)
