"""Streams over the fake model that are read while a test strikes: each token is checked, each gap measured."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from cluster_under_test import ClusterUnderTest
from served import wait_until

from engine.fake_runner import expected_tokens
from tandem.client import Client
from tandem.errors import TandemError
from tandem.request import Sampling

VOCAB = 256
TIMEOUT_S = 120.0


class Answer:
    """One stream as it is read."""

    def __init__(self, prompt: list[int], *, num_tokens: int, temperature: float = 0.0, seed: int = 0) -> None:
        self._prompt = prompt
        self._num_tokens = num_tokens
        self._sampling = Sampling(temperature=temperature, seed=seed)
        self.tokens: list[int] = []
        self.longest_gap_s = 0.0  # between two tokens

    def read(self, client: Client, *, heard: Callable[[int, float], None] = lambda num, gap_s: None) -> str:
        """Reads it to its end; returns what was wrong with it, or empty.

        `heard` is told how many tokens have come, and after how long: also the first ones.
        """
        last_s = time.monotonic()
        try:
            for chunk in client.stream(
                self._prompt,
                temperature=self._sampling.temperature,
                seed=self._sampling.seed,
                max_tokens=self._num_tokens,
                ignore_eos=True,
            ):
                now_s = time.monotonic()
                gap_s, last_s = now_s - last_s, now_s
                heard(len(chunk.token_ids), gap_s)
                if self.tokens:
                    self.longest_gap_s = max(self.longest_gap_s, gap_s)
                if chunk.token_ids and chunk.index != len(self.tokens):
                    return f"token {chunk.index} came where {len(self.tokens)} was due"
                self.tokens += chunk.token_ids
        except TandemError as error:
            return f"lost after {len(self.tokens)} tokens: {error}"
        wanted = expected_tokens(self._prompt, self._sampling, self._num_tokens, VOCAB)
        return "" if self.tokens == wanted else f"wrong: {self.tokens[:8]}..., must be {wanted[:8]}..."


class Streams:
    """Some streams at once, each read to its end on a thread."""

    def __init__(self, cluster: ClusterUnderTest, num: int, *, salt: int = 37, num_tokens: int = 1_500) -> None:
        prompts = [[(number * salt + each * salt) % VOCAB for each in range(100)] for number in range(num)]
        self._answers = [Answer(prompt, num_tokens=num_tokens) for prompt in prompts]
        self._address = cluster.grpc_address
        self._wrong: list[str] = []
        self._threads = [threading.Thread(target=self._read, args=(each,)) for each in self._answers]
        for thread in self._threads:
            thread.start()

    def _read(self, answer: Answer) -> None:
        with Client(self._address, timeout_s=TIMEOUT_S) as client:
            wrong = answer.read(client)
        if wrong:
            self._wrong.append(wrong)

    def wait_for_tokens(self, num: int) -> None:
        """Until each has so many."""
        wait_until(lambda: all(len(each.tokens) >= num for each in self._answers), 60)

    def check(self, *, gap_s_max: float) -> None:
        """Waits for all to end: each token is right, and none was long in coming after another."""
        for thread in self._threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()
        assert not self._wrong, self._wrong
        longest_s = max(each.longest_gap_s for each in self._answers)
        print(f"longest gap {longest_s:.2f} s")
        assert longest_s < gap_s_max


class CheckedStreams:
    """`with CheckedStreams(address, num=4):` keeps so many streams open, one after another, until the end."""

    def __init__(self, address: str, *, num: int = 4, tokens: int = 200) -> None:
        self._address = address
        self._tokens = tokens
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self.num_finished = 0
        self.num_tokens = 0
        self.wrong: list[str] = []
        self.longest_gap_s = 0.0  # the wait for a first token, too
        self._threads = [threading.Thread(target=self._client, args=(number,), daemon=True) for number in range(num)]

    def __enter__(self) -> CheckedStreams:
        for thread in self._threads:
            thread.start()
        self.wait_for_tokens(4 * len(self._threads), 60)
        return self

    def wait_for_tokens(self, num: int, timeout_s: float) -> float:
        """Waits until `num` more tokens have come; seconds that it took."""
        began_s, goal = time.monotonic(), self.num_tokens + num
        while self.num_tokens < goal:
            assert not self.wrong, self.wrong
            assert time.monotonic() - began_s < timeout_s, f"{goal - self.num_tokens} of {num} tokens never came"
            self._stopping.wait(0.02)
        return time.monotonic() - began_s

    def wait_for_finished(self, num: int, timeout_s: float) -> None:
        """Waits until `num` more streams have ended well."""
        began_s, goal = time.monotonic(), self.num_finished + num
        while self.num_finished < goal:
            assert not self.wrong, self.wrong
            assert time.monotonic() - began_s < timeout_s, f"{goal - self.num_finished} streams never ended"
            self._stopping.wait(0.02)

    def _client(self, number: int) -> None:
        with Client(self._address, timeout_s=TIMEOUT_S) as client:
            turn = 0
            while not self._stopping.is_set():
                turn += 1
                prompt = [(number * 31 + turn * 7 + place) % VOCAB for place in range(50 + number)]
                seed = number + turn
                answer = Answer(prompt, num_tokens=self._tokens, temperature=float(seed % 2), seed=seed)
                wrong = answer.read(client, heard=self._heard)
                if wrong:
                    self.wrong.append(wrong)
                with self._lock:
                    self.num_finished += not wrong

    def _heard(self, num: int, gap_s: float) -> None:
        with self._lock:
            self.num_tokens += num
            self.longest_gap_s = max(self.longest_gap_s, gap_s)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
        if kind is None:
            assert not self.wrong, self.wrong
            assert not any(thread.is_alive() for thread in self._threads), "a stream hangs"
