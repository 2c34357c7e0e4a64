"""What workers tell routers as protobuf and back, losslessly; under the same rules as tandem/wire.py."""

from __future__ import annotations

from dataclasses import fields

from tandem.messages import (
    BlockCounts,
    BlockEvents,
    CommitAsk,
    FirstTokenTimes,
    MoveFailed,
    OwnerQuery,
    RequestFailed,
    SwapCounts,
    TransferStats,
    WorkerLoad,
    WorkerReport,
)
from tandem.request import RequestId, TransferId, WorkerId
from tandem.v1 import worker_pb2 as pb
from tandem.wire import decode_token, encode_token, finite, hashes, named


def encode_report(report: WorkerReport) -> pb.WorkerReport:
    """Everything a worker tells a router after one step."""
    return pb.WorkerReport(
        worker_id=report.worker_id,
        incarnation=report.incarnation,
        sequence=report.sequence,
        tokens=[encode_token(token) for token in report.tokens],
        failed=[
            pb.RequestFailed(
                request_id=failed.request_id,
                epoch=failed.epoch,
                code=failed.code,
                message=failed.message,
                retryable=failed.retryable,
                transfer_id=failed.transfer_id,
            )
            for failed in report.failed
        ],
        commit_asks=[
            pb.CommitAsk(
                request_id=ask.request_id,
                transfer_id=ask.transfer_id,
                from_epoch=ask.from_epoch,
                next_index=ask.next_index,
                tokens=[encode_token(token) for token in ask.tokens],
            )
            for ask in report.commit_asks
        ],
        owner_queries=[
            pb.OwnerQuery(
                request_id=query.request_id, transfer_id=query.transfer_id, epoch=query.epoch, revoke=query.revoke
            )
            for query in report.owner_queries
        ],
        moves_failed=[
            pb.MoveFailed(
                request_id=failed.request_id,
                transfer_id=failed.transfer_id,
                epoch=failed.epoch,
                code=failed.code,
                message=failed.message,
            )
            for failed in report.moves_failed
        ],
        transfers=[_encode_stats(stats) for stats in report.transfers],
        blocks=None if report.blocks is None else _encode_block_events(report.blocks),
        load=None if report.load is None else _encode_load(report.load),
    )


def is_beat(message: pb.WorkerReport) -> bool:
    """Whether the worker has nothing to say but that it lives."""
    return not message.worker_id


def decode_report(message: pb.WorkerReport) -> WorkerReport:
    """Raises ValueError on whatever is malformed in it."""
    return WorkerReport(
        worker_id=WorkerId(named("worker_id", message.worker_id)),
        incarnation=message.incarnation,
        sequence=message.sequence,
        tokens=tuple(decode_token(token) for token in message.tokens),
        failed=tuple(
            RequestFailed(
                request_id=RequestId(named("failed.request_id", failed.request_id)),
                epoch=failed.epoch,
                code=failed.code,
                message=failed.message,
                retryable=failed.retryable,
                transfer_id=TransferId(failed.transfer_id),
            )
            for failed in message.failed
        ),
        commit_asks=tuple(
            CommitAsk(
                request_id=RequestId(named("commit_asks.request_id", ask.request_id)),
                transfer_id=TransferId(named("commit_asks.transfer_id", ask.transfer_id)),
                from_epoch=ask.from_epoch,
                next_index=ask.next_index,
                tokens=tuple(decode_token(token) for token in ask.tokens),
            )
            for ask in message.commit_asks
        ),
        owner_queries=tuple(
            OwnerQuery(
                request_id=RequestId(named("owner_queries.request_id", query.request_id)),
                transfer_id=TransferId(named("owner_queries.transfer_id", query.transfer_id)),
                epoch=query.epoch,
                revoke=query.revoke,
            )
            for query in message.owner_queries
        ),
        moves_failed=tuple(
            MoveFailed(
                request_id=RequestId(named("moves_failed.request_id", failed.request_id)),
                transfer_id=TransferId(named("moves_failed.transfer_id", failed.transfer_id)),
                epoch=failed.epoch,
                code=failed.code,
                message=failed.message,
            )
            for failed in message.moves_failed
        ),
        transfers=tuple(_decode_stats(stats) for stats in message.transfers),
        blocks=_decode_block_events(message.blocks) if message.HasField("blocks") else None,
        load=_decode_load(message.load) if message.HasField("load") else None,
    )


