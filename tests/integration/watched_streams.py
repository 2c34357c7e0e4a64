"""Streams of a fake cluster, each read by a thread that checks its tokens and measures how long it waits for them."""

from __future__ import annotations

import threading
import time

from cluster_under_test import ClusterUnderTest
from served import wait_until

from engine.fake_runner import expected_tokens
from tandem.client import Client
from tandem.request import Sampling

GREEDY = Sampling(temperature=0.0)


class Streams:
    """Some streams at once, each on a thread: their tokens, and the longest wait of each for the next one."""

    def __init__(self, cluster: ClusterUnderTest, num: int, *, salt: int = 37, num_tokens: int = 1_500) -> None:
        self.answers: list[list[int]] = [[] for _ in range(num)]
        self.gaps_s = [0.0] * num
        self.num_tokens = num_tokens
        self.prompts = [[(number * salt + each * salt) % 256 for each in range(100)] for number in range(num)]
        self._address = cluster.grpc_address
        self._threads = [threading.Thread(target=self._read, args=(number,)) for number in range(num)]
        for thread in self._threads:
            thread.start()

    def _read(self, number: int) -> None:
        with Client(self._address, timeout_s=120) as client:
            last_s = None
            for chunk in client.stream(self.prompts[number], temperature=0.0, max_tokens=self.num_tokens):
                now_s = time.monotonic()
                if last_s is not None:
                    self.gaps_s[number] = max(self.gaps_s[number], now_s - last_s)
                last_s = now_s
                self.answers[number] += chunk.token_ids

    def wait_for_tokens(self, num: int) -> None:
        """Until each has so many."""
        wait_until(lambda: all(len(answer) >= num for answer in self.answers), 60)

    def check(self, *, gap_s_max: float) -> None:
        """Waits for all to end: each token is right, and none was long in coming."""
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()
        for prompt, answer in zip(self.prompts, self.answers, strict=True):
            assert answer == expected_tokens(prompt, GREEDY, self.num_tokens, 256)
        print(f"longest gap {max(self.gaps_s):.2f} s")
        assert max(self.gaps_s) < gap_s_max
