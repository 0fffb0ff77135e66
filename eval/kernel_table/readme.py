"""Puts the kernel benchmark's figures into the README.

    PYTHONPATH=eval python -m kernel_table.readme eval/results/kernels_h200.json README.md

The JSON is what `python eval/kernels.py --out` writes; what lies between the two marks of the page is replaced.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["NOT_MEASURED", "fill", "render"]

_BEGIN, _END = "<!-- kernels: begin -->", "<!-- kernels: end -->"
NOT_MEASURED = "No results are in the repository yet; the command above makes them.\n"


def render(results: Mapping[str, Any]) -> str:
    """The best of each side, in microseconds, and the peer's time over ours: above 1 ours is faster."""
    versions, device = results["versions"], results["device"]
    lines = [
        f"{device['name']}, vLLM {versions['vllm']}, torch {versions['torch']}, Triton {versions['triton']}; "
        f"microseconds. Above 1.00 ours is faster.",
        "",
        "| operation | problem | ours | vLLM's best | ratio |",
        "|---|---|---|---|---|",
    ]
    for line in results["lines"].values():
        title = line["title"].partition(";")[0]
        lines += [f"| {title} | {_row(row)} |" for row in line["rows"]]
    return "\n".join(lines) + "\n"


def _row(row: Mapping[str, Any]) -> str:
    if row["wrong"]:
        return f"{row['point']} | wrong, so no ratio | | "
    sides = [_best(row["us"][side]) for side in ("ours", "peers")]
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    return " | ".join([row["point"], *sides, ratio])


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
    parser.add_argument("page", type=Path)
    options = parser.parse_args(arguments)
    content = render(json.loads(options.results.read_text(encoding="utf-8")))
    options.page.write_text(fill(options.page.read_text(encoding="utf-8"), content), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
