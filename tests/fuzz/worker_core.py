"""One worker's decider under words of routers, peers and an agent that keep no rule, and its blocks after them.

Whatever they say: no exception, the ledger adds up, and once all is cancelled and quiet every block is free or cached.
What was assigned to it alone gives the right tokens meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from draws import Draws
from random_messages import fill

from cluster.worker_core import WorkerCore, WorkerCoreConfig
from engine.blocks import BlockLedger
from engine.events import PeerGone, RouterGone, Tick
from engine.fake_runner import FakeRunner, expected_tokens, fake_layout
from engine.prefix_cache import block_hashes
from engine.step import Batch, BatchConfig
from kv_transfer import wire
from kv_transfer.actions import AgentLost, FromRouter, Report, RouterJoined, SendTransfer
from kv_transfer.handoff import frame_digest
from kv_transfer.messages import (
    EndTransfer,
    ExpectFrames,
    FrameAcked,
    FrameFailed,
    FrameLanded,
    Offer,
    SendFrame,
    TransferMessage,
    TransferQuiet,
)
from tandem import wire as router_wire
from tandem.messages import Assign, AssignMode, Migrate, WorkerAddress
from tandem.request import RequestId, Sampling, Token, TransferId, WorkerId
from tandem.v1 import worker_pb2 as pb

BLOCK, NUM_BLOCKS, VOCAB, CONTEXT = 4, 24, 97, 128
LAYOUT = fake_layout(block_size=BLOCK)
U64_MAX = (1 << 64) - 1
WIND_UP_ROUNDS = 100  # of two seconds: longer than any deadline that a word could have set
ME = WorkerAddress(worker_id=WorkerId("me"), incarnation=1, control="me:1", endpoint="me-agent")
OWN = RequestId("own")  # nobody else speaks of it
OWN_PROMPT = tuple(range(5, 15))
OWN_TOKENS = 6
WHOLE = {
    "namespace": LAYOUT.namespace, "fingerprint": LAYOUT.fingerprint, "num_layers": 1, "num_kv_heads": 1,
    "head_dim": 1, "block_size": BLOCK, "dtype": "float32", "order": LAYOUT.order, "tp_size": 1,
    "block_bytes": LAYOUT.block_bytes,
}  # fmt: skip
ROUTER_SAYS = ("assign", "assign", "assign", "cancel", "owner_is", "owner_is", "migrate", "stop_move")
SOURCE_SAYS = ("offer", "offer", "offer", "commit_request", "commit_request", "cancel", "renew", "status_ask")
TARGET_SAYS = ("grant", "grant", "grant", "refuse", "wait", "cancel", "status_is")
KNOWN: dict[str, list[Any]] = {
    "request_id": ["r0", "r1", "r2"],
    "transfer_id": ["x0", "x1", "x2"],
    "epoch": [1, 2, 3],
    "from_epoch": [1, 2],
    "sender": ["peer", "me"],
    "worker_id": ["peer", "me"],
    "incarnation": [1, 2],
    "source_incarnation": [1],
    "target_incarnation": [1],
    "control": ["peer:1"],
    "endpoint": ["peer-agent"],
    "lease_ms": [1000, 30_000],
    "deadline_ms": [1000, 60_000],
    "retry_after_ms": [10],
    "num_tokens": [5, 10, 40],
    "tokens": [1, 2, 3, 96],
    "num_prompt_tokens": [1, 3, 5],
    "blocks": list(range(NUM_BLOCKS + 1)),
    "generations": [0, 1, 2],
    "credits": [1, 4],
    "num_frames": [0, 1, 2],
    "num_computed_tokens": [4, 9, 10],
    "index": [0, 1, 2],
    "token_id": [1, 96],
    "finish": ["", "length"],
    "max_tokens": [1, 4, 8],
    "min_tokens": [0],
    "temperature": [0.0, 1.0],
    "top_p": [1.0],
    "repetition_penalty": [1.0],
    "num_reused": [0, 1],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    """What both ends of a transfer know when it begins."""

    request_id: str
    epoch: int
    tokens: tuple[int, ...]
    num_prompt_tokens: int
    receives: bool  # the worker is its target


class WorkerWorld:
    """One worker, made anew for each input."""

    def __init__(self, data: bytes) -> None:
        self._draws = Draws(data)
        self._ledger = BlockLedger(num_blocks=NUM_BLOCKS, block_size=BLOCK)
        batch = Batch(
            self._ledger, BatchConfig(max_tokens_per_step=16, chunk_tokens=8, context_tokens=CONTEXT, max_rows=8)
        )
        self._core = WorkerCore(me=ME, layout=LAYOUT, ledger=self._ledger, batch=batch, config=WorkerCoreConfig())
        self._runner = FakeRunner(num_blocks=NUM_BLOCKS, block_size=BLOCK, vocab_size=VOCAB)
        self._now_ms = 1000
        self._sent: list[SendFrame] = []
        self._expected: list[ExpectFrames] = []
        self._ending: list[EndTransfer] = []
        self._attempts: dict[str, _Attempt] = {}
        self._running: dict[str, Assign] = {}
        self._offered: dict[str, int] = {}  # tokens, by transfer
        self._landed: dict[str, list[int]] = {}
        self._answer: list[Token] = []
        self._own_ended = False
        self.num_messages = 0

    def run(self) -> int:
        """Plays the input to its end, then lets everything end. How many messages it was told."""
        self._feed(RouterJoined(session=1))
        if self._draws.below(2):
            sampling = Sampling(max_tokens=OWN_TOKENS)
            own = Assign(
                request_id=OWN, epoch=1, mode=AssignMode.LOCAL, tokens=OWN_PROMPT, num_prompt_tokens=len(OWN_PROMPT),
                sampling=sampling, transfer_id=TransferId(""), peer=None, deadline_ms=60_000,
            )  # fmt: skip
            self._feed(FromRouter(session=99, message=own))
        while self._draws.left:
            self._turn()
        self._wind_up()
        return self.num_messages

    def _turn(self) -> None:
        draws = self._draws
        self._now_ms += draws.pick((0, 0, 1, 5, 50, 400, 5000))
        match draws.below(8):
            case 0 | 1:
                self._from_router()
            case 2 | 3 | 4:
                self._from_peer()
            case 5:
                self._from_agent()
            case 6:
                self._step()
            case _:
                events = (Tick(), Tick(), PeerGone(worker_id=WorkerId("peer"), incarnation=1), AgentLost(reason="x"))
                event = draws.pick((*events, RouterGone(session=1)))
                if isinstance(event, AgentLost):
                    self._sent.clear()
                    self._expected.clear()
                    self._ending.clear()
                self._feed(event)

    # ---- who speaks ----

    def _from_router(self) -> None:
        """An assignment, a word about one, or a move; most of them fit, some have a few fields changed."""
        message = pb.RouterMessage()
        kind = self._draws.pick(
            ("assign", "assign", "assign", "cancel", "owner_is", "owner_is", "migrate", "stop_move")
        )
        part = getattr(message, kind)
        part.SetInParent()
        if self._draws.byte() < 224:
            self._aim_at(kind, part)
        if self._draws.chance(48):
            fill(part, self._draws, KNOWN)
        try:
            decoded = router_wire.decode_router_message(message)
        except ValueError:
            return
        if isinstance(decoded, Assign) and decoded.transfer_id:
            self._attempts[decoded.transfer_id] = _Attempt(
                request_id=decoded.request_id, epoch=decoded.epoch, tokens=decoded.tokens,
                num_prompt_tokens=decoded.num_prompt_tokens, receives=decoded.mode is AssignMode.DECODE,
            )  # fmt: skip
        elif isinstance(decoded, Assign):
            self._running[decoded.request_id] = decoded
        elif isinstance(decoded, Migrate) and decoded.request_id in self._running:
            tokens = self._running[decoded.request_id].tokens
            self._attempts[decoded.transfer_id] = _Attempt(
                request_id=decoded.request_id, epoch=decoded.epoch, tokens=tokens, num_prompt_tokens=len(tokens),
                receives=False,
            )  # fmt: skip
        self._feed(FromRouter(session=1 + self._draws.chance(16), message=decoded))

    def _aim_at(self, kind: str, part: Any) -> None:
        draws = self._draws
        transfer, known = self._an_attempt()
        match kind:
            case "assign":
                part.request_id, part.epoch = draws.pick(("r0", "r1", "r2")), 1 + draws.below(2)
                part.mode = 1 + draws.below(3)
                part.tokens.extend([draws.byte() % VOCAB for _ in range(1 + draws.below(20))])
                part.num_prompt_tokens = max(1, len(part.tokens) - draws.pick((0, 0, 0, 1, 3)))
                part.sampling.max_tokens, part.sampling.top_p = draws.pick((1, 4, 30)), 1
                part.sampling.repetition_penalty = 1
                part.deadline_ms = draws.pick((60_000, 1000, 0))
                if part.mode != pb.ASSIGN_MODE_LOCAL:
                    part.transfer_id = f"x{draws.below(8)}"
                    self._peer(part.peer)
                    part.move = part.mode == pb.ASSIGN_MODE_DECODE and draws.chance(80)
            case "cancel":
                part.request_id, part.epoch = known.request_id, min(known.epoch + draws.below(2), U64_MAX)
            case "owner_is":
                part.request_id, part.transfer_id = known.request_id, transfer
                commits = draws.byte() < 160
                part.epoch = min(known.epoch + commits, U64_MAX)
                part.worker_id = "me" if commits == known.receives else "peer"
                part.incarnation = 1
                part.refused = "" if draws.byte() < 224 else "no"
                part.over = draws.chance(64)
            case "migrate":
                running = [*self._running.values()]
                if running:
                    request = draws.pick(running)
                    part.request_id, part.epoch = request.request_id, request.epoch
                    part.num_tokens = len(request.tokens) + draws.below(3)
                part.transfer_id = f"x{draws.below(8)}"
                self._peer(part.peer)
                part.deadline_ms = draws.pick((60_000, 1000))
            case "stop_move":
                part.request_id, part.transfer_id, part.epoch = known.request_id, transfer, known.epoch

    def _peer(self, peer: pb.WorkerAddress) -> None:
        peer.worker_id, peer.incarnation, peer.control, peer.endpoint = "peer", 1, "peer:1", "peer-agent"

    def _an_attempt(self) -> tuple[str, _Attempt]:
        if not self._attempts:
            return "x0", _Attempt(request_id="r0", epoch=1, tokens=(1,) * 9, num_prompt_tokens=9, receives=True)
        transfer = self._draws.pick([*self._attempts])
        return transfer, self._attempts[transfer]

    def _from_peer(self) -> None:
        """The other end of an attempt goes on, or says what it should not."""
        draws = self._draws
        transfer, known = self._an_attempt()
        message = pb.TransferMessage()
        header = message.header
        header.transfer_id, header.request_id, header.epoch = transfer, known.request_id, known.epoch
        header.sender, header.source_incarnation, header.target_incarnation = "peer", 1, 1
        says = SOURCE_SAYS if known.receives else TARGET_SAYS
        kind = draws.pick(says if draws.byte() < 240 else SOURCE_SAYS + TARGET_SAYS)
        part = getattr(message, kind)
        part.SetInParent()
        self._fit(kind, part, transfer, known)
        if draws.chance(40):
            fill(draws.pick((header, part)), draws, KNOWN)
        try:
            decoded = wire.decode_transfer_message(message)
        except ValueError:
            return
        self._feed(decoded)

    def _fit(self, kind: str, part: Any, transfer: str, known: _Attempt) -> None:
        draws = self._draws
        match kind:
            case "offer":
                for name, value in WHOLE.items():
                    setattr(part.layout, name, value)
                part.num_tokens = len(known.tokens)
                part.hashes.extend(block_hashes(b"", known.tokens, BLOCK))
                part.lease_ms, part.exact, part.endpoint = 30_000, True, "peer-agent"
                part.move = draws.chance(40)
            case "grant":
                offered = self._offered.get(transfer, len(known.tokens))
                num = -(-offered // BLOCK)
                part.num_reused = draws.pick((0, 0, 1))
                part.blocks.extend(range(num - part.num_reused))
                part.generations.extend([1] * len(part.blocks))
                part.credits, part.lease_ms, part.endpoint = 4, 30_000, "peer-agent"
            case "refuse":
                part.code, part.reason, part.retryable = "no_room", "r", bool(draws.below(2))
            case "wait":
                part.retry_after_ms = draws.pick((1, 100, 5000))
            case "commit_request":
                checksums = {sequence: 1000 + sequence for sequence in self._landed.get(transfer, ())}
                part.num_frames, part.digest = len(checksums), frame_digest(checksums)
                part.num_computed_tokens = len(known.tokens)
                index = len(known.tokens) - known.num_prompt_tokens
                part.tokens.add(request_id=known.request_id, epoch=known.epoch, index=index, token_id=3)
            case "renew":
                part.lease_ms = 30_000
            case "status_is":
                part.state = draws.pick(("none", "reserved", "active", "quarantine"))

    def _from_agent(self) -> None:
        """The agent is the worker's own: it says what may be said of what it was told."""
        draws = self._draws
        kind = draws.below(3)
        if kind == 0 and self._sent:
            header = self._sent.pop(draws.below(len(self._sent))).header
            key: dict[str, Any] = {"transfer_id": header.transfer_id, "epoch": header.epoch}
            if draws.byte() < 160:
                self._feed(FrameAcked(**key, sequence=header.sequence, checksum=draws.whole(64)))
            else:
                self._feed(FrameFailed(**key, sequence=header.sequence if draws.below(2) else None, reason="x"))
        elif kind == 1 and self._expected:
            expected = draws.pick(self._expected)
            if expected.blocks:
                before = self._landed.setdefault(expected.transfer_id, [])
                sequence = len(before) if draws.byte() < 240 else draws.below(6)
                size = 2
                blocks = expected.blocks[sequence * size : (sequence + 1) * size] or expected.blocks[:1]
                landed = FrameLanded(
                    transfer_id=expected.transfer_id, epoch=expected.epoch, sequence=sequence, target_blocks=blocks,
                    num_bytes=len(blocks) * LAYOUT.block_bytes, checksum=1000 + sequence,
                )  # fmt: skip
                if sequence * size < len(expected.blocks):
                    before.append(sequence)
                self._feed(landed)
        elif self._ending:
            self._quiet(self._ending.pop(draws.below(len(self._ending))))

    def _quiet(self, end: EndTransfer) -> None:
        key = (end.transfer_id, end.epoch)
        self._sent = [each for each in self._sent if (each.header.transfer_id, each.header.epoch) != key]
        self._expected = [each for each in self._expected if (each.transfer_id, each.epoch) != key]
        self._feed(TransferQuiet(transfer_id=end.transfer_id, epoch=end.epoch))

    # ---- what follows ----

    def _step(self) -> None:
        plan = self._core.next_plan(self._now_ms)
        if plan is not None:
            self._perform(self._core.step_done(self._now_ms, plan, self._runner.run(plan)))

    def _feed(self, event: object) -> None:
        self.num_messages += 1
        self._perform(self._core.handle(self._now_ms, event))

    def _perform(self, actions: list[object]) -> None:
        for action in actions:
            match action:
                case SendFrame():
                    self._sent.append(action)
                case ExpectFrames():
                    self._expected.append(action)
                case EndTransfer():
                    self._ending.append(action)
                case SendTransfer(message=TransferMessage(header=header, body=Offer(num_tokens=num_tokens))):
                    self._offered[header.transfer_id] = num_tokens
                case Report(piece=Token(request_id=request_id) as token) if request_id == OWN:
                    self._answer.append(token)
                    self._own_ended |= token.finish is not None
        problems = self._ledger.audit()
        assert not problems, problems

    def _wind_up(self) -> None:
        for session in (1, 2):
            self._feed(RouterGone(session=session))
        for _ in range(WIND_UP_ROUNDS):
            self._now_ms += 2000
            while self._ending:
                self._quiet(self._ending.pop())
            self._step()
            self._perform(self._core.handle(self._now_ms, Tick()))
            counts = self._ledger.counts()
            if counts.free + counts.cached == counts.total and not self._core.batch.num_running:
                break
        assert counts.free + counts.cached == counts.total, f"{counts}: {self._core.story()[-12:]}"
        due = self._core.next_deadline_ms()
        assert due is None or due > self._now_ms, f"overdue since {due}"
        tokens = [token.token_id for token in self._answer]
        expected = expected_tokens(OWN_PROMPT, Sampling(), OWN_TOKENS, VOCAB)
        assert tokens == (expected if self._own_ended else []), f"{tokens}, expected {expected}"


def run(data: bytes) -> int:
    """One input."""
    return WorkerWorld(data).run()
