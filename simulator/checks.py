"""What must hold in every world, whatever happens in it; content is compared, not only counts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.blocks import BlockLedger, BlockState
from engine.fake_runner import FakeRunner, expected_tokens
from engine.prefix_cache import block_hashes
from engine.step import Batch, StepPlan, StepRow
from kv_transfer.messages import CommitRequest, TransferMessage
from router.core import RouterCore
from router.events import Deliver, Fail, FenceRaised, Finish, MoveEnded, MoveRefused, Submitted
from router.move import EPOCHS_PER_FENCE, MoveOutcome
from router.transcripts import Behind, Verdict, Write
from simulator.reader_checks import ReaderChecks, Violation
from tandem.errors import Cancelled
from tandem.messages import Assign, AssignMode, CancelAssigned, OwnerIs, RouterMessage, StopMove, WorkerReport
from tandem.request import FinishReason, RequestId, Sampling, Token, TransferId, WorkerId

if TYPE_CHECKING:
    from simulator.store import StoreModel

__all__ = ["Checks", "Contents", "Violation", "at_baseline"]

MOVE_SLACK_MS = 500  # for the router to notice that a move is late
UNKNOWN_MAX_MS = 1_500  # a worker that hears and is heard knows of what it owns after this
STANDS_MAX_MS = 2_500  # and lets it run again: two limits of the fence, and the answer to a revocation

Incarnation = tuple[WorkerId, int]
Contents = list[tuple[int, int]]  # blocks with their generations
_Served = tuple[str, RequestId]  # a request at a router


@dataclass(slots=True)
class _Life:
    """A request at one router: from its beginning or take-over there to its end there."""

    first_epoch: int
    num_tokens: int  # delivered, those of before included
    end: Finish | Fail | None = None


@dataclass(slots=True)
class _Owned:
    """The owner record of a request as the router's words tell it, and who was told to expect the request from it."""

    epoch: int
    owner: Incarnation | None = None
    targets: dict[TransferId, Incarnation] = field(default_factory=dict)  # of this epoch, and not cancelled
    known_ms: int | None = None  # when the owner was last seen to have the request
    ran_ms: int | None = None  # when it was last seen not to stand still with it


@dataclass(slots=True)
class _Move:
    """A move that was asked for."""

    router: str
    request_id: RequestId
    at_ms: int
    answer: MoveRefused | MoveEnded | None = None


