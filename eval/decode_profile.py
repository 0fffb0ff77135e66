"""Where the GPU's time goes in a decode step, with the plugin and without it, by kernel.

    python eval/decode_profile.py --out FILE.json [--context 65536] [--batch 16] [--cache fp8]    (and FILE.md)

Both sides run vLLM's LLM class on one GPU, in turn. The model has the published widths, four layers, 16 heads,
32 experts and dummy weights, unless --model names a folder with another config.json. Times are of torch's profiler:
what each kernel adds to the time of those before it, as some start early and wait. Time of the host is not in them.

A kernel that runs on both sides is no part of what the plugin replaces: how fast a step can be beside vLLM's own is
limited by the share of such kernels.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine_runs.reduced_model import REDUCED, given_or_reduced
from engine_runs.sides import IN_TREE, PLUGIN, Child, add_child_options, say_ready_and_wait, visible_gpus
from engine_runs.timed_engine import ENGINE_OPTIONS, TimedEngine, add_engine_options, as_flags, engine_flags
from results_file import Figure, json_path, local_system, write_results

__all__ = ["Kernels", "figures_of", "rows_of"]

Kernels = Mapping[str, tuple[float, float]]
"""Of a step: microseconds and launches by kernel."""

_SIDES = (PLUGIN, IN_TREE)
_SETTINGS = ("context", "batch", "cache", *ENGINE_OPTIONS)
_LEAST_US = 0.5
"""Kernels that take less on both sides are not in the table."""


def profile(options: argparse.Namespace) -> None:
    """The child: one side."""
    longest = options.context + options.new_tokens + 1
    engine = TimedEngine(
        options,
        cache=options.cache,
        max_model_len=longest,
        max_num_seqs=options.batch,
        num_cached_tokens=options.batch * longest,
    )
    say_ready_and_wait()
    kernels = engine.profile_decode(engine.fresh(options.batch, options.context))
    options.out.write_text(json.dumps(kernels))


def compare(options: argparse.Namespace) -> None:
    """The parent: the sides in turn, then the tables."""
    gpu = visible_gpus()[0]
    kernels: dict[str, Kernels] = {}
    with tempfile.TemporaryDirectory(prefix="decode-profile-") as name:
        folder = Path(name)
        model = given_or_reduced(options.model, folder)
        for side in _SIDES:
            out, log = folder / f"{side}.json", options.out.with_suffix(f".{side}.log")
            command = [__file__, "--child", "--model", str(model), "--out", str(out), *as_flags(options, _SETTINGS)]
            print(f"{side}: starting; log in {log}", flush=True)
            child = Child.start(side, side, gpu, command, log, options.timeout)
            child.wait_until_ready()
            child.go()
            child.wait()
            kernels[side] = json.loads(out.read_text())
    figures = figures_of(kernels)
    write_results(
        options.out,
        title="Kernels of a decode step",
        system=local_system(REDUCED if options.model is None else model.name, engine_flags(options)),
        settings={name: getattr(options, name) for name in _SETTINGS},
        figures=figures,
        notes=[
            "Microseconds on the GPU, in a profile: what each kernel adds to those before it.",
            "What the host does is not in them.",
            "No pass mark.",
        ],
        tables={"Microseconds a step": rows_of(kernels)},
    )
    for figure in figures:
        print(f"{figure.name}: {figure.value:.1f} {figure.unit}")


def figures_of(kernels: Mapping[str, Kernels]) -> list[Figure]:
    """The whole of each side, and what kernels of both sides and of one alone take of it."""
    on_both = set.intersection(*map(set, kernels.values()))
    figures = []
    for side, of_side in kernels.items():
        shared = sum(us for name, (us, _) in of_side.items() if name in on_both)
        own = sum(us for name, (us, _) in of_side.items() if name not in on_both)
        figures += [
            Figure(f"{side}, all kernels", shared + own, unit="us", higher_is_better=False),
            Figure(f"{side}, kernels that run on both sides", shared, unit="us", higher_is_better=False),
            Figure(f"{side}, kernels of this side alone", own, unit="us", higher_is_better=False),
        ]
    return figures


def rows_of(kernels: Mapping[str, Kernels]) -> list[dict[str, Any]]:
    """A row for each kernel, the slowest first."""
    most = {
        name: max(of_side.get(name, (0.0, 0.0))[0] for of_side in kernels.values())
        for of_side in kernels.values()
        for name in of_side
    }
    rows = []
    for name in sorted(most, key=most.__getitem__, reverse=True):
        if most[name] < _LEAST_US:
            break
        row: dict[str, Any] = {"kernel": name}
        for side, of_side in kernels.items():
            us, count = of_side.get(name, (0.0, 0.0))
            row |= {f"us, {side}": round(us, 1), f"launches, {side}": round(count, 1)}
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=json_path, required=True, metavar="FILE.json", help="and FILE.md")
    parser.add_argument("--context", type=int, default=65536, help="tokens of each prompt (default: 65536)")
    parser.add_argument("--batch", type=int, default=16, help="sequences (default: 16)")
    parser.add_argument("--cache", default="fp8", help="as --kv-cache-dtype (default: fp8)")
    add_engine_options(parser)
    add_child_options(parser)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    (profile if options.child else compare)(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
