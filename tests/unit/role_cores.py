"""What the tests of the role cores share: one worker's parts over a fake runner, and words from outside."""

from __future__ import annotations

from dataclasses import replace

from engine.blocks import BlockLedger
from engine.fake_runner import FakeRunner, fake_layout
from engine.prefix_cache import block_hashes
from engine.step import Batch, BatchConfig
from kv_transfer.actions import FromRouter, Report, SendTransfer
from kv_transfer.messages import Body, Grant, Header, Offer, TransferMessage
from tandem.messages import Assign, AssignMode, CancelAssigned, WorkerAddress
from tandem.request import RequestId, Sampling, TransferId, WorkerId

BLOCK = 4
VOCAB = 97
LAYOUT = fake_layout(block_size=BLOCK)
PROMPT = tuple(range(5, 15))  # ten tokens: two full blocks and half of a third


def address(name: str, incarnation: int = 1) -> WorkerAddress:
    return WorkerAddress(worker_id=WorkerId(name), incarnation=incarnation, control=name, endpoint=f"{name}-agent")


ME, PEER = address("me"), address("peer")


def parts(num_blocks: int = 32) -> tuple[BlockLedger, Batch, FakeRunner]:
    ledger = BlockLedger(num_blocks=num_blocks, block_size=BLOCK)
    batch = Batch(ledger, BatchConfig(max_tokens_per_step=8, chunk_tokens=8, context_tokens=256))
    return ledger, batch, FakeRunner(num_blocks=num_blocks, block_size=BLOCK, vocab_size=VOCAB)


def assign(
    name: str = "r",
    *,
    mode: AssignMode = AssignMode.PREFILL,
    epoch: int = 1,
    tokens: tuple[int, ...] = PROMPT,
    session: int = 1,
    peer: WorkerAddress | None = PEER,
    max_tokens: int = 4,
) -> FromRouter:
    message = Assign(
        request_id=RequestId(name),
        epoch=epoch,
        mode=mode,
        tokens=tokens,
        num_prompt_tokens=len(tokens),
        sampling=Sampling(max_tokens=max_tokens),
        transfer_id=TransferId("" if mode is AssignMode.LOCAL else f"{name}:{epoch}"),
        peer=None if mode is AssignMode.LOCAL else peer,
        deadline_ms=60_000,
    )
    return FromRouter(session=session, message=message)


def cancel(name: str = "r", epoch: int = 1) -> FromRouter:
    message = CancelAssigned(request_id=RequestId(name), epoch=epoch, reason="client gone")
    return FromRouter(session=1, message=message)


def from_peer(body: Body, name: str = "r", epoch: int = 1) -> TransferMessage:
    header = Header(
        transfer_id=TransferId(f"{name}:{epoch}"),
        request_id=RequestId(name),
        epoch=epoch,
        sender=PEER.worker_id,
        source_incarnation=1,
        target_incarnation=1,
    )
    return TransferMessage(header=header, body=body)


def offer(tokens: tuple[int, ...] = PROMPT) -> Offer:
    return Offer(
        layout=LAYOUT,
        num_tokens=len(tokens),
        hashes=tuple(block_hashes(b"", tokens, BLOCK)),
        lease_ms=30_000,
        exact=True,
        endpoint=PEER.endpoint,
    )


def grant(num: int = 3, *, credits: int = 4) -> Grant:
    blocks = tuple(range(num))
    return Grant(
        num_reused=0, blocks=blocks, generations=(0,) * num, credits=credits, lease_ms=30_000, endpoint="peer-agent"
    )


def said(actions: list[object], kind: type[Body]) -> list[Body]:
    """What went to the peer."""
    bodies = [each.message.body for each in actions if isinstance(each, SendTransfer)]
    return [body for body in bodies if isinstance(body, kind)]


def told(actions: list[object], kind: type) -> list[object]:
    """What went to a router."""
    return [each.piece for each in actions if isinstance(each, Report) and isinstance(each.piece, kind)]


def other_session(event: FromRouter, session: int) -> FromRouter:
    return replace(event, session=session)
