"""Tandem's boards for Grafana: what operators look at, each question made from the table of metrics."""

from __future__ import annotations

from cluster.boards import (
    CLUSTER,
    Board,
    Format,
    Look,
    Panel,
    Query,
    Row,
    Variable,
    mean,
    quantile,
    quantiles,
    rate,
    series,
    total,
)
from tandem import metrics as table

ROUTER = Variable(name="router", selector=f"{table.REQUESTS_RUNNING.name}{{{CLUSTER}}}", label="router")
ROLE = Variable(name="role", selector=f"{table.WORKERS.name}{{{CLUSTER}}}", label="role")
WORKER = Variable(name="worker", selector=series(table.WORKER_RUNNING, 'role=~"$role"'), label="worker")
OF_WORKERS = ('role=~"$role"', 'worker=~"$worker"')
HELD = 'state!~"free|cached"'  # blocks that somebody has: what is cached goes when memory is asked for


# ---- overview --------------------------------------------------------------------------------------------------------

_SERVES = Row(
    title="Does it serve?",
    panels=(
        Panel(
            title="Pairs that serve",
            description="Pairs of workers through which a request or a canary has gone lately. 0: nobody is served.",
            look=Look.FIGURE, width=4, format=Format.COUNT, red_below=1, runbook="no-pair-serves",
            queries=(Query(expr=f"min({series(table.READY_PAIRS)})", legend="pairs"),),
        ),
        Panel(
            title="Ready workers",
            description="Workers that take new requests, by role.",
            look=Look.FIGURE, width=6, format=Format.COUNT, runbook="worker-lost",
            queries=(Query(expr=total(series(table.WORKERS, 'state="ready"'), "role"), legend="{{role}}"),),
        ),
        Panel(
            title="Lost workers",
            description="Workers that are dead and have not come back, or are suspected of it.",
            look=Look.FIGURE, width=4, format=Format.COUNT, red_from=1, runbook="worker-lost",
            queries=(Query(expr=total(series(table.WORKERS, 'state=~"dead|suspect"')), legend="lost"),),
        ),
        Panel(
            title="Silent routers",
            description="Routers that did not answer the router that was scraped.",
            look=Look.FIGURE, width=4, format=Format.COUNT, red_from=1, runbook="router-down",
            queries=(Query(expr=total(series(table.ROUTERS, 'state="silent"')), legend="silent"),),
        ),
        Panel(
            title="SLO attainment",
            description="Share of the requests that ended, but for cancelled ones, that met the targets they named.",
            look=Look.FIGURE, width=6, format=Format.SHARE, red_below=0.9, runbook="ttft-slo",
            queries=(
                Query(
                    expr=f"""{total(rate(table.SLO_REQUESTS, 'slo="met"'))} / {total(rate(table.SLO_REQUESTS))}""",
                    legend="met",
                ),
            ),
        ),
    ),
)  # fmt: skip

_USERS = Row(
    title="What users see",
    panels=(
        Panel(
            title="Time to first token",
            description="From a request's arrival at the edge until its first token was handed to its client.",
            format=Format.SECONDS, runbook="ttft-slo", queries=quantiles(table.TTFT_SECONDS),
        ),
        Panel(
            title="Where the first token's time goes",
            description="The stages of TTFT, on average; they add up to its mean.",
            look=Look.STACK, format=Format.SECONDS, runbook="ttft-slo",
            queries=(
                Query(
                    expr=f"{total(rate(table.TTFT_STAGE_SECONDS, suffix='_sum'), 'stage')} / on () group_left () "
                    f"{total(rate(table.TTFT_SECONDS, suffix='_count'))}",
                    legend="{{stage}}",
                ),
            ),
        ),
        Panel(
            title="Time per output token",
            description="Between two tokens of an answer, on average over the answer.",
            format=Format.SECONDS, runbook="tpot-slo", queries=quantiles(table.TPOT_SECONDS),
        ),
        Panel(
            title="Inter-token latency",
            description="The gaps between the arrivals of a request's tokens, moves and recoveries included.",
            format=Format.SECONDS, runbook="tpot-slo", queries=quantiles(table.ITL_SECONDS),
        ),
        Panel(
            title="End to end",
            description="From a request's admission to its end, whatever the length of its answer.",
            format=Format.SECONDS, queries=quantiles(table.E2E_SECONDS),
        ),
        Panel(
            title="Targets met and missed",
            description="Requests a second by whether they met the targets they named. Those met are the goodput; a "
            "request without targets has met them.",
            look=Look.STACK, format=Format.REQUESTS_A_SECOND, runbook="ttft-slo",
            queries=(Query(expr=total(rate(table.SLO_REQUESTS), "slo"), legend="{{slo}}"),),
        ),
    ),
)  # fmt: skip

