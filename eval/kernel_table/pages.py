"""Puts the kernel benchmark's figures into pages.

    PYTHONPATH=eval python -m kernel_table.pages eval/results/kernels_h200.json README.md

The JSON is what `python eval/kernels.py --out` writes. The whole table becomes a page beside it; what lies between
the two marks of the README is replaced by a row for each of its lines.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kernel_table.table import geometric_mean

__all__ = ["fill", "overview", "whole_table"]

_BEGIN, _END = "<!-- kernels: begin -->", "<!-- kernels: end -->"


def overview(results: Mapping[str, Any]) -> str:
    """A row for each line of the table: the peers' times over ours, the best of each side."""
    lines = [
        _measured(results),
        "",
        "| operation | problems | vLLM's time / ours, in the geometric mean | goal | least | most |",
        "|---|---|---|---|---|---|",
    ]
    for line in results["lines"].values():
        rows = line["rows"]
        points = " to ".join(dict.fromkeys((rows[0]["point"], rows[-1]["point"])))
        ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
        goal = f"{line['summary']['goal']['geometric_mean']:.1f}"
        least_and_most = [f"{value:.2f}" for value in (min(ratios), max(ratios))] if ratios else ["", ""]
        cells = [f"{geometric_mean(ratios):.2f}" if ratios else "not measured", goal, *least_and_most]
        if len(ratios) < len(rows):
            points += f", {len(ratios)} of {len(rows)}"
        lines.append(f"| {_title(line)} | {points} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def whole_table(results: Mapping[str, Any]) -> str:
    """A page: every row, in microseconds."""
    lines = [
        "# Attention kernels",
        "",
        f"{_measured(results)} Microseconds, the best of each side. Above 1.00 ours is faster. The floor is",
        "the share of our time that reading the keys once from memory takes, at the speed of a copy.",
        "",
        "| operation | problem | ours | vLLM's best | ratio | floor |",
        "|---|---|---|---|---|---|",
    ]
    for line in results["lines"].values():
        lines += [f"| {_title(line)} | {_row(row)} |" for row in line["rows"]]
    profiles = [
        f"| {row['point']} | {side} | {_launches(row, side)} |"
        for line in results["lines"].values()
        for row in line["rows"]
        for side in ("ours", "peers")
        if row.get("launches") and row["us"][side]
    ]
    if profiles:
        lines += [
            "",
            "Launches of the attention between its projections, of the best of each side, in a profile:",
            f"{results.get('launch_times', 'some start before the last one has ended, and waiting counts')}.",
            "",
        ]
        lines += ["| problem | side | microseconds |", "|---|---|---|", *profiles]
    return "\n".join(lines) + "\n"


def _launches(row: Mapping[str, Any], side: str) -> str:
    times = row["us"][side]
    calls = row["launches"][min(times, key=times.__getitem__)]
    return f"{len(calls)}: " + ", ".join(f"{name} {us:.1f}" for name, us in calls)


def _measured(results: Mapping[str, Any]) -> str:
    versions, device = results["versions"], results["device"]
    return f"{device['name']}, vLLM {versions['vllm']}, torch {versions['torch']}, Triton {versions['triton']}."


def _title(line: Mapping[str, Any]) -> str:
    return line["title"].partition(";")[0]


def _row(row: Mapping[str, Any]) -> str:
    if row["wrong"]:
        return f"{row['point']} | sides differ, so no ratio | | | "
    sides = [_best(row["us"][side]) for side in ("ours", "peers")]
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    floor = f"{row['floor_us'] / min(row['us']['ours'].values()):.0%}" if row.get("floor_us") else ""
    return " | ".join([row["point"], *sides, ratio, floor])


def _best(times: Mapping[str, float]) -> str:
    if not times:
        return "not measured"
    name = min(times, key=times.__getitem__)
    return f"{times[name]:.1f} ({name})"


def fill(page: str, content: str) -> str:
    """The page with ``content`` between its marks.

    Raises:
        ValueError: the page has no such pair of marks.
    """
    filled, num_found = re.subn(
        f"({re.escape(_BEGIN)}\n).*?({re.escape(_END)})", lambda m: m[1] + content + m[2], page, flags=re.DOTALL
    )
    if num_found != 1:
        raise ValueError(f"expected one pair of the marks {_BEGIN} and {_END} in the page, found {num_found}")
    return filled


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what eval/kernels.py --out wrote")
    parser.add_argument("page", type=Path, help="with the two marks")
    options = parser.parse_args(arguments)
    results = json.loads(options.results.read_text(encoding="utf-8"))
    options.results.with_suffix(".md").write_text(whole_table(results), encoding="utf-8")
    options.page.write_text(fill(options.page.read_text(encoding="utf-8"), overview(results)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
