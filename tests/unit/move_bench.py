"""Two workers with fake runners, the words and frames between them in a line that a test lets through one by one.

What the router does of its own, deliver tokens and answer, a test does by hand: `tokens` checks what a client would
see, `commit`, `revoke` and the like say what the owner record says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from role_cores import BLOCK, LAYOUT, VOCAB, address

from cluster.worker_core import WorkerCore, WorkerCoreConfig
from decode_worker.config import AdmissionConfig, DecodeConfig
from engine.blocks import BlockLedger
from engine.fake_runner import FakeRunner, expected_tokens
from engine.layout import KVLayout
from engine.step import Batch, BatchConfig, StepPlan
from kv_transfer.actions import FromRouter, Report, SendTransfer
from kv_transfer.handoff import HandoffConfig
from kv_transfer.messages import (
    CommitRequest,
    EndTransfer,
    FrameAcked,
    FrameLanded,
    Grant,
    Offer,
    SendFrame,
    TransferMessage,
    TransferQuiet,
)
from tandem.messages import (
    Assign,
    AssignMode,
    CancelAssigned,
    CommitAsk,
    Migrate,
    MoveFailed,
    OwnerIs,
    OwnerQuery,
    RouterMessage,
    StopMove,
    WorkerAddress,
)
from tandem.request import RequestId, Sampling, Token, TransferId, WorkerId

R = RequestId("r")
PROMPT = tuple(range(5, 16))
HANDOFF = HandoffConfig(max_frame_bytes=LAYOUT.block_bytes)


@dataclass(slots=True)
class Node:
    """One worker."""

    me: WorkerAddress
    core: WorkerCore
    ledger: BlockLedger
    batch: Batch
    runner: FakeRunner
    plan: StepPlan | None = None
    told: list[object] = field(default_factory=list)  # to the router

    def held(self) -> bool:
        sequence = self.batch.get(R)
        return sequence is not None and sequence.held


class Bench:
    """Workers a and b. Times stand still unless a test moves `now_ms`."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        handoff: HandoffConfig = HANDOFF,
        admission: AdmissionConfig | None = None,
        target_layout: KVLayout = LAYOUT,
    ) -> None:
        self.now_ms = 1_000
        self.line: deque[tuple[str, object]] = deque()  # (to whom, event or frame or end)
        config = DecodeConfig(handoff=handoff, admission=admission or AdmissionConfig())
        self.nodes: dict[str, Node] = {}
        for name, layout in (("a", LAYOUT), ("b", target_layout)):
            ledger = BlockLedger(num_blocks=num_blocks, block_size=BLOCK)
            batch = Batch(ledger, BatchConfig(max_tokens_per_step=16, chunk_tokens=8, context_tokens=256))
            core = WorkerCore(
                me=address(name), layout=layout, ledger=ledger, batch=batch, config=WorkerCoreConfig(decode=config)
            )
            runner = FakeRunner(num_blocks=num_blocks, block_size=BLOCK, vocab_size=VOCAB)
            self.nodes[name] = Node(address(name), core, ledger, batch, runner)
        self.sampling = Sampling()
        self.prompt = PROMPT
        self.transfer = TransferId("")
        self.epoch = 1

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    # ---- what happens ------------------------------------------------------------------------------------------------

    def handle(self, name: str, event: object) -> list[object]:
        """The worker hears an event; what it says goes into the line, or to the router."""
        return self._take(name, self[name].core.handle(self.now_ms, event))

    def _take(self, name: str, actions: list[object]) -> list[object]:
        for action in actions:
            match action:
                case Report(piece=piece):
                    self[name].told.append(piece)
                case SendTransfer(to=to, message=message):
                    self.line.append((to.worker_id, message))
                case SendFrame():
                    self.line.append(("frame", action))
                case EndTransfer(transfer_id=transfer, epoch=epoch):
                    self.line.append((name, TransferQuiet(transfer_id=transfer, epoch=epoch)))
        assert not self[name].ledger.audit()
        return actions

    def say(self, name: str, message: RouterMessage) -> list[object]:
        """The router says this."""
        return self.handle(name, FromRouter(session=1, message=message))

    def let(self) -> object:
        """Lets the first thing in the line happen; returns it."""
        to, event = self.line.popleft()
        if isinstance(event, SendFrame):
            self.land(event)
        else:
            self.handle(to, event)
        return event

    def settle(self, until: Callable[[], bool] = lambda: False) -> None:
        """Lets things happen until `until`, or nothing waits."""
        while self.line and not until():
            self.let()

    def land(self, frame: SendFrame, *, times: int = 1) -> None:
        """The frame arrives so often."""
        header = frame.header
        source, target = self._ends(frame)
        for block in header.source_blocks:
            assert block in self[source].ledger.exported_by(header.transfer_id), "read without a pin"
        content = [self[source].runner.read_block(block) for block in header.source_blocks]
        checksum = hash(b"".join(content)) & ((1 << 64) - 1)
        for written, filled in zip(header.target_blocks, content, strict=True):
            self[target].runner.write_block(written, filled)
        landed = FrameLanded(
            transfer_id=header.transfer_id,
            epoch=header.epoch,
            sequence=header.sequence,
            target_blocks=header.target_blocks,
            num_bytes=header.num_bytes,
            checksum=checksum,
        )
        acked = FrameAcked(
            transfer_id=header.transfer_id, epoch=header.epoch, sequence=header.sequence, checksum=checksum
        )
        for _ in range(times):
            self.line.append((target, landed))
            self.line.append((source, acked))

    def _ends(self, frame: SendFrame) -> tuple[str, str]:
        target = frame.endpoint.removesuffix("-agent")
        return ("b" if target == "a" else "a"), target

    def begin(self, name: str) -> None:
        """A step begins."""
        node = self[name]
        assert node.plan is None
        node.plan = node.core.next_plan(self.now_ms)

    def end(self, name: str) -> None:
        """The step ends."""
        node = self[name]
        if node.plan is not None:
            plan, node.plan = node.plan, None
            self._take(name, node.core.step_done(self.now_ms, plan, node.runner.run(plan)))

    def step(self, name: str, times: int = 1) -> None:
        for _ in range(times):
            self.begin(name)
            self.now_ms += 10
            self.end(name)

    # ---- the router --------------------------------------------------------------------------------------------------

    def start(self, *, num_tokens: int = 4, sampling: Sampling | None = None) -> None:
        """A request runs at a until it has written so many tokens."""
        self.sampling = sampling or Sampling(max_tokens=40)
        self.say("a", self._assign(AssignMode.LOCAL, self.prompt, "a", None))
        while len(self.tokens()) < num_tokens:
            self.step("a")

    def _assign(self, mode: AssignMode, tokens: tuple[int, ...], name: str, peer: str | None) -> Assign:
        return Assign(
            request_id=R,
            epoch=self.epoch,
            mode=mode,
            tokens=tokens,
            num_prompt_tokens=len(self.prompt),
            sampling=self.sampling,
            transfer_id=TransferId("" if peer is None else self.transfer),
            peer=None if peer is None else address(peer),
            deadline_ms=10_000,
            move=peer is not None,
        )

    def migrate(self, source: str, *, num_tokens: int | None = None, **changed: object) -> Migrate:
        """The word that moves the request from here to the other."""
        fields: dict[str, object] = {
            "request_id": R,
            "epoch": self.epoch,
            "transfer_id": self.transfer,
            "peer": address("b" if source == "a" else "a"),
            "num_tokens": len(self.prompt) + len(self.tokens()) if num_tokens is None else num_tokens,
            "deadline_ms": 10_000,
            "reason": "test",
        }
        return Migrate(**{**fields, **changed})  # type: ignore[arg-type]

    def move(self, source: str = "a", *, behind: int = 0) -> None:
        """The router begins to move the request; it has seen all its tokens but the newest `behind`."""
        target = "b" if source == "a" else "a"
        self.transfer = TransferId(f"r.{self.epoch}.m1")
        seen = self.tokens()[: len(self.tokens()) - behind]
        tokens = (*self.prompt, *(token.token_id for token in seen))
        self.say(target, self._assign(AssignMode.DECODE, tokens, target, source))
        self.say(source, self.migrate(source, num_tokens=len(tokens)))

    def restart(self, name: str) -> None:
        """The router places the request anew, on this worker alone."""
        self.epoch += 64
        tokens = (*self.prompt, *(token.token_id for token in self.tokens()))
        self.say(name, self._assign(AssignMode.LOCAL, tokens, name, None))

    def tokens(self) -> list[Token]:
        """All that was told, by index; the same from all who told it."""
        by_index: dict[int, Token] = {}
        for node in self.nodes.values():
            for piece in node.told:
                if isinstance(piece, Token) and piece.request_id == R:
                    known = by_index.setdefault(piece.index, piece)
                    assert known.token_id == piece.token_id, "two tokens of one index"
                    assert known == piece or known.epoch == piece.epoch, "two workers wrote one index"
        assert sorted(by_index) == list(range(len(by_index))), "a token is missing"
        tokens = [by_index[index] for index in sorted(by_index)]
        expected = expected_tokens(self.prompt, self.sampling, len(tokens), VOCAB)
        assert [token.token_id for token in tokens] == expected
        return tokens

    def asks(self, name: str) -> list[CommitAsk]:
        return [each for each in self[name].told if isinstance(each, CommitAsk)]

    def answer(self, name: str, owner: str | None, epoch: int, *, over: bool = False, refused: str = "") -> None:
        """The owner record speaks to a worker of the move."""
        record = OwnerIs(
            request_id=R,
            transfer_id=self.transfer,
            epoch=epoch,
            worker_id=None if owner is None else WorkerId(owner),
            incarnation=1,
            over=over,
            refused=refused,
        )
        self.say(name, record)

    def commit(self, target: str = "b", *, tell_source: bool = True) -> None:
        """The owner record accepts what the target has asked."""
        ask = self.asks(target)[-1]
        assert ask.transfer_id == self.transfer
        assert ask.next_index == len(self.tokens()), "the commit does not go on from where the source stopped"
        self.answer(target, target, self.epoch + 1)
        if tell_source:
            self.answer("b" if target == "a" else "a", target, self.epoch + 1)
        self.epoch += 1

    def finish(self, name: str) -> None:
        """Runs the request to its end there, and everything to rest."""
        for _ in range(self.sampling.max_tokens + 10):
            self.step(name)
            self.settle()
        assert len(self.tokens()) == self.sampling.max_tokens
        self.at_rest()

    def at_rest(self) -> None:
        """Nobody holds anything any more."""
        self.settle()
        for node in self.nodes.values():
            counts = node.ledger.counts()
            assert counts.free + counts.cached == counts.total, f"{counts}: {node.core.story()[-3:]}"
            assert not node.core.decode.num_attempts
            assert not len(node.core.decode)
            assert not len(node.batch)


