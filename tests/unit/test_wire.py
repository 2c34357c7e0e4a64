"""Messages cross the wire unchanged, and what is malformed is refused by the name of its field."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer import messages as kv
from kv_transfer import wire as kv_wire
from kv_transfer.layout import DTYPE_BYTES, KVLayout
from tandem import messages as m
from tandem import report_wire, wire
from tandem.request import FinishReason, RequestId, Sampling, Token, TransferId, WorkerId
from tandem.v1 import worker_pb2 as pb

T = TypeVar("T")
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
text = st.text(max_size=8)
name = st.text(min_size=1, max_size=8)
number = st.floats(allow_nan=False, allow_infinity=False)
block_hash = st.binary(min_size=16, max_size=16)
pairs = st.lists(st.tuples(u32, number), max_size=3).map(tuple)
ids = st.lists(u32, max_size=5).map(tuple)
request_ids = name.map(RequestId)
transfer_ids = name.map(TransferId)
worker_ids = name.map(WorkerId)


def several(values: st.SearchStrategy[T]) -> st.SearchStrategy[tuple[T, ...]]:
    """A short tuple of the values."""
    return st.lists(values, max_size=3).map(tuple)


samplings = st.builds(
    Sampling,
    temperature=number, top_k=u32, top_p=number, min_p=number, repetition_penalty=number, presence_penalty=number,
    frequency_penalty=number, seed=u64, max_tokens=u32, min_tokens=u32, stop_token_ids=ids, ignore_eos=st.booleans(),
    logprobs=st.none() | u32, logit_bias=pairs,
)  # fmt: skip
tokens = st.builds(
    Token, request_id=request_ids, epoch=u64, index=u32, token_id=u32, logprob=st.none() | number, top=pairs,
    finish=st.none() | st.sampled_from(FinishReason),
)  # fmt: skip
addresses = st.builds(m.WorkerAddress, worker_id=worker_ids, incarnation=u64, control=name, endpoint=text)


@st.composite
def assigns(draw: st.DrawFn) -> m.Assign:
    """An assignment that keeps the rules between its fields."""
    mode = draw(st.sampled_from(m.AssignMode))
    local = mode is m.AssignMode.LOCAL
    given_tokens = draw(st.lists(u32, min_size=1, max_size=6))
    return m.Assign(
        request_id=draw(request_ids),
        epoch=draw(u64),
        mode=mode,
        tokens=tuple(given_tokens),
        num_prompt_tokens=draw(st.integers(1, len(given_tokens))),
        sampling=draw(samplings),
        transfer_id=TransferId("") if local else draw(transfer_ids),
        peer=None if local else draw(addresses),
        deadline_ms=draw(u32),
        move=mode is m.AssignMode.DECODE and draw(st.booleans()),
        cache_salt=draw(st.sampled_from([b"", b"s" * 16])),
    )


router_messages = (
    assigns()
    | st.builds(m.CancelAssigned, request_id=request_ids, epoch=u64, reason=text)
    | st.builds(
        m.OwnerIs, request_id=request_ids, transfer_id=text.map(TransferId), epoch=u64,
        worker_id=st.none() | worker_ids, incarnation=u64, refused=text, over=st.booleans(),
    )
    | st.builds(
        m.Migrate, request_id=request_ids, epoch=u64, transfer_id=transfer_ids, peer=addresses,
        num_tokens=st.integers(1, 2**31), deadline_ms=u32, reason=text,
    )
    | st.builds(m.StopMove, request_id=request_ids, epoch=u64, transfer_id=transfer_ids, reason=text)
)  # fmt: skip

counts = st.builds(
    m.BlockCounts, total=u32, free=u32, cached=u32, owned=u32, exported=u32, granted=u32, quarantined=u32
)
reports = st.builds(
    m.WorkerReport,
    worker_id=worker_ids, incarnation=u64, sequence=u64, tokens=several(tokens),
    failed=several(
        st.builds(
            m.RequestFailed, request_id=request_ids, epoch=u64, code=text, message=text, retryable=st.booleans()
        )
    ),
    commit_asks=several(
        st.builds(
            m.CommitAsk, request_id=request_ids, transfer_id=transfer_ids, from_epoch=u64, next_index=u32,
            tokens=several(tokens),
        )
    ),
    owner_queries=several(
        st.builds(m.OwnerQuery, request_id=request_ids, transfer_id=transfer_ids, epoch=u64, revoke=st.booleans())
    ),
    moves_failed=several(
        st.builds(m.MoveFailed, request_id=request_ids, transfer_id=transfer_ids, epoch=u64, code=text, message=text)
    ),
    transfers=several(
        st.builds(
            m.TransferStats, request_id=request_ids, transfer_id=text.map(TransferId), blocks_granted=u32,
            blocks_moved=u32, blocks_reused=u32, bytes=u64, frames=u32, tokens_recomputed=u32, first_frame_ms=u32,
            last_chunk_start_ms=u32, committed_ms=u32, tokens_cached=u32, first_step_ms=number, rounds=u32,
            precopy_ms=u32, fence_ms=u32,
            first=st.none()
            | st.builds(
                m.FirstTokenTimes, queue_ms=number, prefill_ms=number, heard_s=st.just(0.0), hold_ms=number
            ),
        )
    ),
    blocks=st.none()
    | st.builds(
        m.BlockEvents, sequence=u64, stored=several(block_hash), removed=several(block_hash), cleared=st.booleans()
    ),
    load=st.none()
    | st.builds(
        m.WorkerLoad, running=u32, waiting=u32, blocks=counts, prefill_backlog_tokens=u64, steps=u64,
        last_step_ms=number, audit=several(text), tokens_read=u64, tokens_written=u64,
    ),
)  # fmt: skip
infos = st.builds(
    m.WorkerInfo,
    worker_id=worker_ids, role=st.sampled_from(m.Role), control=name, endpoint=text, pid=u32, agent_pid=u32, model=text,
    namespace=text, fingerprint=text, exact=st.booleans(), dtype=text, block_size=st.integers(1, 2**32 - 1),
    total_blocks=st.integers(1, 2**32 - 1), context_tokens=st.integers(1, 2**32 - 1),
    block_bytes=st.integers(1, 2**64 - 1), labels=several(st.tuples(text, text)),
)  # fmt: skip

layouts = st.builds(
    KVLayout, namespace=text, fingerprint=text, num_layers=st.integers(1, 128), num_kv_heads=st.integers(1, 64),
    head_dim=st.integers(1, 256), block_size=st.integers(1, 64), dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    order=text, tp_rank=st.integers(0, 3), tp_size=st.integers(4, 8),
)  # fmt: skip


@st.composite
def offers(draw: st.DrawFn) -> kv.Offer:
    """An offer whose hashes fit its tokens."""
    layout = draw(layouts)
    full = draw(st.lists(block_hash, max_size=4))
    return kv.Offer(
        layout=layout,
        num_tokens=len(full) * layout.block_size + draw(st.integers(1, 5)),
        hashes=tuple(full),
        lease_ms=draw(u32),
        exact=draw(st.booleans()),
        endpoint=draw(text),
        move=draw(st.booleans()),
    )


@st.composite
def grants(draw: st.DrawFn) -> kv.Grant:
    """A grant with a generation for each block."""
    blocks = draw(st.lists(u32, max_size=5, unique=True))
    return kv.Grant(
        num_reused=draw(u32),
        blocks=tuple(blocks),
        generations=tuple(draw(st.lists(u32, min_size=len(blocks), max_size=len(blocks)))),
        credits=draw(st.integers(1, 64)),
        lease_ms=draw(u32),
        endpoint=draw(text),
    )


headers = st.builds(
    kv.Header, transfer_id=transfer_ids, request_id=request_ids, epoch=u64, sender=worker_ids, source_incarnation=u64,
    target_incarnation=u64,
)  # fmt: skip
bodies = st.one_of(
    offers(),
    grants(),
    st.builds(kv.Refuse, code=text, reason=text, retryable=st.booleans()),
    st.builds(kv.Wait, retry_after_ms=u32, reason=text),
    st.builds(
        kv.CommitRequest, num_frames=u32, digest=block_hash, num_computed_tokens=u32, tokens=several(tokens)
    ),
    st.builds(kv.Cancel, reason=text, spoiled=st.booleans()),
    st.builds(kv.Renew, lease_ms=u32),
    st.just(kv.StatusAsk()),
    st.builds(kv.StatusIs, state=name),
)  # fmt: skip

GRANT = kv.Grant(num_reused=1, blocks=(3, 4), generations=(7, 8), credits=4, lease_ms=1000, endpoint="e")
HEADER = kv.Header(
    transfer_id=TransferId("t"), request_id=RequestId("r"), epoch=1, sender=WorkerId("w"), source_incarnation=2,
    target_incarnation=3,
)  # fmt: skip
ASSIGN = m.Assign(
    request_id=RequestId("r"), epoch=1, mode=m.AssignMode.LOCAL, tokens=(1, 2), num_prompt_tokens=2,
    sampling=Sampling(logit_bias=((5, 1.0),)), transfer_id=TransferId(""), peer=None, deadline_ms=1000,
)  # fmt: skip
LAYOUT = KVLayout(
    namespace="n", fingerprint="f", num_layers=2, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32"
)
OFFER = kv.Offer(layout=LAYOUT, num_tokens=9, hashes=(b"0" * 16,), lease_ms=1, exact=True, endpoint="e")


@given(router_messages)
def test_router_messages_cross_unchanged(message: m.RouterMessage) -> None:
    sent = wire.encode_router_message(message).SerializeToString()
    assert wire.decode_router_message(pb.RouterMessage.FromString(sent)) == message


@given(reports)
@settings(max_examples=50)
def test_reports_cross_unchanged(report: m.WorkerReport) -> None:
    sent = report_wire.encode_report(report).SerializeToString()
    assert report_wire.decode_report(pb.WorkerReport.FromString(sent)) == report


@given(infos)
@settings(max_examples=50)
def test_worker_info_crosses_unchanged(info: m.WorkerInfo) -> None:
    sent = wire.encode_worker_info(info).SerializeToString()
    assert wire.decode_worker_info(pb.RegisterRequest.FromString(sent)) == info


@given(st.builds(kv.TransferMessage, header=headers, body=bodies))
def test_transfer_messages_cross_unchanged(message: kv.TransferMessage) -> None:
    sent = kv_wire.encode_transfer_message(message).SerializeToString()
    assert kv_wire.decode_transfer_message(pb.TransferMessage.FromString(sent)) == message


@given(router_messages | st.builds(kv.TransferMessage, header=headers, body=bodies), st.data())
def test_a_flipped_byte_is_decoded_or_refused_and_never_breaks_the_decoder(
    message: m.RouterMessage | kv.TransferMessage, data: st.DataObject
) -> None:
    if isinstance(message, kv.TransferMessage):
        sent = bytearray(kv_wire.encode_transfer_message(message).SerializeToString())
    else:
        sent = bytearray(wire.encode_router_message(message).SerializeToString())
    at = data.draw(st.integers(0, len(sent) - 1))
    sent[at] ^= data.draw(st.integers(1, 255))
    with suppress(ValueError, DecodeError):  # and nothing else
        if isinstance(message, kv.TransferMessage):
            kv_wire.decode_transfer_message(pb.TransferMessage.FromString(bytes(sent)))
        else:
            wire.decode_router_message(pb.RouterMessage.FromString(bytes(sent)))


def _assign(**change: object) -> pb.RouterMessage:
    message = wire.encode_router_message(ASSIGN)
    for field, value in change.items():
        setattr(message.assign, field, value)
    return message


def test_a_malformed_assignment_is_refused_by_the_name_of_its_field() -> None:
    for message, field in (
        (pb.RouterMessage(), "kind"),
        (pb.RouterMessage(hello=pb.RouterHello(session=1)), "kind"),
        (_assign(mode=9), "assign.mode"),
        (_assign(mode=0), "assign.mode"),
        (_assign(num_prompt_tokens=3), "assign.num_prompt_tokens"),
        (_assign(num_prompt_tokens=0), "assign.num_prompt_tokens"),
        (_assign(request_id=""), "assign.request_id"),
        (_assign(transfer_id="t"), "assign.transfer_id"),
        (_assign(mode=pb.ASSIGN_MODE_DECODE), "assign.transfer_id"),
    ):
        with pytest.raises(ValueError, match=field):
            wire.decode_router_message(message)
    uneven = _assign()
    uneven.assign.sampling.bias_values.append(1.0)
    with pytest.raises(ValueError, match="bias_values: has 2 entries and bias_token_ids has 1"):
        wire.decode_router_message(uneven)
    endless = _assign()
    endless.assign.sampling.temperature = float("nan")
    with pytest.raises(ValueError, match="temperature"):
        wire.decode_router_message(endless)


def test_a_malformed_report_is_refused_by_the_name_of_its_field() -> None:
    token = pb.Token(request_id="r", finish="tired")
    for message, field in (
        (pb.WorkerReport(), "worker_id"),
        (pb.WorkerReport(worker_id="w", tokens=[token]), "finish"),
        (pb.WorkerReport(worker_id="w", blocks=pb.BlockEvents(stored=[b"short"])), r"blocks.stored\[0\]"),
    ):
        with pytest.raises(ValueError, match=field):
            report_wire.decode_report(message)
    with pytest.raises(ValueError, match="role"):
        wire.decode_worker_info(pb.RegisterRequest(worker_id="w", role="cook"))


def _transfer(body: kv.Body) -> pb.TransferMessage:
    return kv_wire.encode_transfer_message(kv.TransferMessage(header=HEADER, body=body))


def test_a_malformed_transfer_message_is_refused_by_the_name_of_its_field() -> None:
    lying = _transfer(OFFER)
    lying.offer.layout.block_bytes += 1
    for message, field in (
        (pb.TransferMessage(), "header"),
        (pb.TransferMessage(header=pb.TransferHeader(transfer_id="t", request_id="r", sender="w")), "kind"),
        (_transfer(replace(GRANT, generations=(7,))), "grant.generations"),
        (_transfer(replace(GRANT, blocks=(3, 3))), "grant.blocks"),
        (_transfer(replace(GRANT, credits=0)), "grant.credits"),
        (_transfer(replace(OFFER, hashes=(b"0" * 15,))), r"offer.hashes\[0\]"),
        (_transfer(replace(OFFER, hashes=(b"0" * 16,) * 3)), "offer.hashes"),
        (_transfer(replace(OFFER, layout=replace(LAYOUT, num_layers=0))), "offer.layout.num_layers"),
        (lying, "offer.layout.block_bytes"),
        (_transfer(kv.CommitRequest(num_frames=1, digest=b"", num_computed_tokens=1, tokens=())), "digest"),
    ):
        with pytest.raises(ValueError, match=field):
            kv_wire.decode_transfer_message(message)


@pytest.mark.parametrize("num_tokens", [256, 8192])
def test_the_state_of_a_request_that_moves_is_small(num_tokens: int) -> None:
    """All that its target learns but the blocks: under 1 KiB and 4 bytes a token (docs: sampling needs no other)."""
    sampling = Sampling(
        temperature=0.7, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.5,
        frequency_penalty=0.5, seed=2**64 - 1, max_tokens=8192, min_tokens=1, stop_token_ids=(151_645,) * 8,
        logprobs=20,
    )  # fmt: skip
    endpoint = "e" * 200
    peer = m.WorkerAddress(
        worker_id=WorkerId("decode-17"), incarnation=2**63, control="10.0.0.1:50123", endpoint=endpoint
    )
    request_id, transfer_id = RequestId(f"chatcmpl-{'f' * 32}"), TransferId(f"chatcmpl-{'f' * 32}.12345.m12")
    assign = m.Assign(
        request_id=request_id, epoch=2**40, mode=m.AssignMode.DECODE, tokens=(151_000,) * num_tokens,
        num_prompt_tokens=num_tokens // 2, sampling=sampling, transfer_id=transfer_id, peer=peer, deadline_ms=10_000,
        move=True,
    )  # fmt: skip
    token = Token(request_id=request_id, epoch=2**40, index=num_tokens, token_id=151_000, logprob=-0.5)
    commit = kv.CommitRequest(
        num_frames=64, digest=b"d" * 16, num_computed_tokens=num_tokens + 1, tokens=(token, replace(token, index=1))
    )
    header = kv.Header(
        transfer_id=transfer_id, request_id=request_id, epoch=2**40, sender=WorkerId("decode-1"),
        source_incarnation=2**63, target_incarnation=2**63,
    )  # fmt: skip
    said = wire.encode_router_message(assign).SerializeToString()
    said += kv_wire.encode_transfer_message(kv.TransferMessage(header=header, body=commit)).SerializeToString()
    assert len(said) <= 1024 + 4 * num_tokens
