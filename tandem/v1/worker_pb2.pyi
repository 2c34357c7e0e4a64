from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AssignMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ASSIGN_MODE_UNSPECIFIED: _ClassVar[AssignMode]
    ASSIGN_MODE_PREFILL: _ClassVar[AssignMode]
    ASSIGN_MODE_DECODE: _ClassVar[AssignMode]
    ASSIGN_MODE_LOCAL: _ClassVar[AssignMode]
ASSIGN_MODE_UNSPECIFIED: AssignMode
ASSIGN_MODE_PREFILL: AssignMode
ASSIGN_MODE_DECODE: AssignMode
ASSIGN_MODE_LOCAL: AssignMode

class WorkerAddress(_message.Message):
    __slots__ = ("worker_id", "incarnation", "control", "endpoint")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CONTROL_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: int
    control: str
    endpoint: str
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., control: _Optional[str] = ..., endpoint: _Optional[str] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "max_tokens", "min_tokens", "stop_token_ids", "ignore_eos", "logprobs", "bias_token_ids", "bias_values")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    BIAS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    logprobs: int
    bias_token_ids: _containers.RepeatedScalarFieldContainer[int]
    bias_values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., logprobs: _Optional[int] = ..., bias_token_ids: _Optional[_Iterable[int]] = ..., bias_values: _Optional[_Iterable[float]] = ...) -> None: ...

class RouterMessage(_message.Message):
    __slots__ = ("hello", "assign", "cancel", "owner_is", "migrate", "stop_move")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ASSIGN_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    OWNER_IS_FIELD_NUMBER: _ClassVar[int]
    MIGRATE_FIELD_NUMBER: _ClassVar[int]
    STOP_MOVE_FIELD_NUMBER: _ClassVar[int]
    hello: RouterHello
    assign: Assign
    cancel: CancelAssigned
    owner_is: OwnerIs
    migrate: Migrate
    stop_move: StopMove
    def __init__(self, hello: _Optional[_Union[RouterHello, _Mapping]] = ..., assign: _Optional[_Union[Assign, _Mapping]] = ..., cancel: _Optional[_Union[CancelAssigned, _Mapping]] = ..., owner_is: _Optional[_Union[OwnerIs, _Mapping]] = ..., migrate: _Optional[_Union[Migrate, _Mapping]] = ..., stop_move: _Optional[_Union[StopMove, _Mapping]] = ...) -> None: ...

class RouterHello(_message.Message):
    __slots__ = ("router_id", "session")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    session: int
    def __init__(self, router_id: _Optional[str] = ..., session: _Optional[int] = ...) -> None: ...

class Assign(_message.Message):
    __slots__ = ("request_id", "epoch", "mode", "tokens", "num_prompt_tokens", "sampling", "transfer_id", "peer", "deadline_ms", "move", "cache_salt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    MOVE_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    mode: AssignMode
    tokens: _containers.RepeatedScalarFieldContainer[int]
    num_prompt_tokens: int
    sampling: Sampling
    transfer_id: str
    peer: WorkerAddress
    deadline_ms: int
    move: bool
    cache_salt: bytes
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., mode: _Optional[_Union[AssignMode, str]] = ..., tokens: _Optional[_Iterable[int]] = ..., num_prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., transfer_id: _Optional[str] = ..., peer: _Optional[_Union[WorkerAddress, _Mapping]] = ..., deadline_ms: _Optional[int] = ..., move: _Optional[bool] = ..., cache_salt: _Optional[bytes] = ...) -> None: ...

