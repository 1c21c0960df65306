"""A cheap identity for a model folder: equal files give equal fingerprints on every machine.

Two nodes may hand a KV cache over only if they compute with the same weights and speak the same
token ids. Hashing whole files would take seconds per gigabyte at every start, so the content of a
weight file is sampled: its header in full (names, shapes, dtypes, offsets) and evenly spaced
pieces of its data. That tells one model, fine-tune or quantisation from another, which is what it
is for; it is no proof against somebody who forges a file on purpose.

Neither path nor modification time counts, and nor do the fields of `config.json` that only record
who wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO, Protocol

from baton.errors import UnsupportedModel
from baton.model.folder import (
    CONFIG_FILE,
    GENERATION_FILE,
    TOKENIZER_FILE,
    read_json,
    read_json_if_present,
    weight_files,
)
from baton.model.safetensors_header import read_header

SAMPLES_PER_FILE = 16
SAMPLE_BYTES = 64 << 10
_DIGEST_BYTES = 16
_WRITER_ONLY_FIELDS = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures"}
)


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


def fingerprint(folder: Path) -> str:
    """32 hexadecimal characters that name the model in `folder`.

    Reads about 1 MiB of each weight file. Raises `UnsupportedModel` where a file is missing or
    is no safetensors file.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES, person=b"baton-model-1")
    _add(digest, "config", _canonical_config(folder))
    try:
        _add(digest, "tokenizer", (folder / TOKENIZER_FILE).read_bytes())
        for file in weight_files(folder):
            with file.open("rb") as stream:
                header = read_header(stream, file)
                _add(digest, file.name, header)
                _add_samples(digest, stream, 8 + len(header))
    except OSError as error:
        raise UnsupportedModel(f"{error.filename} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def file_fingerprint(file: Path) -> str:
    """32 hexadecimal characters that name the content of any one large file, sampled likewise."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES, person=b"baton-file-1")
    with file.open("rb") as stream:
        _add(digest, "head", stream.read(SAMPLE_BYTES))
        _add_samples(digest, stream, 0)
    return digest.hexdigest()


def _add(digest: _Hash, label: str, content: bytes) -> None:
    """Length-prefixed, so that bytes cannot move from one part to the next unnoticed."""
    digest.update(f"{label}:{len(content)}\n".encode())
    digest.update(content)


def _canonical_config(folder: Path) -> bytes:
    config = read_json(folder, CONFIG_FILE)
    kept = {key: value for key, value in config.items() if key not in _WRITER_ONLY_FIELDS}
    # Sampling defaults do not change what is computed, but the ids that end an answer do.
    kept["generation_eos"] = read_json_if_present(folder, GENERATION_FILE).get("eos_token_id")
    return json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _add_samples(digest: _Hash, stream: BinaryIO, start: int) -> None:
    """Pieces of everything after `start`, the first and the last byte among them."""
    size = os.fstat(stream.fileno()).st_size
    last = max(start, size - SAMPLE_BYTES)
    digest.update(f"size:{size}\n".encode())
    for index in range(SAMPLES_PER_FILE):
        stream.seek(start + (last - start) * index // (SAMPLES_PER_FILE - 1))
        _add(digest, str(index), stream.read(SAMPLE_BYTES))
