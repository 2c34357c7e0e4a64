"""A chaos run as JSON's types, as lines of a timeline, and as the table that results are kept in."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.chaos_plan import FaultKind
from cluster.chaos_tally import Harm, Row, Tally

COLUMNS = ("fault", "times", "in flight", *Harm, "recovered in", "worst gap")


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table, one text for each of COLUMNS."""
    recovered = "never" if row.recovered_ms is None else f"{row.recovered_ms / 1000:.1f} s"
    harm = (str(row.harm[each]) for each in Harm)
    return (row.what, str(row.num), str(row.in_flight), *harm, recovered, f"{row.gap_ms / 1000:.1f} s")


def summary(tally: Tally) -> str:
    """The run in three lines."""
    harm = ", ".join(f"{harm} {tally.harm[harm]}" for harm in Harm)
    known = [each.recovered_ms for each in tally.strikes if each.recovered_ms is not None]
    moves = ", ".join(f"{num} {outcome}" for outcome, num in sorted(tally.moves.items())) or "none"
    return (
        f"{harm}, leaked {len(tally.leaks)}; slowest recovery {max(known, default=0) / 1000:.1f} s, "
        f"worst gap {tally.worst_gap_ms / 1000:.1f} s\n"
        f"{tally.num_streams} streams, {tally.num_tokens} tokens: {tally.num_finished} finished, "
        f"{tally.num_cancelled} cancelled, {tally.num_refused} refused; moves: {moves}\n"
        f"{len(tally.strikes)} faults, {tally.num_hard} of them SIGKILL or SIGSTOP with 8 or more streams in flight, "
        f"{len(tally.unmet)} unmet; {tally.num_audits} full audits"
    )


def states_line(tally: Tally) -> str:
    """How often each state was struck; empty when none was meant to be."""
    struck = tally.states()
    if not any(struck.values()):
        return ""
    parts = (f"{state} {kinds[FaultKind.KILL]}+{kinds[FaultKind.STOP]}" for state, kinds in struck.items())
    return "killed + stopped in a state: " + ", ".join(parts)


def markdown(tally: Tally) -> str:
    """The table of results/*.md."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in tally.rows()]
    if states_line(tally):
        lines += ["", "| state | killed | stopped |", "|---|---|---|"]
        lines += [
            f"| {state} | {kinds[FaultKind.KILL]} | {kinds[FaultKind.STOP]} |"
            for state, kinds in tally.states().items()
        ]
    return "\n".join(lines)


def to_document(tally: Tally, *, num_planned: int, seed: int, broken: Sequence[str]) -> dict[str, object]:
    """All of a run as JSON's types."""
    return {
        "seed": seed,
        "streams": tally.num_streams,
        "tokens": tally.num_tokens,
        "finished": tally.num_finished,
        "cancelled": tally.num_cancelled,
        "refused": tally.num_refused,
        **{harm.value: tally.harm[harm] for harm in Harm},
        "leaks": tally.leaks,
        "worst_gap_ms": tally.worst_gap_ms,
        "moves": dict(tally.moves),
        "audits": tally.num_audits,
        "planned": num_planned,
        "unmet": [str(fault) for fault in tally.unmet],
        "hard": tally.num_hard,
        "states": {state: {kind.value: num for kind, num in kinds.items()} for state, kinds in tally.states().items()},
        "faults": [
            {
                "number": strike.fault.number,
                "at_ms": strike.at_ms,
                "fault": str(strike.fault),
                "where": strike.where,
                "in_flight": strike.in_flight,
                **{harm.value: strike.harm[harm] for harm in Harm},
                "recovered_ms": strike.recovered_ms,
                "gap_ms": strike.gap_ms,
            }
            for strike in tally.strikes
        ],
        "timeline": [{"at_ms": entry.at_ms, "what": entry.what.value, "text": entry.text} for entry in tally.timeline],
        "broken": list(broken),
        "examples": tally.examples,
    }
