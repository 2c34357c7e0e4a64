"""A request's flight record as the operators' service tells it."""

from __future__ import annotations

from collections.abc import Sequence

from router.flight import Flight
from router.placement import Candidate, Part, Placement
from router.request import PlacementRecord
from tandem.messages import AssignMode
from tandem.v1 import admin_pb2 as pb


def flight_record(flight: Flight, status: pb.RequestStatus, moves: Sequence[pb.MoveStatus]) -> pb.FlightRecord:
    """`status` and `moves`: of the same request."""
    request, first = flight.request, flight.first
    record = pb.FlightRecord(
        request=status,
        placements=[_placement(each) for each in request.placements],
        moves=moves,
        story=[pb.Moment(at_ms=at_ms, what=what) for at_ms, what in request.story],
    )
    if first is not None:
        record.ttft_ms = first.ttft_ms
        record.stages.extend(pb.StageTime(name=stage.value, ms=stage_ms) for stage, stage_ms in first.stages)
    return record


def _placement(record: PlacementRecord) -> pb.PlacementStatus:
    placed = record.placement
    return pb.PlacementStatus(
        at_ms=record.at_ms,
        epoch=record.epoch,
        mode=placed.mode.value,
        prefill_worker=placed.prefill_worker.worker_id,
        decode_worker=placed.decode_worker.worker_id,
        predicted_ms=placed.predicted_ms,
        reason=placed.reason,
        candidates=[
            pb.CandidateStatus(
                worker=each.worker_id,
                part=each.part.value,
                score_ms=each.score_ms,
                terms=[pb.Term(name=name, value=value) for name, value in each.terms],
                chosen=_chosen(each, placed),
            )
            for each in placed.candidates
        ],
    )


def _chosen(candidate: Candidate, placed: Placement) -> bool:
    """Of a LOCAL placement the workers that were considered for a part alone have lost."""
    source, target = placed.prefill_worker.worker_id, placed.decode_worker.worker_id
    if placed.mode is AssignMode.LOCAL:
        return candidate.part is Part.BOTH and candidate.worker_id == source
    return (candidate.part, candidate.worker_id) in ((Part.PREFILL, source), (Part.DECODE, target))
