"""The messages between the two ends of a transfer as protobuf and back, losslessly.

As in tandem/wire.py, decoding raises ValueError naming the field, its value and its limit.
"""

from __future__ import annotations

from collections.abc import Callable

from kv_transfer.layout import DTYPE_BYTES, KVLayout
from kv_transfer.messages import (
    Body,
    Cancel,
    CommitRequest,
    Grant,
    Header,
    Offer,
    Refuse,
    Renew,
    StatusAsk,
    StatusIs,
    TransferMessage,
    Wait,
)
from tandem.request import RequestId, TransferId, WorkerId
from tandem.v1 import worker_pb2 as pb
from tandem.wire import HASH_BYTES, decode_token, encode_token, hashes, named, same_length, within

MAX_LAYOUT_NUMBER = 1 << 20  # no layer count, head count, head size or block size is anywhere near


def encode_transfer_message(message: TransferMessage) -> pb.TransferMessage:
    """One message between the two ends of a transfer."""
    header = message.header
    wire = pb.TransferMessage(
        header=pb.TransferHeader(
            transfer_id=header.transfer_id,
            request_id=header.request_id,
            epoch=header.epoch,
            sender=header.sender,
            source_incarnation=header.source_incarnation,
            target_incarnation=header.target_incarnation,
        )
    )
    _encode_body(wire, message.body)
    return wire


def decode_transfer_message(message: pb.TransferMessage) -> TransferMessage:
    """Raises ValueError when the header or the body is missing, unknown or malformed."""
    if not message.HasField("header"):
        raise ValueError("header: is missing")
    kind = message.WhichOneof("kind")
    if kind is None:
        raise ValueError("kind: is missing or unknown")
    return TransferMessage(header=_decode_header(message.header), body=_DECODE_BODY[kind](message))


def _decode_header(header: pb.TransferHeader) -> Header:
    return Header(
        transfer_id=TransferId(named("header.transfer_id", header.transfer_id)),
        request_id=RequestId(named("header.request_id", header.request_id)),
        epoch=header.epoch,
        sender=WorkerId(named("header.sender", header.sender)),
        source_incarnation=header.source_incarnation,
        target_incarnation=header.target_incarnation,
    )


def _encode_body(wire: pb.TransferMessage, body: Body) -> None:
    match body:
        case Offer():
            wire.offer.CopyFrom(_encode_offer(body))
        case Grant():
            wire.grant.CopyFrom(
                pb.Grant(
                    num_reused=body.num_reused,
                    blocks=body.blocks,
                    generations=body.generations,
                    credits=body.credits,
                    lease_ms=body.lease_ms,
                    endpoint=body.endpoint,
                )
            )
        case Refuse():
            wire.refuse.CopyFrom(pb.Refuse(code=body.code, reason=body.reason, retryable=body.retryable))
        case Wait():
            wire.wait.CopyFrom(pb.Wait(retry_after_ms=body.retry_after_ms, reason=body.reason))
        case CommitRequest():
            wire.commit_request.CopyFrom(
                pb.CommitRequest(
                    num_frames=body.num_frames,
                    digest=body.digest,
                    num_computed_tokens=body.num_computed_tokens,
                    tokens=[encode_token(token) for token in body.tokens],
                )
            )
        case Cancel():
            wire.cancel.CopyFrom(pb.TransferCancel(reason=body.reason, spoiled=body.spoiled))
        case Renew():
            wire.renew.CopyFrom(pb.Renew(lease_ms=body.lease_ms))
        case StatusAsk():
            wire.status_ask.CopyFrom(pb.StatusAsk())
        case StatusIs():
            wire.status_is.CopyFrom(pb.StatusIs(state=body.state))


def _encode_offer(offer: Offer) -> pb.Offer:
    return pb.Offer(
        layout=pb.KVLayout(
            namespace=offer.layout.namespace,
            fingerprint=offer.layout.fingerprint,
            num_layers=offer.layout.num_layers,
            num_kv_heads=offer.layout.num_kv_heads,
            head_dim=offer.layout.head_dim,
            block_size=offer.layout.block_size,
            dtype=offer.layout.dtype,
            order=offer.layout.order,
            tp_rank=offer.layout.tp_rank,
            tp_size=offer.layout.tp_size,
            block_bytes=offer.layout.block_bytes,
        ),
        num_tokens=offer.num_tokens,
        hashes=offer.hashes,
        lease_ms=offer.lease_ms,
        exact=offer.exact,
        endpoint=offer.endpoint,
        move=offer.move,
    )