class CancelAssigned(_message.Message):
    __slots__ = ("request_id", "epoch", "reason")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    reason: str
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Migrate(_message.Message):
    __slots__ = ("request_id", "epoch", "transfer_id", "peer", "num_tokens", "deadline_ms", "reason")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    transfer_id: str
    peer: WorkerAddress
    num_tokens: int
    deadline_ms: int
    reason: str
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., transfer_id: _Optional[str] = ..., peer: _Optional[_Union[WorkerAddress, _Mapping]] = ..., num_tokens: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class StopMove(_message.Message):
    __slots__ = ("request_id", "epoch", "transfer_id", "reason")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    transfer_id: str
    reason: str
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., transfer_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class OwnerIs(_message.Message):
    __slots__ = ("request_id", "transfer_id", "epoch", "worker_id", "incarnation", "refused", "over")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    OVER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    transfer_id: str
    epoch: int
    worker_id: str
    incarnation: int
    refused: str
    over: bool
    def __init__(self, request_id: _Optional[str] = ..., transfer_id: _Optional[str] = ..., epoch: _Optional[int] = ..., worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., refused: _Optional[str] = ..., over: _Optional[bool] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("request_id", "epoch", "index", "token_id", "logprob", "top", "finish")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    index: int
    token_id: int
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    finish: str
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., index: _Optional[int] = ..., token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ..., finish: _Optional[str] = ...) -> None: ...

class RequestFailed(_message.Message):
    __slots__ = ("request_id", "epoch", "code", "message", "retryable", "transfer_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    code: str
    message: str
    retryable: bool
    transfer_id: str
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., code: _Optional[str] = ..., message: _Optional[str] = ..., retryable: _Optional[bool] = ..., transfer_id: _Optional[str] = ...) -> None: ...