class Checks:
    """Sees all that clients see and all that workers say."""

    def __init__(self, *, block_size: int, vocab_size: int, namespace: str, move_limit_ms: int, excused: bool) -> None:
        self.readers = ReaderChecks(excused=excused)
        self._move_limit_ms = move_limit_ms
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._namespace = namespace
        self._answers: dict[RequestId, list[int]] = {}  # what the oracle says
        self._lives: dict[_Served, _Life] = {}
        self._newest: dict[RequestId, int] = {}  # the first epoch of the newest life, wherever
        self._producers: dict[tuple[RequestId, int], Incarnation] = {}
        self._reached: dict[tuple[RequestId, int], int] = {}  # the highest index written in an epoch
        self._asks: dict[tuple[TransferId, Incarnation], int] = {}  # the first index that a target would write
        self._fences: dict[tuple[RequestId, int], int] = {}  # that index, once the router agreed to it
        self._standing: dict[tuple[Incarnation, RequestId], tuple[int, TransferId]] = {}  # a commit was requested
        self._settled: set[tuple[Incarnation, TransferId]] = set()  # its outcome was heard
        # Lower epochs of this fence are over, and the worker knows it.
        self._floors: dict[tuple[Incarnation, RequestId, int], int] = {}
        self._contents: dict[bytes, bytes] = {}
        self._owned: dict[_Served, _Owned] = {}
        self._moves: dict[int, _Move] = {}
        self._fenced: set[tuple[str, RequestId, int]] = set()  # lives that routers have heard are over, by their fences
        self.num_tokens = 0

    # ---- while it runs -----------------------------------------------------------------------------------------------

    def submitted(self, request_id: RequestId, prompt: Sequence[int], sampling: Sampling, salt: bytes) -> None:
        """A client asks for this; the oracle says what it must get."""
        tokens = expected_tokens(prompt, sampling, sampling.max_tokens, self._vocab_size)
        self._answers[request_id] = tokens
        self._learn_contents([*prompt, *tokens], sampling, salt)

    def begins(self, router: str, event: Submitted) -> None:
        """A router serves the request from now on; what another one delivered is right so far."""
        request_id = event.request.request_id
        life = self._lives.get((router, request_id))
        if life is not None and life.end is None:
            raise Violation(f"{request_id} begins at {router} and has not ended there")
        self._agree(request_id, event.answer, 0, f"{router} takes over {request_id}")
        self._lives[router, request_id] = _Life(event.first_epoch, len(event.answer))
        newest = self._newest.get(request_id, 0)
        self._newest[request_id] = max(newest, event.first_epoch)

    def renewed(self, router: str, event: FenceRaised) -> None:
        """The request goes on there under a later fence, unless it has ended."""
        life = self._lives[router, event.request_id]
        if life.end is None:
            life.first_epoch = event.first_epoch
            self._newest[event.request_id] = max(self._newest[event.request_id], event.first_epoch)

    def is_newest(self, router: str, request_id: RequestId) -> bool:
        """Whether no other router's life of the request came after this one."""
        life = self._lives.get((router, request_id))
        return life is not None and life.first_epoch == self._newest[request_id]

    def refused(self, router: str, request_id: RequestId) -> None:
        del self._lives[router, request_id]

    def delivered(self, router: str, action: Deliver) -> None:
        """Each index once, in order, with the token of the oracle."""
        life = self._lives[router, action.request_id]
        for token in action.tokens:
            self.num_tokens += 1
            where = f"{action.request_id} at {router}: token {token.index} (epoch {token.epoch})"
            if life.end is not None:
                raise Violation(f"{where} was delivered after the end: {life.end}")
            self._is_current(router, token, where)
            self._agree(action.request_id, (token,), life.num_tokens, where)
            life.num_tokens += 1

    def _agree(self, request_id: RequestId, tokens: Sequence[Token], first: int, where: str) -> None:
        """Whether these tokens, from `first` on, are the oracle's."""
        due = self._answers[request_id]
        for index, token in enumerate(tokens, first):
            if token.index != index or due[index : index + 1] != [token.token_id]:
                raise Violation(f"{where}: {token}, the oracle says {due[index : index + 1]} at {index}")

    def ended(self, router: str, action: Finish | Fail) -> None:
        """Exactly once at each router, and as long as it was to be."""
        life = self._lives[router, action.request_id]
        where = f"{action.request_id} at {router}"
        if life.end is not None:
            raise Violation(f"{where} ended twice: {life.end}, {action}")
        life.end = action
        if isinstance(action, Finish) and action.reason is FinishReason.LENGTH:
            if (due := len(self._answers[action.request_id])) != life.num_tokens:
                raise Violation(f"{where} finished at {life.num_tokens}, {due} was due")
        elif isinstance(action, Fail) and isinstance(action.error, Cancelled):
            # An older life, which has yet to hear that another router has the request, waits for nobody.
            if self.is_newest(router, action.request_id) and not self.readers.somebody_left(action.request_id):
                raise Violation(f"{where} was cancelled ({action.error}), and its client was there")

    def router_died(self, router: str) -> None:
        """Nothing more is to be expected of it."""
        for each in [each for each in self._lives if each[0] == router]:
            del self._lives[each]
        for ticket in [ticket for ticket, move in self._moves.items() if move.router == router and not move.answer]:
            del self._moves[ticket]

    def router_stood_still(self, router: str, duration_ms: int) -> None:
        """Its moves may take so much longer. Nobody looked at its owners meanwhile: what it has yet to hear is late."""
        for owned in [each for (name, _), each in self._owned.items() if name == router]:
            owned.known_ms = owned.ran_ms = None
        for move in self._moves.values():
            if move.router == router:
                move.at_ms += duration_ms

    # ---- the store ---------------------------------------------------------------------------------------------------

    def stored(self, write: Write, tokens: Sequence[Token]) -> None:
        """What the store holds of a request after a write is what was said, from the first token on."""
        where = f"the store has of {write.request_id}"
        self._agree(write.request_id, tokens, 0, where)
        if write.ended is not None and write.ended.num_tokens > len(tokens):
            raise Violation(f"{where} {len(tokens)} tokens, and an end after {write.ended.num_tokens}")

    def writes(self, router: str, writes: Sequence[Write]) -> None:
        """Who has been told that another router has a request says no more of that life."""
        for write in writes:
            if (router, write.request_id, write.fence) in self._fenced:
                raise Violation(f"{router} writes on of {write.request_id}, and knows that another router has it")

    def answered(self, router: str, write: Write, verdict: Verdict | Behind) -> None:
        """A router has heard what the store did with a write."""
        if verdict is Verdict.FENCED:
            self._fenced.add((router, write.request_id, write.fence))

    def final_writes(self, router: str, writes: Sequence[Write]) -> None:
        """The store lacks nothing that a router has for it."""
        if writes:
            raise Violation(f"{router} has still to write {[write.request_id for write in writes]}")

    def final_store(self, model: StoreModel, living: Collection[str]) -> None:
        """What living routers served is over there too, with every token; and who came last finds it."""
        for request_id, record in model.records.items():
            served = (record.holder, request_id) in self._lives  # else its client left while it was claimed
            if served and record.holder in living and record.ended is None:
                raise Violation(f"the store lacks the end of {request_id}, which {record.holder} had")
        for wish in self.readers.finished():
            found = model.records.get(model.keys[wish.ask.idempotency_key])
            num = 0 if found is None or found.ended is None else found.ended.num_tokens
            stops = wish.finish is FinishReason.STOP  # it may have ended before its reader found the stop string
            if num != len(wish.answer) and not (stops and num > len(wish.answer)):
                raise Violation(f"the store has {num} of the {len(wish.answer)} tokens of {wish.ask.request_id}")

    # ---- the owner record --------------------------------------------------------------------------------------------

    def router_said(self, router: str, worker_id: WorkerId, incarnation: int, message: RouterMessage) -> None:
        """Epochs only grow, and an owner is followed only by one that was told to expect the request from it."""
        worker = worker_id, incarnation
        served = router, message.request_id
        match message:
            case Assign(request_id=request_id, epoch=epoch):
                owned = self._owned.get(served)
                if owned is None or epoch > owned.epoch + 1:
                    owned = self._owned[served] = _Owned(epoch)
                elif epoch != owned.epoch:
                    raise Violation(f"{request_id} is assigned at epoch {epoch} after {owned}")
                if message.mode is AssignMode.DECODE:
                    owned.targets[message.transfer_id] = worker
                elif owned.owner not in (None, worker):
                    raise Violation(f"{request_id} is assigned to {worker} in {owned}")
                else:
                    owned.owner = worker
            case OwnerIs(worker_id=owner_id, request_id=request_id) if owner_id is not None:
                owned = self._owned[served]
                owner = owner_id, message.incarnation
                if message.epoch == owned.epoch + 1 and owner == owned.targets.get(message.transfer_id):
                    self._commits(request_id, owned.epoch, self._asks[message.transfer_id, owner])
                    self._owned[served] = _Owned(message.epoch, owner)
                elif (owner, message.epoch) != (owned.owner, owned.epoch):
                    raise Violation(f"{router} says {message} in {owned}")
            case CancelAssigned():
                targets = self._owned[served].targets
                for transfer_id in [each for each, target in targets.items() if target == worker]:
                    del targets[transfer_id]

    def owner_is(self, now_ms: int, router: str, request_id: RequestId, *, known: bool, runs: bool) -> None:
        """What a look at a request's owner shows. Both are true of one that is not well, or not to be heard."""
        owned = self._owned[router, request_id]
        owned.known_ms = now_ms if known or owned.known_ms is None else owned.known_ms
        owned.ran_ms = now_ms if runs or owned.ran_ms is None else owned.ran_ms
        if now_ms - owned.known_ms > UNKNOWN_MAX_MS:
            raise Violation(f"{request_id}: its owner has not known of it for {now_ms - owned.known_ms} ms: {owned}")
        if now_ms - owned.ran_ms > STANDS_MAX_MS:
            raise Violation(f"{request_id} has stood still for {now_ms - owned.ran_ms} ms: {owned}")

    def _commits(self, request_id: RequestId, epoch: int, fence: int) -> None:
        """What the target will write first is what nobody wrote in the epoch before."""
        self._fences[request_id, epoch] = fence
        if self._reached.get((request_id, epoch), -1) >= fence:
            raise Violation(f"{request_id}: {self._producers[request_id, epoch]} wrote on beyond its fence at {fence}")

    def _is_current(self, router: str, token: Token, where: str) -> None:
        """Only the owner's tokens are delivered, and those that the commit carried."""
        owned = self._owned[router, token.request_id]
        if token.epoch != owned.epoch:
            raise Violation(f"{where} was delivered in {owned}")

    # ---- workers -----------------------------------------------------------------------------------------------------

    def reported(self, worker_id: WorkerId, incarnation: int, report: WorkerReport) -> None:
        """At most one worker incarnation writes the tokens of an epoch, and what it says is what the oracle says."""
        for token in report.tokens:
            self._produced((worker_id, incarnation), token)
        for ask in report.commit_asks:
            self._asks[ask.transfer_id, (worker_id, incarnation)] = ask.next_index
        if report.load is not None and report.load.audit:
            raise Violation(f"{worker_id}: {report.load.audit}")

    def _produced(self, worker: Incarnation, token: Token) -> None:
        where = f"{token.request_id}: {worker} wrote token {token.index} in epoch {token.epoch}"
        key = token.request_id, token.epoch
        producer = self._producers.setdefault(key, worker)
        if producer != worker:
            raise Violation(f"{where}, and so did {producer}")
        fence = self._fences.get(key)
        if fence is not None and token.index >= fence:
            raise Violation(f"{where}, beyond the fence at {fence}")
        self._reached[key] = max(token.index, self._reached.get(key, -1))
        due = self._answers[token.request_id]
        if token.index >= len(due) or token.token_id != due[token.index]:
            raise Violation(f"{where}: it is {token.token_id}, the oracle says {due[token.index : token.index + 1]}")

    def peer_said(self, worker_id: WorkerId, incarnation: int, message: TransferMessage) -> None:
        """From its commit request on a source stands still, until it has heard how that ended."""
        if isinstance(message.body, CommitRequest):
            worker, header = (worker_id, incarnation), message.header
            if (worker, header.transfer_id) not in self._settled:
                self._standing[worker, header.request_id] = header.epoch, header.transfer_id

    def heard(self, worker_id: WorkerId, incarnation: int, message: RouterMessage) -> None:
        """A worker has taken in what its router says: from now on it knows what it may not run."""
        worker = worker_id, incarnation
        key = worker, message.request_id
        match message:
            case OwnerIs() | StopMove():
                self._settled.add((worker, message.transfer_id))
                standing = self._standing.get(key)
                if standing is not None and standing[1] == message.transfer_id:
                    del self._standing[key]
                if isinstance(message, OwnerIs) and message.worker_id not in (None, worker_id):
                    self._over_below(worker, message.request_id, message.epoch)
            case CancelAssigned():
                self._over_below(worker, message.request_id, message.epoch + 1)

    def _over_below(self, worker: Incarnation, request_id: RequestId, epoch: int) -> None:
        """Another router may still serve it under an older fence, and not know better yet."""
        key = worker, request_id, epoch // EPOCHS_PER_FENCE
        self._floors[key] = max(epoch, self._floors.get(key, 0))

    def step_begins(self, worker_id: WorkerId, incarnation: int, plan: StepPlan, batch: Batch) -> Contents:
        """Nobody runs what it has been told is not its own, or what it stands still with. Returns the step's blocks."""
        worker = worker_id, incarnation
        contents = []
        for row in plan.rows:
            sequence = batch.get(row.request_id)
            assert sequence is not None, f"{row.request_id} is in the plan and not in the batch"
            key = worker, row.request_id
            floor = self._floors.get((*key, sequence.epoch // EPOCHS_PER_FENCE), 0)
            if sequence.epoch < floor:
                raise Violation(f"{worker} runs {row.request_id} in epoch {sequence.epoch}, and knows that it is over")
            standing = self._standing.get(key)
            if standing is not None and standing[0] == sequence.epoch:
                raise Violation(f"{worker} runs {row.request_id}, and knows not how its commit {standing} ended")
            contents += [(block, batch.ledger.generation(block)) for block in row.blocks]
        copied = [block for block, _ in plan.copies_out] + [block for _, block in plan.copies_back]
        contents += [(block, batch.ledger.generation(block)) for block in copied]
        self._hold(worker_id, contents, batch.ledger)
        return contents

    def step_ends(self, worker_id: WorkerId, contents: Contents, ledger: BlockLedger) -> None:
        """What the step reads and writes was nobody else's meanwhile."""
        self._hold(worker_id, contents, ledger)

    @staticmethod
    def _hold(worker_id: WorkerId, contents: Contents, ledger: BlockLedger) -> None:
        for block, generation in contents:
            state = ledger.state(block)
            if state not in (BlockState.OWNED, BlockState.EXPORTED) or ledger.generation(block) != generation:
                raise Violation(f"{worker_id}: block {block} of the step under way is {state.value}")

    def leaves(self, worker_id: WorkerId, ledger: BlockLedger, num_held: int) -> None:
        """A drained worker leaves: nobody may need anything of it."""
        if num_held or not at_baseline(ledger):
            raise Violation(f"{worker_id} leaves with {num_held} requests or attempts, and {ledger.counts()}")

    # ---- moves -------------------------------------------------------------------------------------------------------

    def move_asked(self, now_ms: int, router: str, ticket: int, request_id: RequestId) -> None:
        self._moves[ticket] = _Move(router, request_id, now_ms)

    def move_answered(self, now_ms: int, answer: MoveRefused | MoveEnded) -> None:
        """Once, and in time."""
        move = self._moves[answer.ticket]
        if move.answer is not None:
            raise Violation(f"{answer} after {move}")
        move.answer = answer
        if isinstance(answer, MoveEnded) and answer.record.outcome is MoveOutcome.MOVING:
            raise Violation(f"{answer}: it has ended and goes on")
        self._in_time(now_ms, answer.ticket, move)

    def answer(self, ticket: int) -> MoveRefused | MoveEnded | None:
        """What became of a move so far."""
        move = self._moves.get(ticket)
        return None if move is None else move.answer

    def _in_time(self, now_ms: int, ticket: int, move: _Move) -> None:
        if now_ms - move.at_ms > self._move_limit_ms + MOVE_SLACK_MS:
            raise Violation(f"move {ticket} lasts for {now_ms - move.at_ms} ms: {move}")

    def moves_in_time(self, now_ms: int, router: str) -> None:
        """None of those that have no answer is late."""
        for ticket, move in self._moves.items():
            if move.answer is None and move.router == router:
                self._in_time(now_ms, ticket, move)

    def moves(self) -> dict[str, int]:
        """How many moves ended how."""
        found: dict[str, int] = {}
        for move in self._moves.values():
            match move.answer:
                case MoveEnded(record=record):
                    how = record.outcome.value
                case MoveRefused():
                    how = "refused"
                case None:
                    how = "none"
            found[how] = found.get(how, 0) + 1
        return found

    # ---- at the end --------------------------------------------------------------------------------------------------

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

    def final_router(self, router: RouterCore, num_owners: int, num_streams: int) -> None:
        """The router has forgotten all but its history, and every move has been answered."""
        if unanswered := [ticket for ticket, move in self._moves.items() if move.answer is None]:
            raise Violation(f"moves {unanswered} were never answered")
        if router.num_requests:
            raise Violation(f"the router still holds {router.num_requests} requests")
        if num_owners or num_streams:
            raise Violation(f"{num_owners} owner records and {num_streams} streams are left")
        for worker in router.fleet:
            if worker.reserved or worker.dispatches or worker.num_reserved_blocks:
                raise Violation(f"the router's account of {worker.worker_id} is not empty")
        if wrong := router.index.audit():
            raise Violation(f"the prefix index: {wrong}")

    # ---- contents ----------------------------------------------------------------------------------------------------

    def _learn_contents(self, tokens: Sequence[int], sampling: Sampling, salt: bytes) -> None:
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
            sampling=sampling,
            num_prompt_tokens=len(tokens),
        )
        alone.run(StepPlan(rows=(row,)))
        hashes = block_hashes(self._namespace.encode(), tokens, size, salt=salt)
        for block, block_hash in enumerate(hashes):
            self._contents[block_hash] = alone.read_block(block)


def at_baseline(ledger: BlockLedger) -> bool:
    """Whether nobody holds a block."""
    counts = ledger.counts()
    return counts.free + counts.cached == counts.total