_LOAD = Row(
    title="Load",
    panels=(
        Panel(
            title="Tokens",
            description="Prompt tokens of admitted requests, and tokens handed to clients.",
            format=Format.EACH_SECOND,
            queries=(
                Query(expr=total(rate(table.PROMPT_TOKENS_TOTAL)), legend="prompt"),
                Query(expr=total(rate(table.GENERATED_TOKENS_TOTAL)), legend="generated"),
            ),
        ),
        Panel(
            title="Requests that ended",
            description="By how: stop and length are whole answers, the rest are codes of errors.",
            look=Look.STACK, format=Format.REQUESTS_A_SECOND, runbook="requests-fail",
            queries=(Query(expr=total(rate(table.REQUESTS_TOTAL), "outcome"), legend="{{outcome}}"),),
        ),
        Panel(
            title="Refusals",
            description="Requests refused before any work was done for them, by the error's code.",
            look=Look.STACK, format=Format.REQUESTS_A_SECOND, runbook="refusals",
            queries=(Query(expr=total(rate(table.REFUSALS_TOTAL), "code"), legend="{{code}}"),),
        ),
        Panel(
            title="Queue",
            description="Requests that no worker has yet, those that wait at a worker, and those that run.",
            look=Look.STACK, format=Format.COUNT, runbook="queue-growing",
            queries=(
                Query(expr=total(series(table.WAITING_REQUESTS)), legend="in line"),
                Query(expr=total(series(table.WORKER_WAITING)), legend="waiting at workers"),
                Query(expr=total(series(table.WORKER_RUNNING)), legend="in batches"),
            ),
        ),
        Panel(
            title="Prompt tokens to come",
            description="Prompt tokens of requests whose first token is to come.",
            format=Format.COUNT, runbook="queue-growing",
            queries=(Query(expr=total(series(table.QUEUED_TOKENS)), legend="tokens"),),
        ),
        Panel(
            title="Requests in flight",
            description="Admitted and not yet ended, by router.",
            look=Look.STACK, format=Format.COUNT,
            queries=(Query(expr=total(series(table.REQUESTS_RUNNING), "router"), legend="{{router}}"),),
        ),
    ),
)  # fmt: skip

OVERVIEW = Board(
    name="overview",
    title="Tandem / Overview",
    description="Does it serve, what do its users see, and how much do they ask of it?",
    variables=(ROUTER,),
    rows=(_SERVES, _USERS, _LOAD),
)

# ---- workers and KV --------------------------------------------------------------------------------------------------


def _of_worker(metric: table.Metric, *matches: str) -> str:
    return series(metric, *OF_WORKERS, *matches)


def _each_worker(metric: table.Metric) -> tuple[Query, ...]:
    return (Query(expr=total(_of_worker(metric), "worker"), legend="{{worker}}"),)


_BLOCKS = total(_of_worker(table.WORKER_BLOCKS), "worker")
_BLOCKS_HELD = total(_of_worker(table.WORKER_BLOCKS, HELD), "worker")

