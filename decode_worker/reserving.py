"""Room for a request that is handed over or migrated here: what is shared, what is granted, or why neither."""

from __future__ import annotations

from collections.abc import Iterable

from decode_worker.admission import Admission, Load, Verdict
from decode_worker.config import AdmissionConfig
from decode_worker.request import Request
from engine.blocks import BlockLedger
from engine.layout import KVLayout
from engine.step import Batch
from kv_transfer.handoff_target import Declined, Postponed, Reserved
from kv_transfer.layout import refusal
from kv_transfer.messages import Offer
from tandem.request import is_canary


class Reservations:
    """Answers offers for one pool; `admission` learns from the answers that end."""

    def __init__(self, *, layout: KVLayout, ledger: BlockLedger, batch: Batch, config: AdmissionConfig) -> None:
        self.admission = Admission(config, num_blocks=ledger.num_blocks, block_size=ledger.block_size)
        self._config = config
        self._layout = layout
        self._ledger = ledger
        self._batch = batch
        self._next_turn_ms = 0  # all sooner ones are taken by sources that wait

    def reserve(
        self, now_ms: int, request: Request, offer: Offer, *, others: Iterable[Request], endpoint: str
    ) -> Reserved | Postponed | Declined:
        """Room for an offer, if it is what the router told us to expect and admission lets it in.

        `others`: all requests here; `endpoint`: of this worker's agent.
        """
        assign = request.assign
        different = refusal(offer.layout, self._layout, exact=offer.exact)
        if different is not None:
            return Declined(code="layout", reason=different, retryable=True)
        unexpected = self._unexpected(request, offer)
        if unexpected is not None:
            return Declined(code="mismatch", reason=unexpected, retryable=True)
        num_blocks = -(-offer.num_tokens // self._ledger.block_size)
        if num_blocks > self._ledger.num_blocks:
            told = f"needs {num_blocks} blocks, the pool has {self._ledger.num_blocks}"
            return Declined(code="too_large", reason=told, retryable=False)
        # Only what the router's own tokens name is shared: the source's word for later ones is not needed.
        reused = self._ledger.acquire(request.owner, request.hashes[: len(offer.hashes)])
        num_new = num_blocks - len(reused)
        decision = self.admission.decide(
            wanted=self._load(request),
            num_new_blocks=num_new,
            num_available=self._ledger.num_available - self._num_promised(),
            others=[self._load(each) for each in others if each.reserved or each.sequence is not None],
        )
        granted = None
        # A canary holds a block for a moment: it is to tell a worker that is full from one that does not work.
        if decision.verdict is Verdict.ADMIT or is_canary(request.request_id):
            granted = self._ledger.grant(assign.transfer_id, num_new)
        if granted is None:
            self._ledger.release(request.owner)
            return self._no_room(now_ms, request, decision.verdict, decision.reason)
        request.reserved = True
        request.num_reused, request.num_granted = len(reused), num_new
        return Reserved(
            num_reused=len(reused),
            blocks=tuple(granted),
            generations=tuple(self._ledger.generation(block) for block in granted),
            endpoint=endpoint,
        )

    def _unexpected(self, request: Request, offer: Offer) -> str | None:
        """How an offer differs from the assignment. One who is migrated here may have fewer or more full blocks."""
        num_told = len(request.assign.tokens)
        if offer.move is not request.assign.move:
            kinds = {True: "a migration", False: "a handoff"}
            return f"{kinds[offer.move]} is offered, {kinds[request.assign.move]} expected"
        if offer.move:
            common = min(len(offer.hashes), len(request.hashes))
            if offer.num_tokens < num_told or list(offer.hashes[:common]) != request.hashes[:common]:
                return f"room for {offer.num_tokens} tokens is asked, {num_told} are known, or their hashes differ"
        elif offer.num_tokens != num_told or list(offer.hashes) != request.hashes:
            return f"{offer.num_tokens} tokens offered, {num_told} expected, or their hashes differ"
        return None

    def _num_promised(self) -> int:
        """Blocks that sequences here have yet to take for the tokens they have.

        Those that hold none count too: a request that lost its blocks would else wait for as long as others are let in.
        """
        size = self._ledger.block_size
        return sum(max(0, -(-len(each.tokens) // size) - len(each.blocks)) for each in self._batch.sequences())

    def _load(self, request: Request) -> Load:
        """What the request occupies now and may still write."""
        num_tokens = len(request.assign.tokens) if request.sequence is None else len(request.sequence.tokens)
        num_generated = num_tokens - request.assign.num_prompt_tokens
        left = min(request.assign.sampling.max_tokens - num_generated, self._batch.config.context_tokens - num_tokens)
        return Load(salt=request.salt, num_tokens=num_tokens, num_generated=num_generated, num_left_max=max(0, left))

    def _no_room(self, now_ms: int, request: Request, verdict: Verdict, reason: str) -> Postponed | Declined:
        if verdict is Verdict.REFUSE:
            return Declined(code="too_large", reason=reason, retryable=False)
        if request.waiting_since_ms is None:
            request.waiting_since_ms = now_ms
        if now_ms - request.waiting_since_ms >= self._config.wait_limit_ms:
            return Declined(code="no_room", reason=reason, retryable=True)
        return Postponed(retry_after_ms=self._turn_ms(now_ms) - now_ms, reason=reason)

    def _turn_ms(self, now_ms: int) -> int:
        """When a source that waits is to ask again: in the order in which they asked.

        Were it as soon for hundreds as for one, to ask and to say no would be all that two workers get done. Near turns
        are one, since a source looks at all its attempts whenever one is due.
        """
        every_ms, soonest_ms = self._config.retry_every_ms, now_ms + self._config.retry_after_ms
        turn_ms = min(max(soonest_ms, self._next_turn_ms), max(soonest_ms, now_ms + self._config.retry_max_ms))
        self._next_turn_ms = turn_ms + every_ms
        grid_ms = self._config.retry_after_ms
        return turn_ms if turn_ms == soonest_ms else -(-turn_ms // grid_ms) * grid_ms
