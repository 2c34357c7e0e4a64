"""One step of the engine: which sequences run which tokens next, and what follows from what was sampled."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from engine.blocks import BlockLedger
from engine.prefix_cache import chain_hash, root_hash
from engine.pressure import Answer
from engine.sequence import Sequence
from engine.swapping import Swapping
from tandem.errors import NotFinite
from tandem.request import FinishReason, RequestId, Sampling, Token, is_canary


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """The part of one sequence that one step runs.

    `tokens` lie at positions start, start + 1, ...; their KV goes to slot `blocks[p // block_size]`, p % block_size.
    Where `sample` is set, the token at position start + len(tokens) is drawn from the last one's logits.
    """

    request_id: RequestId
    tokens: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]  # the whole block table; may be longer than what this step reaches
    sample: bool
    sampling: Sampling
    num_prompt_tokens: int
    context: tuple[int, ...] = ()  # all tokens up to and with this row's, where penalties need them; else empty

    @property
    def position(self) -> int:
        """The absolute position of the token that the row samples."""
        return self.start + len(self.tokens)

    @property
    def index(self) -> int:
        """The index among the answer tokens of the token that the row samples."""
        return self.start + len(self.tokens) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step: never empty, at most one row a sequence.

    Before its rows, blocks are copied: `copies_out` (block, slot) to the swap space, then `copies_back` (slot, block).
    """

    rows: tuple[StepRow, ...]
    copies_out: tuple[tuple[int, int], ...] = ()
    copies_back: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(len(row.tokens) for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One drawn token. `logprob` and `top` (token id, logprob; most likely first) are there where they were asked."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Undrawn:
    """The row came to nothing, and its sequence ends: `code` says what kind of failure it was, `reason` is for people.

    Unless a runner says otherwise, what the model says of this row is not finite.
    """

    reason: str
    code: str = NotFinite.code


Drawn = Sampled | Undrawn


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """Bounds of one step, and what the model says.

    A step runs every decode that fits `max_rows`, then prefill chunks up to `max_tokens_per_step` tokens in all; one
    chunk always goes in, in place of a decode where there is no row left (with one row, by turns), so that many decodes
    cannot starve prefill. Chunks end at absolute multiples of `chunk_tokens`, wherever a prefix hit begins, so that a
    kernel sees the same chunks in every life of a request.
    """

    max_tokens_per_step: int = 512
    max_rows: int = 64
    chunk_tokens: int = 256
    context_tokens: int = 8192
    eos_token_ids: tuple[int, ...] = ()
    namespace: bytes = b""
    publish: bool = True  # off: no prefix is ever shared

    def __post_init__(self) -> None:
        for name in ("max_tokens_per_step", "max_rows", "chunk_tokens", "context_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.max_tokens_per_step < self.chunk_tokens:
            raise ValueError(
                f"max_tokens_per_step is {self.max_tokens_per_step}, must be at least chunk_tokens, {self.chunk_tokens}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A sequence that cannot go on here, nor would elsewhere: `code` is out_of_blocks, or Undrawn's."""

    request_id: RequestId
    epoch: int
    code: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What one step did.

    `tokens` are new answer tokens; the last of a finished request carries its finish reason. `computed` holds, for
    each request of the plan, how many of its tokens are computed after the step (prefill chunks and decodes alike).
    `finished` and `failed` have left the batch and own no blocks any more.
    """

    tokens: tuple[Token, ...] = ()
    computed: dict[RequestId, int]
    finished: tuple[RequestId, ...] = ()
    failed: tuple[Failed, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Preemption:
    """A sequence loses its blocks: swapped out, they come back; else its tokens are prefilled again."""

    request_id: RequestId
    swapped: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counted:
    """What a batch is asked about all its sequences."""

    running: int
    backlog_tokens: int


class Batch:
    """The sequences of one engine: continuous batching with chunked prefill over the block ledger.

    Decodes go first. When blocks run out, the youngest preemptible sequence loses its own; the oldest therefore always
    gets on. It is swapped out, and who wanted its blocks waits for that step; or it is prefilled again later from its
    tokens (engine/pressure.py has the rule). A new sequence starts only when the blocks that all started ones still
    need for the tokens they have, and its own, are there.
    """

    def __init__(self, ledger: BlockLedger, config: BatchConfig, swapping: Swapping | None = None) -> None:
        self.ledger = ledger
        self.config = config
        self.swapping = Swapping(ledger.block_size) if swapping is None else swapping
        self._sequences: dict[RequestId, Sequence] = {}
        self._num_added = 0
        self._num_steps = 0
        self._prefilled = False  # the last step had a row that was no decode's
        self._preempted: list[Preemption] = []
        self._running: dict[RequestId, Sequence] = {}  # the rows of the step under way
        self._counted: _Counted | None = None  # None: something has changed since

    # ---- what is here ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._sequences

    def get(self, request_id: RequestId) -> Sequence | None:
        """The sequence, or None when it is not here."""
        return self._sequences.get(request_id)

    def sequences(self) -> tuple[Sequence, ...]:
        """All sequences, oldest first."""
        return tuple(self._sequences.values())

    def is_running(self, request_id: RequestId) -> bool:
        """Whether the step under way runs the sequence that is here under this name."""
        running = self._running.get(request_id)
        return running is not None and running is self._sequences.get(request_id)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return self._count().running

    @property
    def num_waiting(self) -> int:
        """Sequences that hold none yet, or none any more."""
        return len(self._sequences) - self.num_running

    @property
    def prefill_backlog_tokens(self) -> int:
        """Tokens to compute before every sequence here is in decode; held ones count too."""
        return self._count().backlog_tokens

    def _count(self) -> _Counted:
        """Counts once for all events between two changes: a worker's load is looked at with each."""
        if self._counted is None:
            every = self._sequences.values()
            self._counted = _Counted(
                running=sum(each.started for each in every),
                backlog_tokens=sum(each.num_left for each in every if not each.decoding),
            )
        return self._counted

    def refusal(self, *, num_tokens: int, request_id: RequestId) -> str | None:
        """Why a sequence of that many tokens can never run here, or None when it can."""
        if num_tokens >= self.config.context_tokens:
            return (
                f"{request_id} has {num_tokens} tokens, the context holds {self.config.context_tokens} with the answer"
            )
        needed = self._blocks_for(num_tokens)
        if needed > self.ledger.num_blocks:
            return (
                f"{request_id} needs {needed} KV blocks for {num_tokens} tokens, the pool has {self.ledger.num_blocks}"
            )
        return None

    # ---- what a role core does ---------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Takes a sequence in, from its first token or, after a handoff, with its blocks and `num_computed`.

        ValueError, with the limit in it, when it can never run here.
        """
        refusal = self.refusal(num_tokens=len(sequence.tokens), request_id=sequence.request_id)
        if refusal is not None:
            raise ValueError(refusal)
        assert sequence.request_id not in self._sequences, f"{sequence.request_id} is here already"
        assert len(sequence.blocks) >= self._blocks_for(sequence.num_computed), f"{sequence.request_id} lacks blocks"
        assert self.ledger.blocks_of(sequence.owner) == tuple(sequence.blocks), (
            f"{sequence.request_id}: the ledger has other blocks for {sequence.owner}"
        )
        self._counted = None
        self._num_added += 1
        sequence.arrival = self._num_added
        self._sequences[sequence.request_id] = sequence
        self._publish(sequence)

    def remove(self, request_id: RequestId) -> Sequence:
        """Takes the sequence out; its blocks stay its owner's. KeyError when it is not here."""
        sequence = self._sequences.pop(request_id)
        self._counted = None
        self.swapping.space.free(sequence.owner)
        return sequence

    def end(self, request_id: RequestId) -> Sequence | None:
        """Takes the sequence out and releases its blocks; None when it is not here."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._counted = None
            self.swapping.space.free(sequence.owner)
            self.ledger.release(sequence.owner)
        return sequence

    def hold(self, request_id: RequestId) -> None:
        """Runs the sequence no more until `resume`; it keeps its blocks. KeyError when it is not here."""
        self._sequences[request_id].held = True

    def resume(self, request_id: RequestId) -> None:
        """Lets a held sequence run again. KeyError when it is not here."""
        self._sequences[request_id].held = False

    def take_preempted(self) -> tuple[Preemption, ...]:
        """Sequences that lost their blocks since the last call, and why; they wait to be run again."""
        preempted = tuple(self._preempted)
        self._preempted.clear()
        return preempted

    # ---- composing a step --------------------------------------------------------------------------------------------

    def compose(self) -> StepPlan | None:
        """The next step, or None when nothing can run now. Blocks for its tokens are allocated already.

        From here until `apply` the step is under way: sequences may come and go meanwhile, but what the step reads and
        writes stays where it is.
        """
        assert not self._running, "a step is under way"
        self._counted = None
        self._num_steps += 1
        swapping = self.swapping
        swapping.begin()
        rows: dict[RequestId, StepRow] = {}
        decodes, rest = self._decodes()
        self._add_decodes(rows, decodes)
        num_decodes = len(rows)
        self._add_prefills(rows)
        self._prefilled = len(rows) > num_decodes
        self._add_decodes(rows, rest[: self.config.max_rows - len(rows)])
        if not rows and not swapping.copies:
            return None
        self._running = {request_id: self._sequences[request_id] for request_id in rows}
        self.ledger.begin_step({sequence.owner for sequence in (*self._running.values(), *swapping.copies)})
        return StepPlan(
            rows=tuple(rows.values()), copies_out=tuple(swapping.copies_out), copies_back=tuple(swapping.copies_back)
        )

    def _decodes(self) -> tuple[list[Sequence], list[Sequence]]:
        """Those that go before prefills, oldest first, and those that get the rows that no prefill takes."""
        ready = [s for s in self._sequences.values() if s.decoding and not s.held]
        num_rows = self.config.max_rows
        if any(not (s.decoding or s.held or s.copying) for s in self._sequences.values()):
            num_rows -= num_rows > 1 or not self._prefilled
        if len(ready) > num_rows:
            ready.sort(key=lambda s: s.last_step)  # stable: who waited longest, then who is oldest
        return sorted(ready[:num_rows], key=lambda s: s.arrival), ready[num_rows:]

    def _add_decodes(self, rows: dict[RequestId, StepRow], decodes: Seq[Sequence]) -> None:
        for sequence in decodes:
            # An older one may have taken the blocks of this one, or be having them swapped out.
            if sequence.decoding and self._provide(sequence, len(sequence.tokens), rows):
                rows[sequence.request_id] = self._row(sequence, len(sequence.tokens))

    def _add_prefills(self, rows: dict[RequestId, StepRow]) -> None:
        budget = self.config.max_tokens_per_step - len(rows)
        first = True
        may_start = True
        waiting = [s for s in self._sequences.values() if not s.held and not s.decoding]
        chunk = self.config.chunk_tokens
        for sequence in sorted(waiting, key=lambda s: (s.priority, s.arrival)):
            if len(rows) >= self.config.max_rows or (budget <= 0 and not first):
                return
            if sequence.copying:
                continue
            if not sequence.started:
                # The first that does not fit bars the way for all behind it: else a long one would wait forever.
                may_start = (
                    may_start and (first or min(len(sequence.tokens), chunk) <= budget) and self._start(sequence)
                )
                if not may_start:
                    continue
            end = min(len(sequence.tokens), (sequence.num_computed // chunk + 1) * chunk)
            length = end - sequence.num_computed
            if (length <= budget or first) and self._provide(sequence, end, rows):
                rows[sequence.request_id] = self._row(sequence, end)
                budget -= length
                first = False

    def _row(self, sequence: Sequence, end: int) -> StepRow:
        sequence.last_step = self._num_steps
        sampling = sequence.sampling
        sample = end == len(sequence.tokens)
        penalised = sample and (
            sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        )
        return StepRow(
            request_id=sequence.request_id,
            tokens=tuple(sequence.tokens[sequence.num_computed : end]),
            start=sequence.num_computed,
            blocks=sequence.block_table(),
            sample=sample,
            sampling=sampling,
            num_prompt_tokens=sequence.num_prompt_tokens,
            context=tuple(sequence.tokens) if penalised else (),
        )

    # ---- blocks ------------------------------------------------------------------------------------------------------

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.ledger.block_size)

    def _start(self, sequence: Sequence) -> bool:
        """Pins what the prefix cache has of the sequence, unless the rest of it would not fit.

        At least the last token is always computed, since its logits are wanted; and its block is a fresh one, since
        shared blocks are never written.
        """
        slots = self.swapping.space.slots_of(sequence.owner)
        matchable = (sequence.num_computed if slots else len(sequence.tokens) - 1) // self.ledger.block_size
        self._know_hashes(sequence, matchable)
        found = self.ledger.acquire(sequence.owner, sequence.hashes[:matchable])
        promised = sum(
            max(0, self._blocks_for(len(s.tokens)) - len(s.blocks))  # a migrated one comes with room to grow
            for s in self._sequences.values()
            if s.started and not s.held
        )
        # A block of growth for each that decodes; a lone sequence may have the pool to its last block.
        spare = sum(s.started and not s.held for s in self._sequences.values())
        needed = self._blocks_for(len(sequence.tokens)) - len(found)
        if is_canary(sequence.request_id):  # it is over before anybody misses its block
            promised = spare = 0
        if needed + promised + spare > self.ledger.num_available:
            self.ledger.release(sequence.owner)
            return False
        sequence.table = ()
        sequence.num_published = len(found)
        if slots:
            fresh = self.ledger.allocate(sequence.owner, needed)
            assert fresh is not None, "there are so many"
            sequence.blocks = [*found, *fresh]
            self.swapping.bring_back(sequence, num_found=len(found))
            return True
        sequence.blocks = found
        sequence.num_computed = sequence.num_cached_tokens = len(found) * self.ledger.block_size
        return True

    def _provide(self, sequence: Sequence, end: int, rows: dict[RequestId, StepRow]) -> bool:
        """Sees that there is a block for every position before `end`; False when the sequence must wait."""
        missing = self._blocks_for(end) - len(sequence.blocks)
        if missing <= 0:
            return True
        while (blocks := self.ledger.allocate(sequence.owner, missing)) is None:
            if self.swapping.claim(sequence, missing):
                return False  # what is swapped out in this step makes room for it
            victim = self._victim(sequence, rows)
            if victim is None:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks.extend(blocks)
        return True

    def _victim(self, wanting: Sequence, rows: dict[RequestId, StepRow]) -> Sequence | None:
        """The youngest preemptible sequence that is not planned already and no older than the one that wants.

        None, so that it waits, also when the next to be taken is leaving: whoever moves it looks after each step.
        """
        for sequence in reversed(self._sequences.values()):
            if sequence.arrival < wanting.arrival or (sequence.started and sequence.leaving):
                return None
            usable = sequence.started and sequence.preemptible and not (sequence.held or sequence.copying)
            if usable and sequence.request_id not in rows:
                return sequence
        return None

    def _preempt(self, sequence: Sequence) -> None:
        verdict = self.swapping.weigh(sequence)
        swapped = verdict.answer is Answer.SWAP
        if swapped:
            self.swapping.take_out(sequence, num_freed=self.ledger.num_sole(sequence.owner))
        else:
            self._lose_blocks(sequence)
            sequence.num_computed = 0
            self.swapping.num_recomputed += 1
        sequence.num_preemptions += 1
        self._preempted.append(Preemption(request_id=sequence.request_id, swapped=swapped, reason=verdict.reason))

    def _lose_blocks(self, sequence: Sequence) -> None:
        self.ledger.release(sequence.owner)
        sequence.blocks = []
        sequence.table = ()
        sequence.num_published = 0

    def _know_hashes(self, sequence: Sequence, num_blocks: int) -> None:
        size = self.ledger.block_size
        hashes = sequence.hashes
        for block in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else root_hash(self.config.namespace, sequence.cache_salt)
            hashes.append(chain_hash(parent, sequence.tokens[block * size : (block + 1) * size]))

    def _publish(self, sequence: Sequence) -> None:
        """Puts the blocks that are full and computed into the prefix index."""
        num_full = sequence.num_computed // self.ledger.block_size
        if not self.config.publish or num_full <= sequence.num_published:
            return
        self._know_hashes(sequence, num_full)
        for block in range(sequence.num_published, num_full):
            self.ledger.publish(sequence.owner, sequence.blocks[block], sequence.hashes[block])
        sequence.num_published = num_full

    # ---- after a step ------------------------------------------------------------------------------------------------

    def apply(self, plan: StepPlan, sampled: Seq[Drawn | None]) -> StepOutcome:
        """Books the step that has run: advances its sequences, publishes full blocks, ends what is finished.

        A row whose sequence has left since has no effect, also when another one has come under its name. A sequence
        whose row is not finite ends alone, and nobody shares what it read or wrote any more: the blocks may be what is
        broken.
        """
        assert [row.request_id for row in plan.rows] == list(self._running), "the step under way is another one"
        assert len(sampled) == len(plan.rows), f"{len(sampled)} results for {len(plan.rows)} rows"
        ran, self._running = self._running, {}
        self._counted = None
        for row, drawn in zip(plan.rows, sampled, strict=True):
            if isinstance(drawn, Undrawn):
                self.ledger.discard(ran[row.request_id].owner)
        self.ledger.end_step()
        self._end_copies()
        tokens: list[Token] = []
        computed: dict[RequestId, int] = {}
        finished: list[RequestId] = []
        failed: list[Failed] = []
        for row, drawn in zip(plan.rows, sampled, strict=True):
            sequence = ran[row.request_id]
            if self._sequences.get(row.request_id) is not sequence:
                continue
            computed[row.request_id] = row.position
            if isinstance(drawn, Undrawn):
                failed.append(_failed(sequence, drawn.code, drawn.reason))
                del self._sequences[row.request_id]
                continue
            sequence.num_computed = row.position
            self._publish(sequence)
            if not row.sample:
                continue
            assert drawn is not None, f"{row.request_id}: nothing was sampled"
            token = self._append(sequence, drawn)
            tokens.append(token)
            if token.finish is not None:
                finished.append(row.request_id)
                self.end(row.request_id)
            elif (needed := self._blocks_for(len(sequence.tokens))) > self.ledger.num_blocks:
                reason = f"{row.request_id} has grown to {needed} KV blocks, the pool has {self.ledger.num_blocks}"
                failed.append(_failed(sequence, "out_of_blocks", reason))
                self.end(row.request_id)
        return StepOutcome(tokens=tuple(tokens), computed=computed, finished=tuple(finished), failed=tuple(failed))

    def _end_copies(self) -> None:
        """The copies are made. Who has been held or moved meanwhile, and who has no other place, keeps its blocks."""
        for sequence in self.swapping.end():
            if self._sequences.get(sequence.request_id) is not sequence:
                continue
            if sequence.leaving or sequence.held:
                self.swapping.space.free(sequence.owner)
            else:
                self._lose_blocks(sequence)

    def _append(self, sequence: Sequence, drawn: Sampled) -> Token:
        index = sequence.index
        sequence.tokens.append(drawn.token_id)
        return Token(
            request_id=sequence.request_id,
            epoch=sequence.epoch,
            index=index,
            token_id=drawn.token_id,
            logprob=drawn.logprob,
            top=drawn.top,
            finish=finish_reason(sequence, self.config),
        )


def _failed(sequence: Sequence, code: str, reason: str) -> Failed:
    return Failed(request_id=sequence.request_id, epoch=sequence.epoch, code=code, reason=reason)


def finish_reason(sequence: Sequence, config: BatchConfig) -> FinishReason | None:
    """Why the sequence ends with its newest token, or None when it goes on."""
    sampling = sequence.sampling
    if sequence.index > sampling.min_tokens:
        newest = sequence.tokens[-1]
        ended = newest in config.eos_token_ids and not sampling.ignore_eos
        if ended or newest in sampling.stop_token_ids:
            return FinishReason.STOP
    if sequence.index >= sampling.max_tokens or len(sequence.tokens) >= config.context_tokens:
        return FinishReason.LENGTH
    return None
