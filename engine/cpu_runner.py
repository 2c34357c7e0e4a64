"""Runs steps of a real model on the CPU: a StepPlan into tensors, through the decoder, and its rows sampled."""

from __future__ import annotations

import contextlib
from itertools import chain

import numpy as np
import torch

from engine.arch import ArchSpec
from engine.exactness import fingerprint, namespace, self_test
from engine.kv_pool import KVPool, blocks_in
from engine.layout import KVLayout
from engine.model import Decoder, StepTensors
from engine.model_files import ModelFiles, find_model, read_arch
from engine.sampler import Sampler
from engine.step import Drawn, StepPlan
from engine.weights import load_weights


class CpuRunner:
    """A Runner over torch and the CPU kernels. One thread at a time may call `run`.

    `exact` says what was asked and `exact_ok`, with `exact_reason`, whether this machine keeps the promise.
    """

    def __init__(self, *, files: ModelFiles, arch: ArchSpec, decoder: Decoder, pool: KVPool, layout: KVLayout) -> None:
        self.files = files
        self.arch = arch
        self.pool = pool
        self.exact = False
        self.exact_ok = False
        self.exact_reason = "fast mode was asked for"
        self._decoder = decoder
        self._sampler = Sampler(vocab_size=arch.vocab_size, eos_token_ids=arch.eos_token_ids)
        self._layout = layout
        self._tensor = pool.tensor(layout)

    @classmethod
    def load(
        cls,
        model: str,
        *,
        dtype: str = "float32",
        exact: bool = True,
        num_blocks: int | None = None,
        kv_bytes: int | None = None,
        block_size: int = 16,
        threads: int = 1,
        inheritable: bool = False,
    ) -> CpuRunner:
        """Loads `model` (see `find_model`) and makes its KV pool of `num_blocks`, or as many as `kv_bytes` hold.

        With `inheritable`, child processes may be given the pool's descriptor.

        Raises:
            ModelError: the model cannot be found, read or served.
            ValueError: the pool has no room for a block or does not fit into memory, or a number is out of range.
        """
        if (num_blocks is None) == (kv_bytes is None):
            raise ValueError("give the KV pool's size either as num_blocks or as kv_bytes")
        if threads < 1 or block_size < 1:
            raise ValueError(f"threads is {threads} and block_size {block_size}, both must be at least 1")
        _use_threads(threads)
        files = find_model(model)
        arch = read_arch(files)
        weights = load_weights(files, arch, dtype=dtype, exact=exact)
        layout = KVLayout(
            namespace=namespace(model=files.name, arch=arch, weights=weights, dtype=dtype, block_size=block_size),
            fingerprint=fingerprint(dtype=dtype, exact=exact),
            num_layers=arch.num_layers,
            num_kv_heads=arch.num_kv_heads,
            head_dim=arch.head_dim,
            block_size=block_size,
            dtype=dtype,
        )
        if kv_bytes is not None:
            num_blocks = blocks_in(kv_bytes, layout.block_bytes)
        assert num_blocks is not None
        pool = KVPool(num_blocks=num_blocks, block_bytes=layout.block_bytes, inheritable=inheritable)
        pool.populate()
        runner = cls(
            files=files, arch=arch, decoder=Decoder(arch, weights, num_threads=threads), pool=pool, layout=layout
        )
        if exact:
            runner.exact = True
            runner.exact_ok, runner.exact_reason = self_test(arch, weights, num_threads=threads)
        return runner

    @property
    def layout(self) -> KVLayout:
        """How the pool lies in memory."""
        return self._layout

    @property
    def progress(self) -> int:
        """Layers begun."""
        return self._decoder.num_layers_begun

    def run(self, plan: StepPlan) -> list[Drawn | None]:
        """Runs the step; one result per row, None where the row is not sampled, Undrawn where it is not finite."""
        logits = self._decoder.forward(self._tensors(plan), self._tensor).float()
        drawn = iter(self._sampler.sample(logits, [row for row in plan.rows if row.sample]))
        return [next(drawn) if row.sample else None for row in plan.rows]

    def logits(self, plan: StepPlan) -> torch.Tensor:
        """Runs the step; float32 logits `[sampled rows, vocab_size]`, in the plan's order."""
        return self._decoder.forward(self._tensors(plan), self._tensor).float().clone()

    def close(self) -> None:
        """Gives the pool's memory back; the runner must not be used any more."""
        del self._tensor
        self.pool.close()

    def _tensors(self, plan: StepPlan) -> StepTensors:
        size = self._layout.block_size
        rows = plan.rows
        ends = [row.start + len(row.tokens) for row in rows]
        widths = [-(-end // size) for end in ends]
        tables = np.zeros((len(rows), max(widths)), dtype=np.int32)
        for index, (row, width) in enumerate(zip(rows, widths, strict=True)):
            tables[index, :width] = row.blocks[:width]
        lengths = np.fromiter((len(row.tokens) for row in rows), dtype=np.int64, count=len(rows))
        starts = np.fromiter((row.start for row in rows), dtype=np.int64, count=len(rows))
        lasts = np.cumsum(lengths)
        of_row = np.repeat(np.arange(len(rows)), lengths)
        positions = np.arange(lasts[-1]) - (lasts - lengths - starts)[of_row]
        slots = tables[of_row, positions // size].astype(np.int64) * size + positions % size
        sampled = np.array([last - 1 for row, last in zip(rows, lasts, strict=True) if row.sample], dtype=np.int64)
        tokens = np.fromiter(chain.from_iterable(row.tokens for row in rows), dtype=np.int64, count=len(of_row))
        return StepTensors(
            tokens=torch.from_numpy(tokens),
            positions=torch.from_numpy(positions),
            slots=torch.from_numpy(slots),
            block_tables=torch.from_numpy(tables),
            starts=torch.from_numpy(starts.astype(np.int32)),
            lengths=torch.from_numpy(lengths.astype(np.int32)),
            sampled=torch.from_numpy(sampled),
            context_tokens=max(ends),
        )


def _use_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    # Steps run one after another: a second pool of threads has nothing to do. It can only be set before its first use.
    if torch.get_num_interop_threads() != 1:
        with contextlib.suppress(RuntimeError):
            torch.set_num_interop_threads(1)
