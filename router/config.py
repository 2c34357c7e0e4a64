"""The router's settings, each checked by name."""

from __future__ import annotations

from dataclasses import dataclass, fields

PLACEMENTS_MAX = 65  # of one life of a request at one router: they share the epochs of its fence
GRACE_MS = 1_000  # the router waits so much longer than it told the workers to


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Bounds, deadlines and weights of one router. Every number has its unit in its name.

    Raises ValueError naming the key when a value cannot be used.
    """

    router_id: str = "router-0"
    # Admission.
    requests_max: int = 1024  # in flight at once
    queued_tokens_max: int = 2_000_000  # prompt tokens admitted and without a first token yet
    queue_wait_ms: int = 120_000  # for memory on a decode worker
    workers_wait_ms: int = 30_000  # for any worker at all; a Ray that died and its workers are back sooner
    miss_chance_max: float = 0.8  # of an interactive request that is taken in, to miss a target it names
    # Stages of a request.
    request_deadline_ms: int = 900_000
    handoff_deadline_ms: int = 30_000  # placement to commit, beside the predicted prefill
    decode_stall_ms: int = 60_000  # without a token from the owner
    replacements_max: int = 3  # in vain: without a token in between
    replacements_all_max: int = 64  # of one request, whether or not they got on: no request kills workers for ever
    salvage_ms: int = 100  # so long what landed of an attempt whose source was lost may become prefix cache
    pair_rest_ms: int = 3_000  # two workers get no handoff for so long after one of theirs failed, if others can
    replace_backoff_ms: int = 200  # before the second re-placement; doubles
    # Placement.
    local_prefill_tokens: int = 256  # 0 switches local prefill on warm decode workers off
    decode_reserve_tokens: int = 256  # of each answer counted into a decode worker's memory in advance
    transfer_bytes_per_ms: int = 1_000_000
    report_lag_ms: int = 20  # own dispatches younger than this are not yet in a worker's report
    tie_percent: float = 5.0
    # Moves of running requests.
    move_deadline_ms: int = 10_000  # to the commit
    move_dwell_ms: int = 5_000  # between two moves of a request, but for operators and drains
    orphan_commit_ms: int = 300  # a target may commit so long after its source was lost
    # What is remembered of requests and moves that ended.
    history_ms: int = 300_000
    history_max: int = 1000
    move_history_ms: int = 600_000
    move_history_max: int = 1000
    # Shells.
    tick_ms: int = 50
    move_askers_max: int = 256  # who wait for the end of a move
    stream_tokens_max: int = 8192  # a client that lags by more is cut off
    send_queue_max: int = 4096  # messages towards one worker
    dial_timeout_ms: int = 5_000
    send_timeout_ms: int = 5_000
    beat_ms: int = 1_000  # a worker gives a sign of life on its stream as often
    beats_missed_max: int = 3
    redial_ms: int = 100  # doubles up to redial_max_ms
    redial_max_ms: int = 2_000

    def __post_init__(self) -> None:
        may_be_zero = {"local_prefill_tokens", "decode_reserve_tokens", "replacements_max", "report_lag_ms"}
        may_be_zero |= {"tie_percent", "replace_backoff_ms", "move_dwell_ms", "pair_rest_ms"}
        may_be_zero |= {"salvage_ms", "miss_chance_max"}
        if not self.router_id:
            raise ValueError("router_id: must not be empty")
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == "router_id":
                continue
            least = 0 if each.name in may_be_zero else 1
            if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
                raise ValueError(f"{each.name}: is {value!r}, must be a number of at least {least}")
        if self.replacements_all_max >= PLACEMENTS_MAX:
            raise ValueError(f"replacements_all_max: is {self.replacements_all_max}, must be below {PLACEMENTS_MAX}")
        if self.redial_max_ms < self.redial_ms:
            raise ValueError(f"redial_max_ms: is {self.redial_max_ms}, must be at least redial_ms ({self.redial_ms})")