class CommitAsk(_message.Message):
    __slots__ = ("request_id", "transfer_id", "from_epoch", "next_index", "tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    FROM_EPOCH_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    transfer_id: str
    from_epoch: int
    next_index: int
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    def __init__(self, request_id: _Optional[str] = ..., transfer_id: _Optional[str] = ..., from_epoch: _Optional[int] = ..., next_index: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ...) -> None: ...

class OwnerQuery(_message.Message):
    __slots__ = ("request_id", "transfer_id", "epoch", "revoke")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REVOKE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    transfer_id: str
    epoch: int
    revoke: bool
    def __init__(self, request_id: _Optional[str] = ..., transfer_id: _Optional[str] = ..., epoch: _Optional[int] = ..., revoke: _Optional[bool] = ...) -> None: ...

class MoveFailed(_message.Message):
    __slots__ = ("request_id", "transfer_id", "epoch", "code", "message")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    transfer_id: str
    epoch: int
    code: str
    message: str
    def __init__(self, request_id: _Optional[str] = ..., transfer_id: _Optional[str] = ..., epoch: _Optional[int] = ..., code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class FirstTokenTimes(_message.Message):
    __slots__ = ("queue_ms", "prefill_ms", "hold_ms")
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_FIELD_NUMBER: _ClassVar[int]
    HOLD_MS_FIELD_NUMBER: _ClassVar[int]
    queue_ms: float
    prefill_ms: float
    hold_ms: float
    def __init__(self, queue_ms: _Optional[float] = ..., prefill_ms: _Optional[float] = ..., hold_ms: _Optional[float] = ...) -> None: ...

class TransferStats(_message.Message):
    __slots__ = ("request_id", "transfer_id", "blocks_granted", "blocks_moved", "blocks_reused", "bytes", "frames", "tokens_recomputed", "first_frame_ms", "last_chunk_start_ms", "committed_ms", "tokens_cached", "first_step_ms", "rounds", "precopy_ms", "fence_ms", "first")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_GRANTED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_MOVED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_REUSED_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_RECOMPUTED_FIELD_NUMBER: _ClassVar[int]
    FIRST_FRAME_MS_FIELD_NUMBER: _ClassVar[int]
    LAST_CHUNK_START_MS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_MS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_CACHED_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_MS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    PRECOPY_MS_FIELD_NUMBER: _ClassVar[int]
    FENCE_MS_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    transfer_id: str
    blocks_granted: int
    blocks_moved: int
    blocks_reused: int
    bytes: int
    frames: int
    tokens_recomputed: int
    first_frame_ms: int
    last_chunk_start_ms: int
    committed_ms: int
    tokens_cached: int
    first_step_ms: float
    rounds: int
    precopy_ms: int
    fence_ms: int
    first: FirstTokenTimes
    def __init__(self, request_id: _Optional[str] = ..., transfer_id: _Optional[str] = ..., blocks_granted: _Optional[int] = ..., blocks_moved: _Optional[int] = ..., blocks_reused: _Optional[int] = ..., bytes: _Optional[int] = ..., frames: _Optional[int] = ..., tokens_recomputed: _Optional[int] = ..., first_frame_ms: _Optional[int] = ..., last_chunk_start_ms: _Optional[int] = ..., committed_ms: _Optional[int] = ..., tokens_cached: _Optional[int] = ..., first_step_ms: _Optional[float] = ..., rounds: _Optional[int] = ..., precopy_ms: _Optional[int] = ..., fence_ms: _Optional[int] = ..., first: _Optional[_Union[FirstTokenTimes, _Mapping]] = ...) -> None: ...

class BlockEvents(_message.Message):
    __slots__ = ("sequence", "stored", "removed", "cleared")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    stored: _containers.RepeatedScalarFieldContainer[bytes]
    removed: _containers.RepeatedScalarFieldContainer[bytes]
    cleared: bool
    def __init__(self, sequence: _Optional[int] = ..., stored: _Optional[_Iterable[bytes]] = ..., removed: _Optional[_Iterable[bytes]] = ..., cleared: _Optional[bool] = ...) -> None: ...

class BlockCounts(_message.Message):
    __slots__ = ("total", "free", "cached", "owned", "exported", "granted", "quarantined")
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    OWNED_FIELD_NUMBER: _ClassVar[int]
    EXPORTED_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    total: int
    free: int
    cached: int
    owned: int
    exported: int
    granted: int
    quarantined: int
    def __init__(self, total: _Optional[int] = ..., free: _Optional[int] = ..., cached: _Optional[int] = ..., owned: _Optional[int] = ..., exported: _Optional[int] = ..., granted: _Optional[int] = ..., quarantined: _Optional[int] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("running", "waiting", "blocks", "prefill_backlog_tokens", "steps", "last_step_ms", "audit", "swap", "tokens_read", "tokens_written")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_BACKLOG_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_MS_FIELD_NUMBER: _ClassVar[int]
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    SWAP_FIELD_NUMBER: _ClassVar[int]
    TOKENS_READ_FIELD_NUMBER: _ClassVar[int]
    TOKENS_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    blocks: BlockCounts
    prefill_backlog_tokens: int
    steps: int
    last_step_ms: float
    audit: _containers.RepeatedScalarFieldContainer[str]
    swap: SwapCounts
    tokens_read: int
    tokens_written: int
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., blocks: _Optional[_Union[BlockCounts, _Mapping]] = ..., prefill_backlog_tokens: _Optional[int] = ..., steps: _Optional[int] = ..., last_step_ms: _Optional[float] = ..., audit: _Optional[_Iterable[str]] = ..., swap: _Optional[_Union[SwapCounts, _Mapping]] = ..., tokens_read: _Optional[int] = ..., tokens_written: _Optional[int] = ...) -> None: ...

class SwapCounts(_message.Message):
    __slots__ = ("total", "used", "requests", "swapped_out", "brought_back", "recomputed")
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    SWAPPED_OUT_FIELD_NUMBER: _ClassVar[int]
    BROUGHT_BACK_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_FIELD_NUMBER: _ClassVar[int]
    total: int
    used: int
    requests: int
    swapped_out: int
    brought_back: int
    recomputed: int
    def __init__(self, total: _Optional[int] = ..., used: _Optional[int] = ..., requests: _Optional[int] = ..., swapped_out: _Optional[int] = ..., brought_back: _Optional[int] = ..., recomputed: _Optional[int] = ...) -> None: ...

class WorkerReport(_message.Message):
    __slots__ = ("worker_id", "incarnation", "sequence", "tokens", "failed", "commit_asks", "owner_queries", "transfers", "blocks", "load", "moves_failed")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    COMMIT_ASKS_FIELD_NUMBER: _ClassVar[int]
    OWNER_QUERIES_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    MOVES_FAILED_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: int
    sequence: int
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    failed: _containers.RepeatedCompositeFieldContainer[RequestFailed]
    commit_asks: _containers.RepeatedCompositeFieldContainer[CommitAsk]
    owner_queries: _containers.RepeatedCompositeFieldContainer[OwnerQuery]
    transfers: _containers.RepeatedCompositeFieldContainer[TransferStats]
    blocks: BlockEvents
    load: WorkerLoad
    moves_failed: _containers.RepeatedCompositeFieldContainer[MoveFailed]
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., sequence: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ..., failed: _Optional[_Iterable[_Union[RequestFailed, _Mapping]]] = ..., commit_asks: _Optional[_Iterable[_Union[CommitAsk, _Mapping]]] = ..., owner_queries: _Optional[_Iterable[_Union[OwnerQuery, _Mapping]]] = ..., transfers: _Optional[_Iterable[_Union[TransferStats, _Mapping]]] = ..., blocks: _Optional[_Union[BlockEvents, _Mapping]] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ..., moves_failed: _Optional[_Iterable[_Union[MoveFailed, _Mapping]]] = ...) -> None: ...

class RegisterRequest(_message.Message):
    __slots__ = ("worker_id", "role", "control", "endpoint", "pid", "agent_pid", "model", "namespace", "fingerprint", "exact", "dtype", "block_size", "total_blocks", "context_tokens", "block_bytes", "labels", "incarnation")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTROL_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    AGENT_PID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: str
    control: str
    endpoint: str
    pid: int
    agent_pid: int
    model: str
    namespace: str
    fingerprint: str
    exact: bool
    dtype: str
    block_size: int
    total_blocks: int
    context_tokens: int
    block_bytes: int
    labels: _containers.RepeatedCompositeFieldContainer[Label]
    incarnation: int
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[str] = ..., control: _Optional[str] = ..., endpoint: _Optional[str] = ..., pid: _Optional[int] = ..., agent_pid: _Optional[int] = ..., model: _Optional[str] = ..., namespace: _Optional[str] = ..., fingerprint: _Optional[str] = ..., exact: _Optional[bool] = ..., dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., total_blocks: _Optional[int] = ..., context_tokens: _Optional[int] = ..., block_bytes: _Optional[int] = ..., labels: _Optional[_Iterable[_Union[Label, _Mapping]]] = ..., incarnation: _Optional[int] = ...) -> None: ...