def _decode_layout(message: pb.KVLayout) -> KVLayout:
    if message.dtype not in DTYPE_BYTES:
        raise ValueError(f"offer.layout.dtype: is {message.dtype!r}, must be one of {sorted(DTYPE_BYTES)}")
    layout = KVLayout(
        namespace=message.namespace,
        fingerprint=message.fingerprint,
        num_layers=within("offer.layout.num_layers", message.num_layers, 1, MAX_LAYOUT_NUMBER),
        num_kv_heads=within("offer.layout.num_kv_heads", message.num_kv_heads, 1, MAX_LAYOUT_NUMBER),
        head_dim=within("offer.layout.head_dim", message.head_dim, 1, MAX_LAYOUT_NUMBER),
        block_size=within("offer.layout.block_size", message.block_size, 1, MAX_LAYOUT_NUMBER),
        dtype=message.dtype,
        order=message.order,
        tp_size=within("offer.layout.tp_size", message.tp_size, 1, MAX_LAYOUT_NUMBER),
        tp_rank=within("offer.layout.tp_rank", message.tp_rank, 0, message.tp_size - 1),
    )
    if layout.block_bytes != message.block_bytes:
        raise ValueError(f"offer.layout.block_bytes: is {message.block_bytes}, the shape makes it {layout.block_bytes}")
    return layout


def _decode_offer(message: pb.TransferMessage) -> Offer:
    offer = message.offer
    if not offer.HasField("layout"):
        raise ValueError("offer.layout: is missing")
    layout = _decode_layout(offer.layout)
    within("offer.num_tokens", offer.num_tokens, 1, 1 << 31)
    if len(offer.hashes) > offer.num_tokens // layout.block_size:
        raise ValueError(
            f"offer.hashes: has {len(offer.hashes)} entries, {offer.num_tokens} tokens fill at most "
            f"{offer.num_tokens // layout.block_size} blocks of {layout.block_size}"
        )
    return Offer(
        layout=layout,
        num_tokens=offer.num_tokens,
        hashes=hashes("offer.hashes", offer.hashes),
        lease_ms=offer.lease_ms,
        exact=offer.exact,
        endpoint=offer.endpoint,
        move=offer.move,
    )


def _decode_grant(message: pb.TransferMessage) -> Grant:
    grant = message.grant
    same_length("grant.generations", grant.generations, "grant.blocks", grant.blocks)
    if len(set(grant.blocks)) != len(grant.blocks):
        raise ValueError("grant.blocks: names a block twice")
    return Grant(
        num_reused=grant.num_reused,
        blocks=tuple(grant.blocks),
        generations=tuple(grant.generations),
        credits=within("grant.credits", grant.credits, 1, 1 << 16),
        lease_ms=grant.lease_ms,
        endpoint=grant.endpoint,
    )


def _decode_refuse(message: pb.TransferMessage) -> Refuse:
    return Refuse(code=message.refuse.code, reason=message.refuse.reason, retryable=message.refuse.retryable)


def _decode_wait(message: pb.TransferMessage) -> Wait:
    return Wait(retry_after_ms=message.wait.retry_after_ms, reason=message.wait.reason)


def _decode_commit_request(message: pb.TransferMessage) -> CommitRequest:
    request = message.commit_request
    if len(request.digest) != HASH_BYTES:
        raise ValueError(f"commit_request.digest: has {len(request.digest)} bytes, must have {HASH_BYTES}")
    return CommitRequest(
        num_frames=request.num_frames,
        digest=request.digest,
        num_computed_tokens=request.num_computed_tokens,
        tokens=tuple(decode_token(token) for token in request.tokens),
    )


def _decode_status_is(message: pb.TransferMessage) -> StatusIs:
    return StatusIs(state=named("status_is.state", message.status_is.state))


_DECODE_BODY: dict[str, Callable[[pb.TransferMessage], Body]] = {
    "offer": _decode_offer,
    "grant": _decode_grant,
    "refuse": _decode_refuse,
    "wait": _decode_wait,
    "commit_request": _decode_commit_request,
    "cancel": lambda message: Cancel(reason=message.cancel.reason, spoiled=message.cancel.spoiled),
    "renew": lambda message: Renew(lease_ms=message.renew.lease_ms),
    "status_ask": lambda message: StatusAsk(),
    "status_is": _decode_status_is,
}
