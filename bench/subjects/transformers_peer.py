"""transformers, as its own documentation uses it: eager model, dynamic cache, SDPA attention."""

from __future__ import annotations

import argparse
import time

import torch
import transformers
from serving import prompt_ids, serve


class Transformers:
    def __init__(self, folder: str, dtype: str) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        ).eval()

    @torch.inference_mode()
    def prefill(self, tokens: int) -> None:
        ids = torch.tensor([prompt_ids(tokens)])
        self._model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)

    @torch.inference_mode()
    def decode(self, batch: int, context: int, steps: int) -> float:
        ids = torch.tensor([prompt_ids(context, row) for row in range(batch)])
        out = self._model(ids, use_cache=True, logits_to_keep=1)
        begun = time.perf_counter()
        for _ in range(steps):
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            out = self._model(ids, past_key_values=out.past_key_values, use_cache=True)
        return time.perf_counter() - begun


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    serve("transformers", transformers.__version__, Transformers(options.folder, options.dtype))
