from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ("include_finished", "local", "last_minute")
    INCLUDE_FINISHED_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    LAST_MINUTE_FIELD_NUMBER: _ClassVar[int]
    include_finished: bool
    local: bool
    last_minute: bool
    def __init__(self, include_finished: _Optional[bool] = ..., local: _Optional[bool] = ..., last_minute: _Optional[bool] = ...) -> None: ...

class BlockCountsStatus(_message.Message):
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

class WorkerStatus(_message.Message):
    __slots__ = ("id", "role", "state", "pid", "agent_pid", "incarnation", "running", "waiting", "exact", "kv_blocks", "model", "dtype", "audit", "reason", "exact_reason", "steps", "last_step_ms", "swap", "refused", "control", "tokens_read", "tokens_written")
    ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    AGENT_PID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXACT_REASON_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_MS_FIELD_NUMBER: _ClassVar[int]
    SWAP_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    CONTROL_FIELD_NUMBER: _ClassVar[int]
    TOKENS_READ_FIELD_NUMBER: _ClassVar[int]
    TOKENS_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    id: str
    role: str
    state: str
    pid: int
    agent_pid: int
    incarnation: int
    running: int
    waiting: int
    exact: bool
    kv_blocks: BlockCountsStatus
    model: str
    dtype: str
    audit: _containers.RepeatedScalarFieldContainer[str]
    reason: str
    exact_reason: str
    steps: int
    last_step_ms: float
    swap: SwapStatus
    refused: int
    control: str
    tokens_read: int
    tokens_written: int
    def __init__(self, id: _Optional[str] = ..., role: _Optional[str] = ..., state: _Optional[str] = ..., pid: _Optional[int] = ..., agent_pid: _Optional[int] = ..., incarnation: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., exact: _Optional[bool] = ..., kv_blocks: _Optional[_Union[BlockCountsStatus, _Mapping]] = ..., model: _Optional[str] = ..., dtype: _Optional[str] = ..., audit: _Optional[_Iterable[str]] = ..., reason: _Optional[str] = ..., exact_reason: _Optional[str] = ..., steps: _Optional[int] = ..., last_step_ms: _Optional[float] = ..., swap: _Optional[_Union[SwapStatus, _Mapping]] = ..., refused: _Optional[int] = ..., control: _Optional[str] = ..., tokens_read: _Optional[int] = ..., tokens_written: _Optional[int] = ...) -> None: ...

class SwapStatus(_message.Message):
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

class RequestStatus(_message.Message):
    __slots__ = ("id", "state", "prefill_worker", "decode_worker", "tokens", "blocks_moved", "tokens_recomputed", "blocks_granted", "blocks_reused", "error", "reason", "first_frame_ms", "last_chunk_start_ms", "committed_ms", "tokens_cached", "prompt_tokens", "ttft_ms", "num_replacements", "mode", "num_moves", "moving_to", "first_step_ms", "priority", "router", "age_ms")
    ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_MOVED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_RECOMPUTED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_GRANTED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_REUSED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FIRST_FRAME_MS_FIELD_NUMBER: _ClassVar[int]
    LAST_CHUNK_START_MS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_MS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_CACHED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    NUM_REPLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    NUM_MOVES_FIELD_NUMBER: _ClassVar[int]
    MOVING_TO_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_MS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    id: str
    state: str
    prefill_worker: str
    decode_worker: str
    tokens: int
    blocks_moved: int
    tokens_recomputed: int
    blocks_granted: int
    blocks_reused: int
    error: str
    reason: str
    first_frame_ms: int
    last_chunk_start_ms: int
    committed_ms: int
    tokens_cached: int
    prompt_tokens: int
    ttft_ms: int
    num_replacements: int
    mode: str
    num_moves: int
    moving_to: str
    first_step_ms: float
    priority: int
    router: str
    age_ms: int
    def __init__(self, id: _Optional[str] = ..., state: _Optional[str] = ..., prefill_worker: _Optional[str] = ..., decode_worker: _Optional[str] = ..., tokens: _Optional[int] = ..., blocks_moved: _Optional[int] = ..., tokens_recomputed: _Optional[int] = ..., blocks_granted: _Optional[int] = ..., blocks_reused: _Optional[int] = ..., error: _Optional[str] = ..., reason: _Optional[str] = ..., first_frame_ms: _Optional[int] = ..., last_chunk_start_ms: _Optional[int] = ..., committed_ms: _Optional[int] = ..., tokens_cached: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., ttft_ms: _Optional[int] = ..., num_replacements: _Optional[int] = ..., mode: _Optional[str] = ..., num_moves: _Optional[int] = ..., moving_to: _Optional[str] = ..., first_step_ms: _Optional[float] = ..., priority: _Optional[int] = ..., router: _Optional[str] = ..., age_ms: _Optional[int] = ...) -> None: ...