def _encode_stats(stats: TransferStats) -> pb.TransferStats:
    return pb.TransferStats(
        request_id=stats.request_id,
        transfer_id=stats.transfer_id,
        blocks_granted=stats.blocks_granted,
        blocks_moved=stats.blocks_moved,
        blocks_reused=stats.blocks_reused,
        bytes=stats.bytes,
        frames=stats.frames,
        tokens_recomputed=stats.tokens_recomputed,
        first_frame_ms=stats.first_frame_ms,
        last_chunk_start_ms=stats.last_chunk_start_ms,
        committed_ms=stats.committed_ms,
        tokens_cached=stats.tokens_cached,
        first_step_ms=stats.first_step_ms,
        rounds=stats.rounds,
        precopy_ms=stats.precopy_ms,
        fence_ms=stats.fence_ms,
        first=None if (first := stats.first) is None else pb.FirstTokenTimes(
            queue_ms=first.queue_ms, prefill_ms=first.prefill_ms, hold_ms=first.hold_ms
        ),
    )  # fmt: skip


def _decode_stats(message: pb.TransferStats) -> TransferStats:
    return TransferStats(
        request_id=RequestId(named("transfers.request_id", message.request_id)),
        transfer_id=TransferId(message.transfer_id),
        blocks_granted=message.blocks_granted,
        blocks_moved=message.blocks_moved,
        blocks_reused=message.blocks_reused,
        bytes=message.bytes,
        frames=message.frames,
        tokens_recomputed=message.tokens_recomputed,
        first_frame_ms=message.first_frame_ms,
        last_chunk_start_ms=message.last_chunk_start_ms,
        committed_ms=message.committed_ms,
        tokens_cached=message.tokens_cached,
        first_step_ms=finite("transfers.first_step_ms", message.first_step_ms),
        rounds=message.rounds,
        precopy_ms=message.precopy_ms,
        fence_ms=message.fence_ms,
        first=_decode_first(message.first) if message.HasField("first") else None,
    )


def _decode_first(message: pb.FirstTokenTimes) -> FirstTokenTimes:
    times = ("queue_ms", "prefill_ms", "hold_ms")
    known = {name: finite(f"transfers.first.{name}", getattr(message, name)) for name in times}
    return FirstTokenTimes(**known)


def _encode_block_events(events: BlockEvents) -> pb.BlockEvents:
    return pb.BlockEvents(
        sequence=events.sequence, stored=events.stored, removed=events.removed, cleared=events.cleared
    )


def _decode_block_events(message: pb.BlockEvents) -> BlockEvents:
    return BlockEvents(
        sequence=message.sequence,
        stored=hashes("blocks.stored", message.stored),
        removed=hashes("blocks.removed", message.removed),
        cleared=message.cleared,
    )


_SWAP = tuple(each.name for each in fields(SwapCounts))  # the same names on both sides


def _encode_load(load: WorkerLoad) -> pb.WorkerLoad:
    return pb.WorkerLoad(
        running=load.running,
        waiting=load.waiting,
        blocks=pb.BlockCounts(
            total=load.blocks.total,
            free=load.blocks.free,
            cached=load.blocks.cached,
            owned=load.blocks.owned,
            exported=load.blocks.exported,
            granted=load.blocks.granted,
            quarantined=load.blocks.quarantined,
        ),
        prefill_backlog_tokens=load.prefill_backlog_tokens,
        steps=load.steps,
        last_step_ms=load.last_step_ms,
        audit=load.audit,
        swap=pb.SwapCounts(**{name: getattr(load.swap, name) for name in _SWAP}),
        tokens_read=load.tokens_read,
        tokens_written=load.tokens_written,
    )


def _decode_load(message: pb.WorkerLoad) -> WorkerLoad:
    # Counts that do not sum to the total are let through: whoever audits must get to see them.
    blocks = message.blocks
    return WorkerLoad(
        running=message.running,
        waiting=message.waiting,
        blocks=BlockCounts(
            total=blocks.total,
            free=blocks.free,
            cached=blocks.cached,
            owned=blocks.owned,
            exported=blocks.exported,
            granted=blocks.granted,
            quarantined=blocks.quarantined,
        ),
        prefill_backlog_tokens=message.prefill_backlog_tokens,
        steps=message.steps,
        last_step_ms=finite("load.last_step_ms", message.last_step_ms),
        audit=tuple(message.audit),
        swap=SwapCounts(**{name: getattr(message.swap, name) for name in _SWAP}),
        tokens_read=message.tokens_read,
        tokens_written=message.tokens_written,
    )
