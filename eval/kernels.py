"""How fast the attention kernels are: this plugin's against those that vLLM ships, on one GPU.

    python eval/kernels.py                                      the whole table; under three minutes
    python eval/kernels.py --out kernels.json                   writes the numbers too
    python eval/kernels.py --only sparse-decode-16 --quick      one line, fewer points

Every figure is CUDA graph replay, median of 7, inputs rotated: a contestant's calls on different inputs, together
twice the L2 cache or more (prefill has one input, whose keys are meant to be found there), are captured in one
graph, and the contestants replay in turn. A ratio is the best peer's time over the best of ours.

Before a problem is timed, the sides' results are compared, and ours with the plain torch reference; a kernel that
is wrong takes the row's ratio away. Selections are right if they are the highest values; attention is given them in
ascending order, on both sides. Exits with 1 if a kernel is wrong or a goal is missed. Both sides go from index keys
to the cache slots of what they select; vLLM's top-k writes positions, and its remap, a launch of its own, turns
them into slots.

Where keys come from memory, the floor is the time of reading them once, in fp8, at the bandwidth of a copy that is
measured in the same run. Of the whole block, launches are counted in a profile.

In the peers' favour: FlashMLA gets queries that are padded from 16 to 64 heads already, schedules that vLLM makes
once a step are made beforehand, and DeepGEMM's keys for prefill are gathered beforehand. Ours includes all it does.

Without vLLM's wheel for CUDA, or off Hopper, peers are skipped with their reason and only our side is timed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu_profile import LAUNCH_TIMES

from kernel_table import measurements
from kernel_table.environment import environment
from kernel_table.table import Goal, Row, report, row_text, summary, summary_text

K = 1024
STATEMENT = "CUDA graph replay, median of 7, inputs rotated; microseconds; ratio = peer / ours"


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    title: str
    goal: Goal
    measure: Callable[..., Row]
    points: Sequence[tuple[float, ...]]
    """Arguments of ``measure``."""
    quick: Sequence[tuple[float, ...]]


LINES = {
    "sparse-decode-16": Line(
        "sparse MLA decode, 16 heads; peers: FA3 on bf16, FlashMLA on fp8 (kernel alone, padded to 64 heads)",
        Goal(1.6),
        measurements.sparse_decode,
        [(16, batch) for batch in (1, 4, 16, 64, 128, 256)],
        [(16, 1), (16, 64)],
    ),
    "sparse-decode-128": Line(
        "sparse MLA decode, 128 heads; peers: FA3 on bf16, FlashMLA on fp8",
        Goal(1.1),
        measurements.sparse_decode,
        [(128, batch) for batch in (16, 64, 128, 256)],
        [(128, 64)],
    ),
    "sparse-prefill-16": Line(
        "sparse MLA prefill, 4096 queries, 16 heads; peers: FlashMLA prefill and decode (padded to 64 heads), FA3",
        Goal(1.6),
        measurements.sparse_prefill,
        [(16, 8 * K), (16, 64 * K), (16, 64 * K, 0.8)],
        [(16, 64 * K)],
    ),
    "index-decode": Line(
        "index logits, top-k and its slots, decode, few rows; peers: DeepGEMM, vLLM's best top-k kernel, its remap",
        Goal(1.3),
        measurements.index_decode,
        list(product((1, 4, 16), (4 * K, 32 * K, 128 * K))),
        [(1, 32 * K)],
    ),
    "index-decode-many": Line(
        "index logits, top-k and its slots, decode, many rows; peers: as above",
        Goal(1.0),
        measurements.index_decode,
        list(product((64, 128), (4 * K, 32 * K, 128 * K))),
        [(64, 32 * K)],
    ),
    "index-prefill": Line(
        "index logits, top-k and its slots, prefill, 4096 queries; peers: DeepGEMM, vLLM's top-k and its remap",
        Goal(1.0),
        measurements.index_prefill,
        [(8 * K,), (32 * K,), (128 * K,)],
        [(32 * K,)],
    ),
    "select-decode": Line(
        "top-k and its slots, decode; peers: the best of vLLM's top-k kernels, and its remap",
        Goal(1.5),
        measurements.select_decode,
        list(product((1, 4, 16, 64, 128), (4 * K, 32 * K, 128 * K))),
        [(1, 32 * K), (64, 32 * K)],
    ),
    "select-decode-equal": Line(
        "top-k and its slots of equal logits, as of dummy weights; peers: the best of vLLM's, and its remap",
        Goal(1.0),
        measurements.select_decode,
        [(*point, False) for point in product((1, 16, 64), (32 * K, 128 * K))],
        [(16, 32 * K, False)],
    ),
    "decode-block-16": Line(
        "attention between its projections, decode, 16 heads; peers: vLLM's, with FA3 (bf16), FlashMLA (fp8)",
        Goal(1.6),
        measurements.decode_block,
        [(16, *point) for point in product((1, 4, 16, 64), (8 * K, 32 * K, 128 * K))],
        [(16, 1, 32 * K), (16, 16, 32 * K)],
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=LINES, metavar="LINE", help=f"of {', '.join(LINES)}")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers to this JSON file")
    parser.add_argument("--quick", action="store_true", help="fewer points of each line")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device, and torch sees none")
    begin = time.perf_counter()
    values: dict[str, Any] = {**environment(), "measured": STATEMENT, "launch_times": LAUNCH_TIMES, "lines": {}}
    print(", ".join(f"{name} {value}" for name, value in {**values["versions"], **values["device"]}.items()))
    print(STATEMENT, flush=True)
    torch.manual_seed(0)
    for name in options.only or LINES:
        values["lines"][name] = measure(name, LINES[name], options.quick)
        if options.out:  # after each line: a run that is cut short leaves what it has
            options.out.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    print(f"took {time.perf_counter() - begin:.0f} s")
    # A wrong row misses its line's goal; a line without a ratio is not judged.
    return int(any(line["summary"]["met"] is False for line in values["lines"].values()))


def measure(name: str, line: Line, quick: bool) -> dict[str, Any]:
    """The rows of one line, printed as they come."""
    print(f"{name}: {line.title}", flush=True)
    rows = []
    for point in line.quick if quick else line.points:
        try:
            row = line.measure(*point)
        except measurements.FAILURES as error:
            row = Row(" x ".join(map(str, point)), wrong=[f"{type(error).__name__}: {str(error)[:300]}"])
        rows.append(row)
        print(row_text(row), flush=True)
        torch.cuda.empty_cache()
    values = summary(rows, line.goal)
    print(summary_text(values), flush=True)
    return {"title": line.title, "summary": values, "rows": report(rows)}


if __name__ == "__main__":
    sys.exit(main())
