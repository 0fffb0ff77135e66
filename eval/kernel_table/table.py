"""Rows of the table, their ratios, and what a line says of its goal. Needs no GPU."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Goal", "Row", "geometric_mean", "report", "row_text", "summary", "summary_text"]


@dataclass(frozen=True)
class Goal:
    """Of the ratios peer time / our time of a line's rows."""

    geometric_mean: float
    minimum: float | None = None


@dataclass
class Row:
    """One problem: microseconds of each contestant, and how far results of the same inputs lie apart."""

    point: str
    ours: dict[str, float] = field(default_factory=dict)
    peers: dict[str, float] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Peer to the reason."""
    floor_us: float | None = None
    """What reading the keys from memory takes at the speed of a copy, where they are not meant to be in a cache."""
    launches: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    """Of a call of each contestant, where a line counts them: names and microseconds."""
    wrong: list[str] = field(default_factory=list)
    """What makes the times worthless; such a row has no ratio."""

    @property
    def ratio(self) -> float | None:
        """The best peer's time over our best; None where there is not one of each."""
        if self.wrong or not self.ours or not self.peers:
            return None
        return min(self.peers.values()) / min(self.ours.values())


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(rows: Sequence[Row], goal: Goal) -> dict[str, Any]:
    """``met`` is None where no row has a ratio; a wrong row is never part of a goal that is met."""
    ratios = [row.ratio for row in rows if row.ratio is not None]
    num_wrong = sum(bool(row.wrong) for row in rows)
    mean = geometric_mean(ratios) if ratios else None
    minimum = min(ratios) if ratios else None
    met = None
    if num_wrong:
        met = False
    elif mean is not None and minimum is not None:
        met = mean >= goal.geometric_mean and (goal.minimum is None or minimum >= goal.minimum)
    return {
        "geometric_mean": mean,
        "minimum": minimum,
        "goal": {"geometric_mean": goal.geometric_mean, "minimum": goal.minimum},
        "num_ratios": len(ratios),
        "num_rows": len(rows),
        "num_wrong": num_wrong,
        "met": met,
    }


def report(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [
        {
            "point": row.point,
            "us": {"ours": row.ours, "peers": row.peers},
            "floor_us": row.floor_us,
            "ratio": row.ratio,
            "differences": row.differences,
            "launches": row.launches,
            "skipped": row.skipped,
            "wrong": row.wrong,
        }
        for row in rows
    ]


def row_text(row: Row) -> str:
    parts = [
        f"  {row.point:24}",
        _times("ours", row.ours),
        _times("peers", row.peers),
        "ratio   -  " if row.ratio is None else f"ratio {row.ratio:5.2f}",
        "; ".join(f"{name} {value:.1e}" for name, value in row.differences.items()),
    ]
    if row.floor_us is not None and row.ours:
        parts.append(f"floor {row.floor_us:.1f}: {row.floor_us / min(row.ours.values()):.0%} of ours")
    if row.launches:
        parts.append("launches: " + ", ".join(f"{name} {len(calls)}" for name, calls in row.launches.items()))
    lines = [" | ".join(parts)]
    lines += [f"    {name} skipped: {reason}" for name, reason in row.skipped.items()]
    lines += [f"    WRONG: {reason}" for reason in row.wrong]
    return "\n".join(lines)


def _times(side: str, times: dict[str, float]) -> str:
    return f"{side}: " + (", ".join(f"{name} {us:.1f}" for name, us in times.items()) or "none")


def summary_text(values: dict[str, Any]) -> str:
    goal = f"goal: geometric mean {values['goal']['geometric_mean']}"
    if values["goal"]["minimum"] is not None:
        goal += f", none under {values['goal']['minimum']}"
    if values["geometric_mean"] is None:
        found = "no row has a ratio"
    else:
        found = (
            f"geometric mean {values['geometric_mean']:.2f}, minimum {values['minimum']:.2f} "
            f"of {values['num_ratios']} of {values['num_rows']} rows"
        )
    verdict = {True: "met", False: "missed", None: "not judged"}[values["met"]]
    return f"  {found}; {goal}: {verdict}"
