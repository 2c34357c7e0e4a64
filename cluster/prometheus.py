"""What a router knows of the cluster as Prometheus' metrics: workers, their blocks and batches, pairs that serve."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from cluster.membership import OVER, Member, Membership, MemberState
from router.fleet import Fleet
from tandem import metrics as table
from tandem.messages import Role, WorkerLoad
from tandem.metrics import Metric, MetricKind

BLOCK_STATES = ("free", "cached", "owned", "exported", "granted", "quarantined")
PREEMPTED = ("swapped_out", "brought_back", "recomputed")

_Family = CounterMetricFamily | GaugeMetricFamily


class ClusterMetrics(Collector):
    """Looks at each scrape. `fleet` is the router's own view of the workers; `ready_pairs` how many pairs serve."""

    def __init__(self, membership: Membership, fleet: Fleet, ready_pairs: Callable[[], int]) -> None:
        self._membership = membership
        self._fleet = fleet
        self._ready_pairs = ready_pairs

    def collect(self) -> Iterator[prometheus_client.Metric]:
        """Each metric once, with a sample for each worker that is here and has said something."""
        page = _Page()
        states = Counter[tuple[str, str]]()
        for member in self._membership.members.values():
            info = member.info
            states[info.role.value, member.state.value] += 1
            worker = self._fleet.get(info.worker_id, member.incarnation)
            if member.state not in OVER and worker is not None and worker.load is not None:
                page.worker(member, worker.load)
        page.add(table.READY_PAIRS, (), self._ready_pairs())
        for labels in product(Role, MemberState):  # zeros, too: a state that was never seen is no missing series
            page.add(table.WORKERS, labels, states[labels])
        yield from page.families.values()


class _Page:
    """The samples of one scrape."""

    def __init__(self) -> None:
        self.families: dict[str, _Family] = {}

    def add(self, metric: Metric, labels: tuple[str, ...], value: float) -> None:
        family = self.families.get(metric.name)
        if family is None:
            kind = CounterMetricFamily if metric.kind is MetricKind.COUNTER else GaugeMetricFamily
            family = self.families[metric.name] = kind(metric.name, metric.help, labels=metric.labels)
        family.add_metric(labels, value)

    def worker(self, member: Member, load: WorkerLoad) -> None:
        swap = load.swap
        who = (str(member.info.worker_id), member.info.role.value)
        for state in BLOCK_STATES:
            self.add(table.WORKER_BLOCKS, (*who, state), getattr(load.blocks, state))
        self.add(table.WORKER_RUNNING, who, load.running)
        self.add(table.WORKER_WAITING, who, load.waiting)
        self.add(table.WORKER_BACKLOG, who, load.prefill_backlog_tokens)
        self.add(table.WORKER_STEPS, who, load.steps)
        self.add(table.WORKER_STEP_SECONDS, who, load.last_step_ms / 1000)
        self.add(table.WORKER_SWAP_BLOCKS, who, swap.used)
        for what in PREEMPTED:
            self.add(table.WORKER_PREEMPTED, (*who, what), getattr(swap, what))
        self.add(table.WORKER_DAMAGED, who, member.damaged)
        self.add(table.WORKER_AUDIT, who, len(load.audit))
