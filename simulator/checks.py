"""What must hold in every world, whatever happens in it; content is compared, not only counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from engine.blocks import BlockLedger
from engine.fake_runner import FakeRunner, expected_tokens
from engine.prefix_cache import block_hashes
from engine.step import StepPlan, StepRow
from router.core import RouterCore
from router.events import Deliver, Fail, Finish, NewRequest
from tandem.errors import Cancelled, RequestLost, Unavailable
from tandem.messages import Assign, AssignMode, OwnerIs, RouterMessage, WorkerReport
from tandem.request import FinishReason, RequestId, Token, WorkerId


class Violation(AssertionError):
    """A promise is broken."""


@dataclass(slots=True)
class _Expected:
    """One request and what its client has seen."""

    request: NewRequest
    tokens: list[int]
    healthy: bool  # submitted when all was well: it has to end well
    seen: list[int] = field(default_factory=list)
    end: Finish | Fail | None = None
    gone: bool = False  # its client left
    stopped_at: int | None = None


@dataclass(slots=True)
class _Attempt:
    """The newest placement of a request, as the router told its workers: the one owner record there may be."""

    epoch: int
    source: tuple[WorkerId, int] | None = None
    target: tuple[WorkerId, int] | None = None  # the same worker with LOCAL
    committed: bool = False


class Checks:
    """Sees all that clients see and all that workers say."""

    def __init__(self, *, block_size: int, vocab_size: int, namespace: str) -> None:
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._namespace = namespace
        self._requests: dict[RequestId, _Expected] = {}
        self._producers: dict[tuple[RequestId, int], tuple[WorkerId, int]] = {}
        self._contents: dict[bytes, bytes] = {}
        self._attempts: dict[RequestId, _Attempt] = {}
        self.num_tokens = 0

    # ---- while it runs -----------------------------------------------------------------------------------------------

    def submitted(self, request: NewRequest, *, healthy: bool) -> None:
        """A client asked for this; the oracle says what it must get."""
        num = request.sampling.max_tokens
        tokens = expected_tokens(request.tokens, request.sampling, num, self._vocab_size)
        self._requests[request.request_id] = _Expected(request, tokens, healthy)
        self._learn_contents([*request.tokens, *tokens])

    def client_gone(self, request_id: RequestId) -> None:
        self._requests[request_id].gone = True

    def stop_asked(self, request_id: RequestId, index: int) -> None:
        self._requests[request_id].stopped_at = index

    def num_seen(self, request_id: RequestId) -> int:
        """Tokens that the client has."""
        return len(self._requests[request_id].seen)

    def delivered(self, action: Deliver) -> None:
        """Each index once, in order, with the token of the oracle."""
        expected = self._requests[action.request_id]
        for token in action.tokens:
            self.num_tokens += 1
            where = f"{action.request_id}: token {token.index} (epoch {token.epoch})"
            if expected.end is not None:
                raise Violation(f"{where} was delivered after the end: {expected.end}")
            if token.index != len(expected.seen):
                raise Violation(f"{where} was delivered where {len(expected.seen)} was due")
            self._is_current(token, where)
            if token.token_id != expected.tokens[token.index]:
                raise Violation(f"{where} is {token.token_id}, the oracle says {expected.tokens[token.index]}")
            expected.seen.append(token.token_id)

    def ended(self, action: Finish | Fail) -> None:
        """Exactly once, and well unless there is a reason."""
        expected = self._requests[action.request_id]
        if expected.end is not None:
            raise Violation(f"{action.request_id} ended twice: {expected.end}, {action}")
        expected.end = action
        if isinstance(action, Finish):
            due = len(expected.tokens) if action.reason is FinishReason.LENGTH else expected.stopped_at
            have = len(expected.seen) if action.reason is FinishReason.LENGTH else action.usage.completion_tokens - 1
            if have != due:
                raise Violation(f"{action.request_id} finished ({action.reason}) at {have}, {due} was due")
        elif isinstance(action.error, Cancelled):
            if not expected.gone:
                raise Violation(f"{action.request_id} was cancelled, and its client was there")
        elif expected.healthy or not isinstance(action.error, RequestLost | Unavailable):
            raise Violation(f"{action.request_id} failed: {type(action.error).__name__}: {action.error}")

    def router_said(self, worker_id: WorkerId, incarnation: int, message: RouterMessage) -> None:
        """Epochs only grow, and whoever is named as owner is one of the newest attempt's two, in this order."""
        match message:
            case Assign(request_id=request_id, epoch=epoch):
                attempt = self._attempts.get(request_id)
                if attempt is None or attempt.epoch != epoch:
                    if attempt is not None and epoch <= attempt.epoch + 1:
                        raise Violation(f"{request_id} is assigned at epoch {epoch} after {attempt}")
                    attempt = self._attempts[request_id] = _Attempt(epoch)
                if message.mode is not AssignMode.DECODE:
                    attempt.source = worker_id, incarnation
                else:
                    attempt.target = worker_id, incarnation
            case OwnerIs(worker_id=owner_id) if owner_id is not None:
                attempt = self._attempts[message.request_id]
                said = (owner_id, message.incarnation), message.epoch
                if said == (attempt.target, attempt.epoch + 1):
                    attempt.committed = True
                elif said != (attempt.source, attempt.epoch) or attempt.committed:
                    raise Violation(f"the router says {message} in {attempt}")

    def _is_current(self, token: Token, where: str) -> None:
        """Only the owner's tokens are delivered, and those that the commit carried."""
        attempt = self._attempts[token.request_id]
        if token.epoch != attempt.epoch + attempt.committed:
            raise Violation(f"{where} was delivered in {attempt}")

    def reported(self, worker_id: WorkerId, incarnation: int, report: WorkerReport) -> None:
        """At most one worker incarnation writes the tokens of an epoch, and what it says is what the oracle says."""
        for token in report.tokens:
            self._produced(worker_id, incarnation, token)
        if report.load is not None and report.load.audit:
            raise Violation(f"{worker_id}: {report.load.audit}")

    def _produced(self, worker_id: WorkerId, incarnation: int, token: Token) -> None:
        producer = self._producers.setdefault((token.request_id, token.epoch), (worker_id, incarnation))
        if producer != (worker_id, incarnation):
            raise Violation(
                f"{token.request_id}: {producer} and {(worker_id, incarnation)} both write in {token.epoch}"
            )

    # ---- at the end --------------------------------------------------------------------------------------------------

    def unended(self) -> list[RequestId]:
        """Requests whose clients still wait."""
        return [name for name, each in self._requests.items() if each.end is None]

    def final_worker(self, name: str, ledger: BlockLedger, runner: FakeRunner, num_held: int) -> None:
        """The pool is at its baseline, and each block of the prefix cache holds what its hash names."""
        if not at_baseline(ledger):
            raise Violation(f"{name} leaks: {ledger.counts()}")
        if wrong := ledger.audit():
            raise Violation(f"{name}: {wrong}")
        if num_held:
            raise Violation(f"{name} still holds {num_held} requests or attempts")
        for block in range(ledger.num_blocks):
            block_hash = ledger.hash_of(block)
            if block_hash is None:
                continue
            if block_hash not in self._contents:
                raise Violation(f"{name}: block {block} is published under a hash of no request")
            if runner.read_block(block) != self._contents[block_hash]:
                raise Violation(f"{name}: block {block} holds other content than its hash names")

    def final_router(self, router: RouterCore) -> None:
        """The router has forgotten all but its history."""
        if router.num_requests:
            raise Violation(f"the router still holds {router.num_requests} requests")
        for worker in router.fleet:
            if worker.reserved or worker.dispatches or worker.num_reserved_blocks:
                raise Violation(f"the router's account of {worker.worker_id} is not empty")
        if wrong := router.index.audit():
            raise Violation(f"the prefix index: {wrong}")

    # ---- contents ----------------------------------------------------------------------------------------------------

    def _learn_contents(self, tokens: Sequence[int]) -> None:
        """What each full block of these tokens must hold, made by a runner that nobody disturbs."""
        size = self._block_size
        num_blocks = -(-len(tokens) // size)
        alone = FakeRunner(num_blocks=num_blocks, block_size=size, vocab_size=self._vocab_size)
        row = StepRow(
            request_id=RequestId("oracle"),
            tokens=tuple(tokens),
            start=0,
            blocks=tuple(range(num_blocks)),
            sample=False,
            sampling=next(iter(self._requests.values())).request.sampling,
            num_prompt_tokens=len(tokens),
        )
        alone.run(StepPlan(rows=(row,)))
        for block, block_hash in enumerate(block_hashes(self._namespace.encode(), tokens, size)):
            self._contents[block_hash] = alone.read_block(block)


def at_baseline(ledger: BlockLedger) -> bool:
    """Whether nobody holds a block."""
    counts = ledger.counts()
    return counts.free + counts.cached == counts.total


def summary(ends: Iterable[Finish | Fail | None]) -> dict[str, int]:
    """How many requests ended how."""
    found: dict[str, int] = {}
    for end in ends:
        name = "none" if end is None else end.reason.value if isinstance(end, Finish) else type(end.error).__name__
        found[name] = found.get(name, 0) + 1
    return found