# ---- stages ----------------------------------------------------------------------------------------------------------


def waits(bench: Bench, kind: type) -> bool:
    """Whether such a word, frame or event is next in the line."""
    if not bench.line:
        return False
    event = bench.line[0][1]
    return isinstance(event.body if isinstance(event, TransferMessage) else event, kind)


def to_offered(bench: Bench) -> None:
    bench.move()
    assert waits(bench, Offer)


def to_granted(bench: Bench) -> None:
    to_offered(bench)
    bench.let()
    assert waits(bench, Grant)


def to_precopy(bench: Bench) -> None:
    to_granted(bench)
    bench.let()
    assert waits(bench, SendFrame)


def to_fencing(bench: Bench) -> None:
    """Blocks are there, the request is in a step under way."""
    to_precopy(bench)
    bench.begin("a")
    bench.settle(bench["a"].held)
    assert bench["a"].batch.is_running(R)


def to_tail(bench: Bench) -> None:
    to_precopy(bench)
    bench.settle(bench["a"].held)
    assert waits(bench, SendFrame)


def to_committing(bench: Bench) -> None:
    to_tail(bench)
    bench.settle(lambda: waits(bench, CommitRequest))
    assert bench.line


def to_sealed(bench: Bench) -> None:
    to_committing(bench)
    bench.settle()
    assert bench.asks("b")


STAGES: list[Callable[[Bench], None]] = [
    to_offered, to_granted, to_precopy, to_fencing, to_tail, to_committing, to_sealed,
]  # fmt: skip
UNCOMMITTED = STAGES[:5]


def rest(bench: Bench) -> None:
    """Ends the step that a stage may have left under way."""
    bench.end("a")
    bench.settle()


def failures(bench: Bench, name: str = "a") -> list[MoveFailed]:
    return [each for each in bench[name].told if isinstance(each, MoveFailed)]


def queries(bench: Bench) -> list[OwnerQuery]:
    return [each for each in bench["a"].told if isinstance(each, OwnerQuery)]


def cancel(epoch: int) -> CancelAssigned:
    return CancelAssigned(request_id=R, epoch=epoch, reason="the router says so")


def stop_move(bench: Bench) -> StopMove:
    return StopMove(request_id=R, epoch=1, transfer_id=bench.transfer, reason="the target died")


def crowd(bench: Bench, num_tokens: int) -> None:
    """Takes blocks at a from the pool, by the name of somebody else."""
    assert bench["a"].ledger.allocate("crowd", num_tokens) is not None
