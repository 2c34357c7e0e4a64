"""Streams over the fake model that go on while a test strikes: each token is checked, each gap measured."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from engine.fake_runner import expected_tokens
from tandem.client import Client
from tandem.errors import TandemError
from tandem.request import Sampling

VOCAB = 256


class CheckedStreams:
    """`with CheckedStreams(address, num=4):` keeps so many streams open, one after another, until the end."""

    def __init__(self, address: str, *, num: int = 4, tokens: int = 200, timeout_s: float = 120.0) -> None:
        self._address = address
        self._tokens = tokens
        self._timeout_s = timeout_s
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self.num_finished = 0
        self.num_tokens = 0
        self.wrong: list[str] = []
        self.longest_gap_s = 0.0
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
        with Client(self._address, timeout_s=self._timeout_s) as client:
            turn = 0
            while not self._stopping.is_set():
                turn += 1
                prompt = [(number * 31 + turn * 7 + place) % VOCAB for place in range(50 + number)]
                self._read(client, prompt, seed=number + turn)

    def _read(self, client: Client, prompt: list[int], *, seed: int) -> None:
        temperature = float(seed % 2)
        sampling = Sampling(temperature=temperature, seed=seed)
        wanted = expected_tokens(prompt, sampling, self._tokens, VOCAB)
        got: list[int] = []
        heard_s = time.monotonic()
        try:
            stream = client.stream(
                prompt, temperature=temperature, seed=seed, max_tokens=self._tokens, ignore_eos=True
            )  # fmt: skip
            for chunk in stream:
                now_s = time.monotonic()
                with self._lock:
                    self.longest_gap_s = max(self.longest_gap_s, now_s - heard_s)
                    self.num_tokens += len(chunk.token_ids)
                heard_s = now_s
                if chunk.token_ids and chunk.index != len(got):
                    self.wrong.append(f"token {chunk.index} came where {len(got)} was due")
                got += chunk.token_ids
        except TandemError as error:
            self.wrong.append(f"lost after {len(got)} tokens: {error}")
            return
        if got != wanted:
            self.wrong.append(f"wrong: {got[:8]}..., must be {wanted[:8]}...")
        with self._lock:
            self.num_finished += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(self._timeout_s)
        if kind is None:
            assert not self.wrong, self.wrong
            assert not any(thread.is_alive() for thread in self._threads), "a stream hangs"