_MEMORY = Row(
    title="KV memory",
    panels=(
        Panel(
            title="KV blocks by state",
            description="The six states of a block; they sum to the pools.",
            look=Look.STACK, format=Format.COUNT, runbook="kv-nearly-full",
            queries=(Query(expr=total(_of_worker(table.WORKER_BLOCKS), "state"), legend="{{state}}"),),
        ),
        Panel(
            title="KV memory held",
            description="Share of a worker's blocks that somebody has; what is only cached goes when need be.",
            format=Format.SHARE, runbook="kv-nearly-full", red_from=0.95,
            queries=(Query(expr=f"{_BLOCKS_HELD} / {_BLOCKS}", legend="{{worker}}"),),
        ),
        Panel(
            title="Prefix cache hit rate",
            description="Share of the prompt tokens that were found in a prefix cache; of answers that ended well.",
            format=Format.SHARE,
            queries=(
                Query(
                    expr=f"{total(rate(table.PREFIX_HITS))} / {total(rate(table.PREFIX_QUERIES))}", legend="found"
                ),
            ),
        ),
        Panel(
            title="Swapped out",
            description="Blocks of host memory that KV is swapped out to.",
            format=Format.COUNT, runbook="kv-nearly-full", queries=_each_worker(table.WORKER_SWAP_BLOCKS),
        ),
        Panel(
            title="Preempted requests",
            description="Requests that lost their blocks for want of memory, by what became of them.",
            look=Look.STACK, format=Format.EACH_SECOND, runbook="kv-nearly-full",
            queries=(Query(expr=total(rate(table.WORKER_PREEMPTED, *OF_WORKERS), "what"), legend="{{what}}"),),
        ),
        Panel(
            title="Audit findings",
            description="What the workers' audits of their own blocks found wrong: above 0 is a bug.",
            format=Format.COUNT, red_from=1, runbook="audit-findings", queries=_each_worker(table.WORKER_AUDIT),
        ),
    ),
)  # fmt: skip

_BATCHES = Row(
    title="Batches and steps",
    panels=(
        Panel(
            title="Batch",
            description="Requests in a worker's batch.",
            format=Format.COUNT, queries=_each_worker(table.WORKER_RUNNING),
        ),
        Panel(
            title="Waiting at a worker",
            description="Requests that a worker has and does not run: they wait for their turn, memory or KV.",
            format=Format.COUNT, runbook="queue-growing", queries=_each_worker(table.WORKER_WAITING),
        ),
        Panel(
            title="Prefill backlog",
            description="Prompt tokens that a worker has yet to run.",
            format=Format.COUNT, runbook="ttft-slo", queries=_each_worker(table.WORKER_BACKLOG),
        ),
        Panel(
            title="Steps",
            description="Steps a second. 0 with a batch that is not empty: the worker is wedged.",
            format=Format.EACH_SECOND, runbook="worker-wedged",
            queries=(Query(expr=total(rate(table.WORKER_STEPS, *OF_WORKERS), "worker"), legend="{{worker}}"),),
        ),
        Panel(
            title="Time of a step",
            description="How long the newest step took.",
            format=Format.SECONDS, runbook="tpot-slo", queries=_each_worker(table.WORKER_STEP_SECONDS),
        ),
        Panel(
            title="Tokens computed again",
            description="Prompt and delivered tokens that a decode worker had to run itself.",
            format=Format.EACH_SECOND,
            queries=(Query(expr=total(rate(table.RECOMPUTED_TOKENS)), legend="tokens"),),
        ),
    ),
)  # fmt: skip

_LIVES = Row(
    title="Workers",
    panels=(
        Panel(
            title="Workers by state",
            description="Suspect: silent or stuck for a while. Dead: gone, and not replaced yet. Left: drained.",
            look=Look.STACK, width=12, format=Format.COUNT, runbook="worker-lost",
            queries=(Query(expr=total(series(table.WORKERS, 'role=~"$role"'), "state"), legend="{{state}}"),),
        ),
        Panel(
            title="New lives in an hour",
            description="How often a worker's counter of steps began anew: its process was replaced.",
            width=12, format=Format.COUNT, runbook="worker-lost",
            queries=(
                Query(expr=total(f"resets({_of_worker(table.WORKER_STEPS)}[1h])", "worker"), legend="{{worker}}"),
            ),
        ),
    ),
)  # fmt: skip

