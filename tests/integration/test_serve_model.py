"""`tandem serve` with the real model: what transformers wrote down, token for token, from two pools of workers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served import Served

from benchmarks.equality import Expected, read_oracle
from tandem.client import Client

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(300)]

NUM_TOKENS = 32
ORACLE = Path(__file__).parent.parent / "testdata" / "oracle_smollm2.json"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(["--kv-memory", "128MiB"], run_dir=tmp_path_factory.mktemp("run")) as served:
        yield served


def oracle() -> list[Expected]:
    """A few prompts of each length, without near ties in the tokens that are compared."""
    prompts = [each for each in read_oracle(ORACLE) if min(each.gaps, default=NUM_TOKENS) >= NUM_TOKENS]
    return sorted(prompts, key=lambda each: len(each.prompt))[:: max(1, len(prompts) // 8)]


def ask(address: str, prompts: list[Expected]) -> list[list[int]]:
    with Client(address, timeout_s=120) as client, ThreadPoolExecutor(len(prompts)) as pool:
        asks = [
            pool.submit(client.generate, each.prompt, temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
            for each in prompts
        ]
        return [list(each.result().token_ids) for each in asks]


def test_tokens_are_those_of_transformers_at_once_and_again_from_the_prefix_cache(cluster: Served) -> None:
    prompts = oracle()
    assert len(prompts) >= 8
    wanted = [list(each.tokens[:NUM_TOKENS]) for each in prompts]
    address = str(cluster.status()["grpc_address"])
    assert ask(address, prompts) == wanted
    assert ask(address, prompts) == wanted
    status = cluster.status_when(lambda status: all(each["state"] == "finished" for each in status["requests"]))
    assert len(status["requests"]) == 2 * len(prompts)
    for request in status["requests"]:
        assert request["prefill_worker"] == "prefill-0"
        assert request["decode_worker"] in ("decode-0", "decode-1")
        assert request["tokens_recomputed"] == 0
        assert request["blocks_moved"] == request["blocks_granted"]
    for worker in status["workers"]:
        assert worker["audit"] == []


def test_a_chat_is_answered_with_text(cluster: Served) -> None:
    messages = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    answer = cluster.chat(messages, max_tokens=16)
    assert "Paris" in answer
