"""What two workers say to one another about a transfer, and what a worker and its agent say about frames.

Plain data: kv_transfer/wire.py turns it into protobuf and back. Normative for the order of messages are the tables
in kv_transfer/handoff.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from kv_transfer.layout import KVLayout
from tandem.request import RequestId, Token, TransferId, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Who speaks about which attempt. A message whose incarnations or epoch are not those of the attempt is stale."""

    transfer_id: TransferId
    request_id: RequestId
    epoch: int
    sender: WorkerId
    source_incarnation: int
    target_incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Source to target: these tokens will come; reserve blocks for what you do not hold.

    `move`: the request runs at the source meanwhile, so `num_tokens` is how far it may grow before it stands still,
    and `hashes` are of the blocks that are full by now.
    """

    layout: KVLayout
    num_tokens: int
    hashes: tuple[bytes, ...]  # of the full blocks, in order
    lease_ms: int
    exact: bool
    endpoint: str  # the source agent's
    move: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Target to source: the leading `num_reused` blocks are here; write the rest into `blocks`, in order."""

    num_reused: int
    blocks: tuple[int, ...]
    generations: tuple[int, ...]
    credits: int
    lease_ms: int
    endpoint: str  # the target agent's


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """Target to source: no, and why. `retryable`: another target may take it."""

    code: str
    reason: str
    retryable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Target to source: not now; offer again after `retry_after_ms`."""

    retry_after_ms: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRequest:
    """Source to target: all `num_frames` frames are sent; their digest; the tokens you go on from."""

    num_frames: int
    digest: bytes
    num_computed_tokens: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Either side: this attempt is over. Idempotent.

    `spoiled`: the source's own blocks may be what is broken, so the target keeps nothing that it sent.
    """

    reason: str
    spoiled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Renew:
    """Source to target: I am alive and still want this; lease from receipt."""

    lease_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusAsk:
    """Source to target: what became of this attempt? Informative only: the owner record decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusIs:
    """Target to source: the state that this attempt is in here."""

    state: str


Body = Offer | Grant | Refuse | Wait | CommitRequest | Cancel | Renew | StatusAsk | StatusIs


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferMessage:
    """One message between the two ends of a transfer."""

    header: Header
    body: Body


# ---- between a worker and its own agent --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameHeader:
    """Names one frame: which blocks, from where to where. Its checksum is made and checked by the agents."""

    transfer_id: TransferId
    epoch: int
    source_incarnation: int
    target_incarnation: int
    sequence: int
    source_blocks: tuple[int, ...]
    source_generations: tuple[int, ...]
    target_blocks: tuple[int, ...]
    target_generations: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SendFrame:
    """Worker to its agent: move this frame to the agent at `endpoint`; of those that wait, lower `priority` first."""

    header: FrameHeader
    endpoint: str
    priority: int = 0  # 0: somebody stands still for it; 1: a migration's, while its request runs


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectFrames:
    """Worker to its agent: frames of this attempt may write these blocks (generation for generation), none else."""

    transfer_id: TransferId
    epoch: int
    source_incarnation: int
    target_incarnation: int
    blocks: tuple[int, ...]
    generations: tuple[int, ...]
    endpoint: str  # the source agent's


@dataclass(frozen=True, slots=True, kw_only=True)
class EndTransfer:
    """Worker to its agent: take no more part in this attempt; answer TransferQuiet when nothing is under way."""

    transfer_id: TransferId
    epoch: int


AgentCommand = SendFrame | ExpectFrames | EndTransfer


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameLanded:
    """Target's agent to its worker: the frame is in its blocks and its checksum holds."""

    transfer_id: TransferId
    epoch: int
    sequence: int
    target_blocks: tuple[int, ...]
    num_bytes: int
    checksum: int  # xxh3-64 of the frame's payload


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameAcked:
    """Source's agent to its worker: the target's agent has the frame, checked. The source's read is over."""

    transfer_id: TransferId
    epoch: int
    sequence: int
    checksum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameFailed:
    """An agent to its worker: the frame did not arrive whole. `sequence` None: the whole link is lost."""

    transfer_id: TransferId
    epoch: int
    sequence: int | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferQuiet:
    """An agent to its worker: no operation of this attempt is under way any more; its blocks may leave quarantine."""

    transfer_id: TransferId
    epoch: int


AgentEvent = FrameLanded | FrameAcked | FrameFailed | TransferQuiet