WORKERS = Board(
    name="workers",
    title="Tandem / Workers and KV",
    description="What each worker has in its memory and its batch, and how it gets on.",
    variables=(ROUTER, ROLE, WORKER),
    rows=(_MEMORY, _BATCHES, _LIVES),
)

# ---- moves -----------------------------------------------------------------------------------------------------------

_HANDOFFS = Row(
    title="Handoffs",
    panels=(
        Panel(
            title="Placements",
            description="prefill: two workers and a handoff. local: one worker reads the prompt and writes the answer.",
            look=Look.STACK, format=Format.EACH_SECOND,
            queries=(Query(expr=total(rate(table.PLACEMENTS_TOTAL), "mode"), legend="{{mode}}"),),
        ),
        Panel(
            title="Time of a handoff",
            description="From a request's first token until a decode worker owned it.",
            format=Format.SECONDS, runbook="handoff-slow", queries=quantiles(table.HANDOFF_SECONDS),
        ),
        Panel(
            title="Attempts that were lost",
            description="By cause; each such request was placed anew, with the tokens delivered so far.",
            look=Look.STACK, format=Format.EACH_SECOND, runbook="worker-lost",
            queries=(Query(expr=total(rate(table.RECOVERIES_TOTAL), "cause"), legend="{{cause}}"),),
        ),
        Panel(
            title="KV bytes transferred",
            description="Brought to their targets by handoffs and moves.",
            format=Format.BYTES_A_SECOND,
            queries=(Query(expr=total(rate(table.TRANSFERRED_BYTES)), legend="all transfers"),),
        ),
        Panel(
            title="KV blocks of transfers",
            description="Moved, or not moved since the target had them already.",
            look=Look.STACK, format=Format.EACH_SECOND,
            queries=(Query(expr=total(rate(table.TRANSFERRED_BLOCKS), "how"), legend="{{how}}"),),
        ),
        Panel(
            title="Damaged frames",
            description="Frames of KV that arrived and did not check. None was used; each was sent again.",
            format=Format.EACH_SECOND, runbook="frames-damaged",
            queries=(Query(expr=total(rate(table.WORKER_DAMAGED), "worker"), legend="{{worker}}"),),
        ),
    ),
)  # fmt: skip

_MIGRATIONS = Row(
    title="Moves of running requests",
    panels=(
        Panel(
            title="Moves by reason",
            description="Who asked: an operator, a drain, or the rebalancer and why.",
            look=Look.STACK, format=Format.EACH_SECOND,
            queries=(Query(expr=total(rate(table.MIGRATIONS_TOTAL), "reason"), legend="{{reason}}"),),
        ),
        Panel(
            title="Moves by result",
            description="failed: the request runs on where it was. ended: the request itself did.",
            look=Look.STACK, format=Format.EACH_SECOND, runbook="migrations-fail",
            queries=(Query(expr=total(rate(table.MIGRATIONS_TOTAL), "result"), legend="{{result}}"),),
        ),
        Panel(
            title="Pause that a client saw",
            description="From the last token on the old worker to the first on the new one.",
            format=Format.SECONDS, runbook="migrations-fail",
            queries=quantiles(table.MIGRATION_SECONDS, 'phase="pause"'),
        ),
        Panel(
            title="Phases, p99",
            description="precopy: while the request ran. fence: it stood still until the target had it. pause: as its "
            "client saw it.",
            format=Format.SECONDS, runbook="migrations-fail",
            queries=(Query(expr=quantile(0.99, table.MIGRATION_SECONDS, by=("phase",)), legend="{{phase}}"),),
        ),
        Panel(
            title="Phases, mean",
            description="The same on average.",
            format=Format.SECONDS, runbook="migrations-fail",
            queries=(Query(expr=mean(table.MIGRATION_SECONDS, "phase"), legend="{{phase}}"),),
        ),
        Panel(
            title="KV bytes copied by moves",
            description="By the reason of the move; those of failed ones included.",
            look=Look.STACK, format=Format.BYTES_A_SECOND,
            queries=(Query(expr=total(rate(table.MIGRATION_BYTES), "reason"), legend="{{reason}}"),),
        ),
    ),
)  # fmt: skip

