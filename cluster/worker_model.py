"""Loads what a worker runs: a real model on the CPU, or the fake one that needs no weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.config import FAKE_CONTEXT_TOKENS, FAKE_MODEL, FAKE_VOCAB_SIZE
from cluster.worker_settings import WorkerSettings
from engine.fake_runner import FakeRunner, fake_layout
from engine.kv_pool import KVPool, blocks_in
from engine.layout import KVLayout
from engine.runner import Runner
from engine.step import Drawn, StepPlan

NAP_S = 0.5  # of a slow step of the fake model: a sign of life follows each
FAKE_BLOCKS_MAX = 16_384  # its blocks are tiny: kv_memory would hold millions


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerModel:
    """A loaded model with its KV pool."""

    name: str
    runner: Runner
    pool: KVPool
    context_tokens: int
    eos_token_ids: tuple[int, ...]
    exact: bool
    exact_reason: str

    @property
    def layout(self) -> KVLayout:
        """How the pool lies in memory."""
        return self.runner.layout

    def num_swap_slots(self, swap_bytes: int) -> int:
        """Blocks that so much host memory holds, and never more than the pool has."""
        return min(swap_bytes // self.pool.block_bytes, self.pool.num_blocks)

    def close(self) -> None:
        """Gives the pool's memory back; nothing may run any more."""
        self.pool.close()


class PacedRunner:
    """A runner whose steps take at least `step_ms`, so that tests meet requests in flight."""

    def __init__(self, runner: Runner, step_ms: int) -> None:
        self._runner = runner
        self._step_s = step_ms / 1000
        self._num_naps = 0

    @property
    def layout(self) -> KVLayout:
        """How the pool lies in memory."""
        return self._runner.layout

    @property
    def progress(self) -> int:
        """Of the runner, and of its own waiting."""
        return self._runner.progress + self._num_naps

    def run(self, plan: StepPlan) -> Sequence[Drawn | None]:
        """Runs the step, then waits for its time to be over."""
        over_s = time.monotonic() + self._step_s
        sampled = self._runner.run(plan)
        while (left_s := over_s - time.monotonic()) > 0:
            time.sleep(min(left_s, NAP_S))
            self._num_naps += 1
        return sampled


def load_model(settings: WorkerSettings) -> WorkerModel:
    """Raises ModelError (a ValueError) for a model that cannot be served, ValueError for a pool that does not fit."""
    return _fake(settings) if settings.config.model == FAKE_MODEL else _real(settings)


def _fake(settings: WorkerSettings) -> WorkerModel:
    config = settings.config
    layout = fake_layout(block_size=config.block_size)
    num_blocks = min(FAKE_BLOCKS_MAX, blocks_in(int(config.kv_memory), layout.block_bytes))
    pool = KVPool(num_blocks=num_blocks, block_bytes=layout.block_bytes, inheritable=True)
    runner: Runner = FakeRunner(
        num_blocks=num_blocks,
        block_size=config.block_size,
        vocab_size=FAKE_VOCAB_SIZE,
        layout=layout,
        memory=pool.view,
    )
    if config.fake_step_ms:
        runner = PacedRunner(runner, config.fake_step_ms)
    return WorkerModel(
        name=FAKE_MODEL,
        runner=runner,
        pool=pool,
        context_tokens=FAKE_CONTEXT_TOKENS,
        eos_token_ids=(),
        exact=True,
        exact_reason="integers",
    )


def _real(settings: WorkerSettings) -> WorkerModel:
    from engine.cpu_runner import CpuRunner  # brings torch, which the fake model does without

    config = settings.config
    runner = CpuRunner.load(
        config.model,
        dtype=config.dtype,
        exact=config.exact,
        kv_bytes=int(config.kv_memory),
        block_size=config.block_size,
        threads=settings.threads,
        inheritable=True,
    )
    return WorkerModel(
        name=runner.files.name,
        runner=runner,
        pool=runner.pool,
        context_tokens=runner.arch.context_tokens,
        eos_token_ids=runner.arch.eos_token_ids,
        exact=runner.exact_ok,
        exact_reason=runner.exact_reason,
    )
