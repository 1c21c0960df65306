"""llama.cpp through its Python binding's low-level calls: batches of several sequences."""

from __future__ import annotations

import argparse
import time

import llama_cpp
import numpy as np
from serving import prompt_ids, serve

_CONTEXT = 16_384
_BATCH = 512


class LlamaCpp:
    def __init__(self, gguf: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(gguf.encode(), parameters)
        if not self._model:
            raise RuntimeError(f"{gguf} cannot be loaded")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = _CONTEXT, _BATCH, _BATCH
        settings.n_seq_max = 64
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def prefill(self, tokens: int) -> None:
        self._clear()
        self._read_prompt(prompt_ids(tokens), 0)

    def decode(self, batch: int, context: int, steps: int) -> float:
        self._clear()
        token_ids = [self._read_prompt(prompt_ids(context, row), row) for row in range(batch)]
        begun = time.perf_counter()
        for step in range(steps):
            rows = [(token, context + step, row, True) for row, token in enumerate(token_ids)]
            self._decode(rows)
            token_ids = [self._best(row) for row in range(batch)]
        return time.perf_counter() - begun

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _read_prompt(self, prompt: list[int], sequence: int) -> int:
        for start in range(0, len(prompt), _BATCH):
            part = prompt[start : start + _BATCH]
            last = len(prompt) - 1
            rows = [(t, start + i, sequence, start + i == last) for i, t in enumerate(part)]
            self._decode(rows)
        return self._best(len(rows) - 1)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _best(self, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    serve("llama.cpp", llama_cpp.__version__, LlamaCpp(options.gguf, options.threads))