MOVES = Board(
    name="moves",
    title="Tandem / Handoffs and moves",
    description="KV on its way: from prefill to decode workers, and with requests that move while they run.",
    variables=(ROUTER,),
    rows=(_HANDOFFS, _MIGRATIONS),
)

# ---- routers and stores ----------------------------------------------------------------------------------------------

_ROUTERS = Row(
    title="Routers",
    panels=(
        Panel(
            title="Routers by state",
            description="Whether they answered the router that was scraped.",
            look=Look.STACK, format=Format.COUNT, runbook="router-down",
            queries=(Query(expr=total(series(table.ROUTERS), "state"), legend="{{state}}"),),
        ),
        Panel(
            title="Requests that ended at each",
            description="Requests a second, by router.",
            look=Look.STACK, format=Format.REQUESTS_A_SECOND,
            queries=(Query(expr=total(rate(table.REQUESTS_TOTAL), "router"), legend="{{router}}"),),
        ),
        Panel(
            title="Tokens through each",
            description="Tokens a second handed to clients, by router.",
            look=Look.STACK, format=Format.EACH_SECOND,
            queries=(Query(expr=total(rate(table.GENERATED_TOKENS_TOTAL), "router"), legend="{{router}}"),),
        ),
        Panel(
            title="Processor",
            description="Cores that a router's process takes; its event loop has one at most, so 1 is the limit.",
            format=Format.CORES, runbook="router-down", red_from=0.9,
            queries=(Query(expr=total(rate(table.CPU_SECONDS), "router"), legend="{{router}}"),),
        ),
        Panel(
            title="Event loop's lateness, p99",
            description="How late a router came to what was due: every token of it waits as long.",
            format=Format.SECONDS, runbook="router-down",
            queries=(Query(expr=quantile(0.99, table.LOOP_LATE_SECONDS, by=("router",)), legend="{{router}}"),),
        ),
        Panel(
            title="Memory",
            description="Resident memory of a router's process.",
            format=Format.BYTES,
            queries=(Query(expr=total(series(table.RESIDENT_BYTES), "router"), legend="{{router}}"),),
        ),
    ),
)  # fmt: skip

_STORES = Row(
    title="Store and door",
    panels=(
        Panel(
            title="Store away",
            description="For how long the store that routers share has not answered; 0 where there is none.",
            format=Format.SECONDS, red_from=10, runbook="store-away",
            queries=(Query(expr=f"max by (router) ({series(table.STORE_AWAY_SECONDS)})", legend="{{router}}"),),
        ),
        Panel(
            title="Clients that came back",
            description="For an answer that they had lost, here or at another router.",
            look=Look.STACK, format=Format.EACH_SECOND, runbook="router-down",
            queries=(Query(expr=total(rate(table.RESUMED_TOTAL), "router"), legend="{{router}}"),),
        ),
        Panel(
            title="Strangers refused",
            description="Calls to the registry without the join token; forged or replayed calls and frames at workers.",
            format=Format.EACH_SECOND,
            queries=(
                Query(expr=total(rate(table.STRANGERS_TOTAL), "router"), legend="registry, {{router}}"),
                Query(expr=f"max({rate(table.WORKER_STRANGERS_TOTAL)})", legend="workers"),
            ),
        ),
    ),
)  # fmt: skip

ROUTERS = Board(
    name="routers",
    title="Tandem / Routers and stores",
    description="The processes that clients talk to, and what they share.",
    variables=(ROUTER,),
    rows=(_ROUTERS, _STORES),
)

BOARDS = (OVERVIEW, WORKERS, MOVES, ROUTERS)
