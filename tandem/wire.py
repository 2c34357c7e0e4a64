"""The messages of tandem.messages as protobuf and back, losslessly.

Encoding trusts its caller. Decoding trusts nobody: it raises ValueError naming the field, its value and its limit, so
that a malformed message ends one exchange and never reaches a core.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from tandem.messages import (
    Assign,
    AssignMode,
    CancelAssigned,
    Migrate,
    OwnerIs,
    Role,
    RouterMessage,
    StopMove,
    WorkerAddress,
    WorkerInfo,
)
from tandem.request import FinishReason, RequestId, Sampling, Token, TransferId, WorkerId
from tandem.v1 import worker_pb2 as pb

HASH_BYTES = 16

_MODE_TO_WIRE = {
    AssignMode.PREFILL: pb.ASSIGN_MODE_PREFILL,
    AssignMode.DECODE: pb.ASSIGN_MODE_DECODE,
    AssignMode.LOCAL: pb.ASSIGN_MODE_LOCAL,
}
_MODE_FROM_WIRE = {number: mode for mode, number in _MODE_TO_WIRE.items()}
_FINISH_FROM_WIRE = {"": None, **{reason.value: reason for reason in FinishReason}}
_ROLE_FROM_WIRE = {role.value: role for role in Role}


# ---- checks, shared with kv_transfer/wire.py -----------------------------------------------------------------------


def named(field: str, value: str) -> str:
    """`value`, an identifier, unless it is empty. Raises ValueError."""
    if not value:
        raise ValueError(f"{field}: is empty, and must name something")
    return value


def within(field: str, value: int, low: int, high: int) -> int:
    """`value` when low <= value <= high. Raises ValueError."""
    if not low <= value <= high:
        raise ValueError(f"{field}: is {value}, must be from {low} to {high}")
    return value


def finite(field: str, value: float) -> float:
    """`value` unless it is a NaN or an infinity. Raises ValueError."""
    if not math.isfinite(value):
        raise ValueError(f"{field}: is {value}, must be finite")
    return value


def hashes(field: str, values: Iterable[bytes]) -> tuple[bytes, ...]:
    """`values` when each is as long as a block hash. Raises ValueError."""
    found = tuple(values)
    for position, value in enumerate(found):
        if len(value) != HASH_BYTES:
            raise ValueError(f"{field}[{position}]: has {len(value)} bytes, must have {HASH_BYTES}")
    return found


def same_length(field: str, first: Sequence[object], other: str, second: Sequence[object]) -> None:
    """Raises ValueError when two lists that go together pairwise differ in length."""
    if len(first) != len(second):
        raise ValueError(f"{field}: has {len(first)} entries and {other} has {len(second)}, must be as many")


# ---- pieces --------------------------------------------------------------------------------------------------------


def encode_address(address: WorkerAddress) -> pb.WorkerAddress:
    """One worker incarnation's address."""
    return pb.WorkerAddress(
        worker_id=address.worker_id,
        incarnation=address.incarnation,
        control=address.control,
        endpoint=address.endpoint,
    )


def decode_address(message: pb.WorkerAddress) -> WorkerAddress:
    """Raises ValueError when the worker or its control address is not named."""
    return WorkerAddress(
        worker_id=WorkerId(named("worker_id", message.worker_id)),
        incarnation=message.incarnation,
        control=named("control", message.control),
        endpoint=message.endpoint,
    )


def encode_sampling(sampling: Sampling) -> pb.Sampling:
    """Sampling parameters; `logprobs` None stays apart from 0."""
    return pb.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        bias_token_ids=[token_id for token_id, _ in sampling.logit_bias],
        bias_values=[value for _, value in sampling.logit_bias],
    )


def decode_sampling(message: pb.Sampling) -> Sampling:
    """Raises ValueError on numbers that are not finite and on biases that do not pair up."""
    same_length("bias_values", message.bias_values, "bias_token_ids", message.bias_token_ids)
    for position, value in enumerate(message.bias_values):
        finite(f"bias_values[{position}]", value)
    return Sampling(
        temperature=finite("temperature", message.temperature),
        top_k=message.top_k,
        top_p=finite("top_p", message.top_p),
        min_p=finite("min_p", message.min_p),
        repetition_penalty=finite("repetition_penalty", message.repetition_penalty),
        presence_penalty=finite("presence_penalty", message.presence_penalty),
        frequency_penalty=finite("frequency_penalty", message.frequency_penalty),
        seed=message.seed,
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        logit_bias=tuple(zip(message.bias_token_ids, message.bias_values, strict=True)),
    )