class Label(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

class RegisterReply(_message.Message):
    __slots__ = ("heartbeat_ms", "refused")
    HEARTBEAT_MS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    heartbeat_ms: int
    refused: str
    def __init__(self, heartbeat_ms: _Optional[int] = ..., refused: _Optional[str] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("worker_id", "incarnation", "steps", "runnable", "agent_pid", "refused", "damaged")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    RUNNABLE_FIELD_NUMBER: _ClassVar[int]
    AGENT_PID_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: int
    steps: int
    runnable: bool
    agent_pid: int
    refused: int
    damaged: int
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., steps: _Optional[int] = ..., runnable: _Optional[bool] = ..., agent_pid: _Optional[int] = ..., refused: _Optional[int] = ..., damaged: _Optional[int] = ...) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ("known", "leave")
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    known: bool
    leave: bool
    def __init__(self, known: _Optional[bool] = ..., leave: _Optional[bool] = ...) -> None: ...

class TransferHeader(_message.Message):
    __slots__ = ("transfer_id", "request_id", "epoch", "sender", "source_incarnation", "target_incarnation")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    SOURCE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TARGET_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    request_id: str
    epoch: int
    sender: str
    source_incarnation: int
    target_incarnation: int
    def __init__(self, transfer_id: _Optional[str] = ..., request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., sender: _Optional[str] = ..., source_incarnation: _Optional[int] = ..., target_incarnation: _Optional[int] = ...) -> None: ...

class TransferMessage(_message.Message):
    __slots__ = ("header", "offer", "grant", "refuse", "wait", "commit_request", "cancel", "renew", "status_ask", "status_is")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    REFUSE_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    COMMIT_REQUEST_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    STATUS_ASK_FIELD_NUMBER: _ClassVar[int]
    STATUS_IS_FIELD_NUMBER: _ClassVar[int]
    header: TransferHeader
    offer: Offer
    grant: Grant
    refuse: Refuse
    wait: Wait
    commit_request: CommitRequest
    cancel: TransferCancel
    renew: Renew
    status_ask: StatusAsk
    status_is: StatusIs
    def __init__(self, header: _Optional[_Union[TransferHeader, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ..., refuse: _Optional[_Union[Refuse, _Mapping]] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ..., commit_request: _Optional[_Union[CommitRequest, _Mapping]] = ..., cancel: _Optional[_Union[TransferCancel, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ..., status_ask: _Optional[_Union[StatusAsk, _Mapping]] = ..., status_is: _Optional[_Union[StatusIs, _Mapping]] = ...) -> None: ...

class KVLayout(_message.Message):
    __slots__ = ("namespace", "fingerprint", "num_layers", "num_kv_heads", "head_dim", "block_size", "dtype", "order", "tp_rank", "tp_size", "block_bytes")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    TP_RANK_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    fingerprint: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    order: str
    tp_rank: int
    tp_size: int
    block_bytes: int
    def __init__(self, namespace: _Optional[str] = ..., fingerprint: _Optional[str] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_size: _Optional[int] = ..., dtype: _Optional[str] = ..., order: _Optional[str] = ..., tp_rank: _Optional[int] = ..., tp_size: _Optional[int] = ..., block_bytes: _Optional[int] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("layout", "num_tokens", "hashes", "lease_ms", "exact", "endpoint", "move")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    MOVE_FIELD_NUMBER: _ClassVar[int]
    layout: KVLayout
    num_tokens: int
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    lease_ms: int
    exact: bool
    endpoint: str
    move: bool
    def __init__(self, layout: _Optional[_Union[KVLayout, _Mapping]] = ..., num_tokens: _Optional[int] = ..., hashes: _Optional[_Iterable[bytes]] = ..., lease_ms: _Optional[int] = ..., exact: _Optional[bool] = ..., endpoint: _Optional[str] = ..., move: _Optional[bool] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("num_reused", "blocks", "generations", "credits", "lease_ms", "endpoint")
    NUM_REUSED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    num_reused: int
    blocks: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    credits: int
    lease_ms: int
    endpoint: str
    def __init__(self, num_reused: _Optional[int] = ..., blocks: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., credits: _Optional[int] = ..., lease_ms: _Optional[int] = ..., endpoint: _Optional[str] = ...) -> None: ...

class Refuse(_message.Message):
    __slots__ = ("code", "reason", "retryable")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    code: str
    reason: str
    retryable: bool
    def __init__(self, code: _Optional[str] = ..., reason: _Optional[str] = ..., retryable: _Optional[bool] = ...) -> None: ...

class Wait(_message.Message):
    __slots__ = ("retry_after_ms", "reason")
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    retry_after_ms: int
    reason: str
    def __init__(self, retry_after_ms: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("num_frames", "digest", "num_computed_tokens", "tokens")
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_frames: int
    digest: bytes
    num_computed_tokens: int
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    def __init__(self, num_frames: _Optional[int] = ..., digest: _Optional[bytes] = ..., num_computed_tokens: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ...) -> None: ...

class TransferCancel(_message.Message):
    __slots__ = ("reason", "spoiled")
    REASON_FIELD_NUMBER: _ClassVar[int]
    SPOILED_FIELD_NUMBER: _ClassVar[int]
    reason: str
    spoiled: bool
    def __init__(self, reason: _Optional[str] = ..., spoiled: _Optional[bool] = ...) -> None: ...

class Renew(_message.Message):
    __slots__ = ("lease_ms",)
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    lease_ms: int
    def __init__(self, lease_ms: _Optional[int] = ...) -> None: ...

class StatusAsk(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusIs(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: str
    def __init__(self, state: _Optional[str] = ...) -> None: ...
