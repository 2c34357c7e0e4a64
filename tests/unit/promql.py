"""What a PromQL expression asks for, read by a port of Prometheus' own parser, held against the table of metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain

import promql_parser as ql

from cluster.membership import MemberState
from cluster.prometheus import BLOCK_STATES, PREEMPTED
from router.metrics import VALUES
from tandem.messages import Role
from tandem.metrics import METRICS, ROUTER_METRICS, WORKER_BLOCKS, WORKERS, Metric, MetricKind

SCRAPED = {"cluster"}  # labels that the scrape's configuration adds
GROWING = {"rate", "increase", "resets", "irate"}  # functions that only counters make sense to
SUFFIXES = ("_bucket", "_count", "_sum")
CLOSED: dict[str, tuple[str, ...]] = VALUES | {"what": PREEMPTED, "role": tuple(Role)}
STATES = {WORKER_BLOCKS.name: BLOCK_STATES, WORKERS.name: tuple(MemberState), "tandem_routers": ("answering", "silent")}
GRAFANA = {"$__rate_interval": "1m", "$cluster": ".*", "$router": ".*", "$role": ".*", "$worker": ".*"}


class Wrong(AssertionError):
    """An expression asks for what nobody tells."""


def filled(expr: str, values: Mapping[str, str] = GRAFANA) -> str:
    """The expression as Grafana sends it."""
    for name, value in values.items():
        expr = expr.replace(name, value)
    return expr


def check(expr: str, recorded: Mapping[str, set[str]] | None = None) -> set[str]:
    """Raises Wrong unless every metric is in the table and is used as its kind asks, every label is one that it has,
    and every value one that the label may take. Returns the labels that the answer's series may have.

    `recorded`: the labels of each recording rule's series.
    """
    return _Reader(recorded or {}).labels(ql.parse(expr), grows=False)


class _Reader:
    def __init__(self, recorded: Mapping[str, set[str]]) -> None:
        self._recorded = recorded

    def labels(self, node: ql.Expr, *, grows: bool) -> set[str]:
        """Of the series of this part. `grows`: it is the argument of a function for counters."""
        match node:
            case ql.VectorSelector():
                return self._selected(node, grows=grows)
            case ql.MatrixSelector():
                return self._selected(node.vector_selector, grows=grows)
            case ql.AggregateExpr():
                return self._grouped(node)
            case ql.Call():
                inner = [self.labels(each, grows=node.func.name in GROWING) for each in node.args]
                found = set().union(*inner)
                if node.func.name == "histogram_quantile":
                    if "le" not in found:
                        raise Wrong(f"{node.prettify()}: no quantile without le")
                    return found - {"le"}
                return found
            case ql.BinaryExpr():
                sides = self.labels(node.lhs, grows=False), self.labels(node.rhs, grows=False)
                if _is_number(node.lhs) or _is_number(node.rhs):
                    return sides[0] | sides[1]
                if node.modifier is None and sides[0] != sides[1]:
                    raise Wrong(f"{node.prettify()}: {sides[0]} never matches {sides[1]}")
                return sides[0]
            case ql.ParenExpr() | ql.UnaryExpr() | ql.SubqueryExpr():
                return self.labels(node.expr, grows=grows)
            case ql.NumberLiteral() | ql.StringLiteral():
                return set()
            case _:
                raise Wrong(f"{node.prettify()}: {type(node).__name__} is not read here")

    def _grouped(self, node: ql.AggregateExpr) -> set[str]:
        found = self.labels(node.expr, grows=False)
        if node.modifier is None:
            return set()
        if node.modifier.type != ql.AggModifierType.By:
            raise Wrong(f"{node.prettify()}: say by which labels, so that a new one changes nothing")
        by = set(node.modifier.labels)
        if not by <= found:
            raise Wrong(f"{node.prettify()}: {sorted(by - found)} is no label of it, there are {sorted(found)}")
        return by

    def _selected(self, node: ql.VectorSelector, *, grows: bool) -> set[str]:
        name = node.name or ""
        metric, suffix = metric_of(name)
        if name in self._recorded:
            known = self._recorded[name]
        elif metric is None:
            raise Wrong(f"{name}: there is no such metric")
        else:
            self._check_kind(name, metric, suffix, grows=grows)
            known = labels_of(metric) | SCRAPED | ({"le"} if suffix == "_bucket" else set())
        for matcher in chain(node.matchers.matchers, *node.matchers.or_matchers):
            if matcher.name not in known:
                raise Wrong(f"{name}: {matcher.name} is no label of it, there are {sorted(known)}")
            if metric is not None:
                _check_values(metric, matcher)
        return known

    @staticmethod
    def _check_kind(name: str, metric: Metric, suffix: str, *, grows: bool) -> None:
        if (metric.kind is MetricKind.HISTOGRAM) is not bool(suffix):
            raise Wrong(f"{name}: {metric.name} is a {metric.kind}")
        if grows is (metric.kind is MetricKind.GAUGE):
            raise Wrong(f"{name}: a {metric.kind} is not asked like this")


def _is_number(node: ql.Expr) -> bool:
    if isinstance(node, ql.BinaryExpr):
        return _is_number(node.lhs) and _is_number(node.rhs)
    return _is_number(node.expr) if isinstance(node, ql.ParenExpr) else isinstance(node, ql.NumberLiteral)


def metric_of(name: str) -> tuple[Metric | None, str]:
    """The metric that a series' name belongs to, and what of a histogram it is."""
    for metric in METRICS:
        if name == metric.name:
            return metric, ""
        for suffix in SUFFIXES:
            if metric.kind is MetricKind.HISTOGRAM and name == metric.name + suffix:
                return metric, suffix
    return None, ""


def labels_of(metric: Metric) -> set[str]:
    """All that its series have on a router's page."""
    return {*metric.labels, *(("router",) if metric in ROUTER_METRICS else ())}


def _check_values(metric: Metric, matcher: ql.Matcher) -> None:
    if matcher.name == "le":
        if float(matcher.value) not in metric.buckets:
            raise Wrong(f"{metric.name}: has no bucket up to {matcher.value}, there are {metric.buckets}")
        return
    allowed = STATES.get(metric.name) if matcher.name == "state" else CLOSED.get(matcher.name)
    patterned = matcher.op in (ql.MatchOp.Re, ql.MatchOp.NotRe)
    values = matcher.value.split("|") if patterned else [matcher.value]
    if allowed is None or values == [".*"]:
        return
    for value in values:
        if value not in allowed:
            raise Wrong(f"{metric.name}: {matcher.name} is never {value!r}, but one of {sorted(allowed)}")


def names_in(text: str) -> Iterator[str]:
    """Whatever looks like a metric of Tandem in prose."""
    yield from re.findall(r"\btandem_[a-z][a-z0-9_]*[a-z0-9]\b", text)