def encode_token(token: Token) -> pb.Token:
    """One token of an answer."""
    message = pb.Token(
        request_id=token.request_id,
        epoch=token.epoch,
        index=token.index,
        token_id=token.token_id,
        logprob=token.logprob,
        finish="" if token.finish is None else token.finish.value,
    )
    for token_id, logprob in token.top:
        message.top.add(token_id=token_id, logprob=logprob)
    return message


def decode_token(message: pb.Token) -> Token:
    """Raises ValueError on an unknown way to finish."""
    if message.finish not in _FINISH_FROM_WIRE:
        raise ValueError(f"finish: is {message.finish!r}, must be one of {sorted(_FINISH_FROM_WIRE)}")
    return Token(
        request_id=RequestId(named("request_id", message.request_id)),
        epoch=message.epoch,
        index=message.index,
        token_id=message.token_id,
        logprob=message.logprob if message.HasField("logprob") else None,
        top=tuple((top.token_id, top.logprob) for top in message.top),
        finish=_FINISH_FROM_WIRE[message.finish],
    )


# ---- router to worker ----------------------------------------------------------------------------------------------


def encode_router_message(message: RouterMessage) -> pb.RouterMessage:
    """Any message of a router to a worker but the hello, which belongs to the stream."""
    match message:
        case Assign():
            return pb.RouterMessage(assign=_encode_assign(message))
        case CancelAssigned():
            return pb.RouterMessage(
                cancel=pb.CancelAssigned(request_id=message.request_id, epoch=message.epoch, reason=message.reason)
            )
        case OwnerIs():
            return pb.RouterMessage(
                owner_is=pb.OwnerIs(
                    request_id=message.request_id,
                    transfer_id=message.transfer_id,
                    epoch=message.epoch,
                    worker_id="" if message.worker_id is None else message.worker_id,
                    incarnation=message.incarnation,
                    refused=message.refused,
                    over=message.over,
                )
            )
        case Migrate():
            return pb.RouterMessage(
                migrate=pb.Migrate(
                    request_id=message.request_id,
                    epoch=message.epoch,
                    transfer_id=message.transfer_id,
                    peer=encode_address(message.peer),
                    num_tokens=message.num_tokens,
                    deadline_ms=message.deadline_ms,
                    reason=message.reason,
                )
            )
        case StopMove():
            return pb.RouterMessage(
                stop_move=pb.StopMove(
                    request_id=message.request_id,
                    epoch=message.epoch,
                    transfer_id=message.transfer_id,
                    reason=message.reason,
                )
            )


def decode_router_message(message: pb.RouterMessage) -> RouterMessage:
    """Raises ValueError on a hello, on an empty message and on whatever is malformed in it."""
    match message.WhichOneof("kind"):
        case "assign":
            return _decode_assign(message.assign)
        case "cancel":
            return CancelAssigned(
                request_id=RequestId(named("cancel.request_id", message.cancel.request_id)),
                epoch=message.cancel.epoch,
                reason=message.cancel.reason,
            )
        case "owner_is":
            owner = message.owner_is
            return OwnerIs(
                request_id=RequestId(named("owner_is.request_id", owner.request_id)),
                transfer_id=TransferId(owner.transfer_id),
                epoch=owner.epoch,
                worker_id=WorkerId(owner.worker_id) if owner.worker_id else None,
                incarnation=owner.incarnation,
                refused=owner.refused,
                over=owner.over,
            )
        case "migrate":
            return _decode_migrate(message.migrate)
        case "stop_move":
            return StopMove(
                request_id=RequestId(named("stop_move.request_id", message.stop_move.request_id)),
                epoch=message.stop_move.epoch,
                transfer_id=TransferId(named("stop_move.transfer_id", message.stop_move.transfer_id)),
                reason=message.stop_move.reason,
            )
        case kind:
            raise ValueError(f"kind: is {kind!r}, must be assign, cancel, owner_is, migrate or stop_move")


def _decode_migrate(message: pb.Migrate) -> Migrate:
    if not message.HasField("peer"):
        raise ValueError("migrate.peer: is missing")
    within("migrate.num_tokens", message.num_tokens, 1, 1 << 31)
    return Migrate(
        request_id=RequestId(named("migrate.request_id", message.request_id)),
        epoch=message.epoch,
        transfer_id=TransferId(named("migrate.transfer_id", message.transfer_id)),
        peer=decode_address(message.peer),
        num_tokens=message.num_tokens,
        deadline_ms=message.deadline_ms,
        reason=message.reason,
    )