class RouterStatus(_message.Message):
    __slots__ = ("id", "pid", "address", "up", "workers_ready", "num_requests", "last_minute", "tokens_total")
    ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    UP_FIELD_NUMBER: _ClassVar[int]
    WORKERS_READY_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    LAST_MINUTE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    id: str
    pid: int
    address: str
    up: bool
    workers_ready: _containers.RepeatedScalarFieldContainer[str]
    num_requests: int
    last_minute: LastMinute
    tokens_total: int
    def __init__(self, id: _Optional[str] = ..., pid: _Optional[int] = ..., address: _Optional[str] = ..., up: _Optional[bool] = ..., workers_ready: _Optional[_Iterable[str]] = ..., num_requests: _Optional[int] = ..., last_minute: _Optional[_Union[LastMinute, _Mapping]] = ..., tokens_total: _Optional[int] = ...) -> None: ...

class LastMinute(_message.Message):
    __slots__ = ("seconds", "tokens", "refused", "recovered", "moved", "ttft_ms", "tpot_ms")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    RECOVERED_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    TPOT_MS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    tokens: int
    refused: int
    recovered: int
    moved: int
    ttft_ms: _containers.RepeatedScalarFieldContainer[float]
    tpot_ms: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, seconds: _Optional[float] = ..., tokens: _Optional[int] = ..., refused: _Optional[int] = ..., recovered: _Optional[int] = ..., moved: _Optional[int] = ..., ttft_ms: _Optional[_Iterable[float]] = ..., tpot_ms: _Optional[_Iterable[float]] = ...) -> None: ...

class MoveStatus(_message.Message):
    __slots__ = ("request", "to", "reason", "why", "outcome", "error", "rounds", "blocks", "bytes", "precopy_ms", "pause_ms", "at_ms", "blocks_reused", "fence_ms")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    FROM_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    PRECOPY_MS_FIELD_NUMBER: _ClassVar[int]
    PAUSE_MS_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_REUSED_FIELD_NUMBER: _ClassVar[int]
    FENCE_MS_FIELD_NUMBER: _ClassVar[int]
    request: str
    to: str
    reason: str
    why: str
    outcome: str
    error: str
    rounds: int
    blocks: int
    bytes: int
    precopy_ms: int
    pause_ms: int
    at_ms: int
    blocks_reused: int
    fence_ms: int
    def __init__(self, request: _Optional[str] = ..., to: _Optional[str] = ..., reason: _Optional[str] = ..., why: _Optional[str] = ..., outcome: _Optional[str] = ..., error: _Optional[str] = ..., rounds: _Optional[int] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., precopy_ms: _Optional[int] = ..., pause_ms: _Optional[int] = ..., at_ms: _Optional[int] = ..., blocks_reused: _Optional[int] = ..., fence_ms: _Optional[int] = ..., **kwargs) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("workers", "requests", "model", "http_address", "grpc_address", "router_pid", "moves", "routers", "not_ready", "pairs", "store")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ROUTER_PID_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    NOT_READY_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    requests: _containers.RepeatedCompositeFieldContainer[RequestStatus]
    model: str
    http_address: str
    grpc_address: str
    router_pid: int
    moves: _containers.RepeatedCompositeFieldContainer[MoveStatus]
    routers: _containers.RepeatedCompositeFieldContainer[RouterStatus]
    not_ready: str
    pairs: _containers.RepeatedCompositeFieldContainer[PairStatus]
    store: str
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., requests: _Optional[_Iterable[_Union[RequestStatus, _Mapping]]] = ..., model: _Optional[str] = ..., http_address: _Optional[str] = ..., grpc_address: _Optional[str] = ..., router_pid: _Optional[int] = ..., moves: _Optional[_Iterable[_Union[MoveStatus, _Mapping]]] = ..., routers: _Optional[_Iterable[_Union[RouterStatus, _Mapping]]] = ..., not_ready: _Optional[str] = ..., pairs: _Optional[_Iterable[_Union[PairStatus, _Mapping]]] = ..., store: _Optional[str] = ...) -> None: ...