def _encode_assign(assign: Assign) -> pb.Assign:
    return pb.Assign(
        request_id=assign.request_id,
        epoch=assign.epoch,
        mode=_MODE_TO_WIRE[assign.mode],
        tokens=assign.tokens,
        num_prompt_tokens=assign.num_prompt_tokens,
        sampling=encode_sampling(assign.sampling),
        transfer_id=assign.transfer_id,
        peer=None if assign.peer is None else encode_address(assign.peer),
        deadline_ms=assign.deadline_ms,
        move=assign.move,
        cache_salt=assign.cache_salt,
    )


def _decode_assign(message: pb.Assign) -> Assign:
    mode = _MODE_FROM_WIRE.get(message.mode)
    if mode is None:
        raise ValueError(f"assign.mode: is {message.mode}, must be one of {sorted(_MODE_FROM_WIRE)}")
    if not message.HasField("sampling"):
        raise ValueError("assign.sampling: is missing")
    if mode is AssignMode.LOCAL and (message.transfer_id or message.HasField("peer")):
        raise ValueError("assign.transfer_id, assign.peer: are set, must be empty when the mode is local")
    if mode is not AssignMode.LOCAL and not (message.transfer_id and message.HasField("peer")):
        raise ValueError(f"assign.transfer_id, assign.peer: are missing, the mode {mode.value} needs both")
    if message.move and mode is not AssignMode.DECODE:
        raise ValueError(f"assign.move: is set, must not be when the mode is {mode.value}")
    if len(message.cache_salt) not in (0, HASH_BYTES):
        raise ValueError(f"assign.cache_salt: has {len(message.cache_salt)} bytes, must have 0 or {HASH_BYTES}")
    within("assign.num_prompt_tokens", message.num_prompt_tokens, 1, len(message.tokens))
    return Assign(
        request_id=RequestId(named("assign.request_id", message.request_id)),
        epoch=message.epoch,
        mode=mode,
        tokens=tuple(message.tokens),
        num_prompt_tokens=message.num_prompt_tokens,
        sampling=decode_sampling(message.sampling),
        transfer_id=TransferId(message.transfer_id),
        peer=decode_address(message.peer) if message.HasField("peer") else None,
        deadline_ms=message.deadline_ms,
        move=message.move,
        cache_salt=message.cache_salt,
    )


# ---- worker to registry --------------------------------------------------------------------------------------------


def encode_worker_info(info: WorkerInfo) -> pb.RegisterRequest:
    """What a worker says of itself when it registers."""
    return pb.RegisterRequest(
        worker_id=info.worker_id,
        role=info.role.value,
        control=info.control,
        endpoint=info.endpoint,
        pid=info.pid,
        agent_pid=info.agent_pid,
        model=info.model,
        namespace=info.namespace,
        fingerprint=info.fingerprint,
        exact=info.exact,
        dtype=info.dtype,
        block_size=info.block_size,
        total_blocks=info.total_blocks,
        context_tokens=info.context_tokens,
        block_bytes=info.block_bytes,
        labels=[pb.Label(name=name, value=value) for name, value in info.labels],
    )


def decode_worker_info(message: pb.RegisterRequest) -> WorkerInfo:
    """Raises ValueError on an unknown role, a missing name or a pool of no size."""
    if message.role not in _ROLE_FROM_WIRE:
        raise ValueError(f"role: is {message.role!r}, must be one of {sorted(_ROLE_FROM_WIRE)}")
    for field in ("block_size", "total_blocks", "context_tokens", "block_bytes"):
        if getattr(message, field) < 1:
            raise ValueError(f"{field}: is 0, must be at least 1")
    return WorkerInfo(
        worker_id=WorkerId(named("worker_id", message.worker_id)),
        role=_ROLE_FROM_WIRE[message.role],
        control=named("control", message.control),
        endpoint=message.endpoint,
        pid=message.pid,
        agent_pid=message.agent_pid,
        model=message.model,
        namespace=message.namespace,
        fingerprint=message.fingerprint,
        exact=message.exact,
        dtype=message.dtype,
        block_size=message.block_size,
        total_blocks=message.total_blocks,
        context_tokens=message.context_tokens,
        block_bytes=message.block_bytes,
        labels=tuple((label.name, label.value) for label in message.labels),
    )