class PairStatus(_message.Message):
    __slots__ = ("prefill_worker", "decode_worker", "served_ms", "error")
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    SERVED_MS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    prefill_worker: str
    decode_worker: str
    served_ms: int
    error: str
    def __init__(self, prefill_worker: _Optional[str] = ..., decode_worker: _Optional[str] = ..., served_ms: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class MigrateRequest(_message.Message):
    __slots__ = ("request_id", "to", "local")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    to: str
    local: bool
    def __init__(self, request_id: _Optional[str] = ..., to: _Optional[str] = ..., local: _Optional[bool] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request_id", "local")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    local: bool
    def __init__(self, request_id: _Optional[str] = ..., local: _Optional[bool] = ...) -> None: ...

class FlightRecord(_message.Message):
    __slots__ = ("request", "ttft_ms", "stages", "placements", "moves", "story")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    PLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    STORY_FIELD_NUMBER: _ClassVar[int]
    request: RequestStatus
    ttft_ms: float
    stages: _containers.RepeatedCompositeFieldContainer[StageTime]
    placements: _containers.RepeatedCompositeFieldContainer[PlacementStatus]
    moves: _containers.RepeatedCompositeFieldContainer[MoveStatus]
    story: _containers.RepeatedCompositeFieldContainer[Moment]
    def __init__(self, request: _Optional[_Union[RequestStatus, _Mapping]] = ..., ttft_ms: _Optional[float] = ..., stages: _Optional[_Iterable[_Union[StageTime, _Mapping]]] = ..., placements: _Optional[_Iterable[_Union[PlacementStatus, _Mapping]]] = ..., moves: _Optional[_Iterable[_Union[MoveStatus, _Mapping]]] = ..., story: _Optional[_Iterable[_Union[Moment, _Mapping]]] = ...) -> None: ...

class StageTime(_message.Message):
    __slots__ = ("name", "ms")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MS_FIELD_NUMBER: _ClassVar[int]
    name: str
    ms: float
    def __init__(self, name: _Optional[str] = ..., ms: _Optional[float] = ...) -> None: ...

class PlacementStatus(_message.Message):
    __slots__ = ("at_ms", "epoch", "mode", "prefill_worker", "decode_worker", "predicted_ms", "reason", "candidates")
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_MS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    at_ms: int
    epoch: int
    mode: str
    prefill_worker: str
    decode_worker: str
    predicted_ms: float
    reason: str
    candidates: _containers.RepeatedCompositeFieldContainer[CandidateStatus]
    def __init__(self, at_ms: _Optional[int] = ..., epoch: _Optional[int] = ..., mode: _Optional[str] = ..., prefill_worker: _Optional[str] = ..., decode_worker: _Optional[str] = ..., predicted_ms: _Optional[float] = ..., reason: _Optional[str] = ..., candidates: _Optional[_Iterable[_Union[CandidateStatus, _Mapping]]] = ...) -> None: ...

class CandidateStatus(_message.Message):
    __slots__ = ("worker", "part", "score_ms", "terms", "chosen")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    SCORE_MS_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    worker: str
    part: str
    score_ms: float
    terms: _containers.RepeatedCompositeFieldContainer[Term]
    chosen: bool
    def __init__(self, worker: _Optional[str] = ..., part: _Optional[str] = ..., score_ms: _Optional[float] = ..., terms: _Optional[_Iterable[_Union[Term, _Mapping]]] = ..., chosen: _Optional[bool] = ...) -> None: ...

class Term(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class Moment(_message.Message):
    __slots__ = ("at_ms", "what")
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    at_ms: int
    what: str
    def __init__(self, at_ms: _Optional[int] = ..., what: _Optional[str] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("pools", "deadline_ms")
    POOLS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    pools: _containers.RepeatedCompositeFieldContainer[PoolSize]
    deadline_ms: int
    def __init__(self, pools: _Optional[_Iterable[_Union[PoolSize, _Mapping]]] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class PoolSize(_message.Message):
    __slots__ = ("role", "num")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NUM_FIELD_NUMBER: _ClassVar[int]
    role: str
    num: int
    def __init__(self, role: _Optional[str] = ..., num: _Optional[int] = ...) -> None: ...

class ScaleProgress(_message.Message):
    __slots__ = ("worker", "role", "state", "requests", "blocks", "elapsed_ms")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_MS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    role: str
    state: str
    requests: int
    blocks: int
    elapsed_ms: int
    def __init__(self, worker: _Optional[str] = ..., role: _Optional[str] = ..., state: _Optional[str] = ..., requests: _Optional[int] = ..., blocks: _Optional[int] = ..., elapsed_ms: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("worker", "deadline_ms", "restart")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    RESTART_FIELD_NUMBER: _ClassVar[int]
    worker: str
    deadline_ms: int
    restart: bool
    def __init__(self, worker: _Optional[str] = ..., deadline_ms: _Optional[int] = ..., restart: _Optional[bool] = ...) -> None: ...

class FlipRequest(_message.Message):
    __slots__ = ("worker", "role", "deadline_ms")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    role: str
    deadline_ms: int
    def __init__(self, worker: _Optional[str] = ..., role: _Optional[str] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class DrainProgress(_message.Message):
    __slots__ = ("worker", "incarnation", "state", "requests", "blocks", "elapsed_ms")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_MS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    incarnation: int
    state: str
    requests: int
    blocks: int
    elapsed_ms: int
    def __init__(self, worker: _Optional[str] = ..., incarnation: _Optional[int] = ..., state: _Optional[str] = ..., requests: _Optional[int] = ..., blocks: _Optional[int] = ..., elapsed_ms: _Optional[int] = ...) -> None: ...

class CancelHereRequest(_message.Message):
    __slots__ = ("request_id", "owner")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    owner: str
    def __init__(self, request_id: _Optional[str] = ..., owner: _Optional[str] = ...) -> None: ...

class CancelHereResponse(_message.Message):
    __slots__ = ("found",)
    FOUND_FIELD_NUMBER: _ClassVar[int]
    found: bool
    def __init__(self, found: _Optional[bool] = ...) -> None: ...

class MetricsHereRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MetricsHereResponse(_message.Message):
    __slots__ = ("page",)
    PAGE_FIELD_NUMBER: _ClassVar[int]
    page: str
    def __init__(self, page: _Optional[str] = ...) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class StopResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
