"""Speed of the engine with the plugin and with vLLM's own implementation of DeepSeek-V3.2.

    python eval/engine_speed.py --out FILE.json [--model DIR] [--caches auto fp8]    (and FILE.md, and logs)

Both sides run vLLM's LLM class on a model of the published widths with four layers, 16 heads, 32 experts and
dummy weights. A GPU times one run at a time; with several GPUs, the sides are timed at the same moment.
Prefill is tokens of fresh prompts a second, decode the time of a step once the prompts are in the prefix cache.
Of so few layers much is launches and host time, so the ratios say more than the figures.

Exits with 1 where a ratio is below 1.0: the goal of this project is to be slower nowhere.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine_runs.reduced_model import REDUCED, given_or_reduced
from engine_runs.sides import IN_TREE, PLUGIN, Child, add_child_options, say_ready_and_wait, visible_gpus
from engine_runs.timed_engine import (
    ENGINE_OPTIONS,
    TimedEngine,
    Timing,
    add_engine_options,
    as_flags,
    engine_flags,
)
from results_file import Figure, json_path, local_system, passed, write_results
from tqdm import tqdm

__all__ = ["Row", "figures_of", "table_of"]

PASS_MARK = 1.0
"""A goal, of every ratio."""
_CAPTURED = 64
"""Sequences that CUDA graphs are captured for, at least: the first answer waits for them."""
_POINT = "measured "
_SETTINGS = ("contexts", "batches", *ENGINE_OPTIONS)

Run = tuple[str, str]
"""A side and its cache."""
Row = dict[str, Any]


def measure(options: argparse.Namespace) -> None:
    """The child: one side, one cache."""
    max_model_len = max(options.contexts) + options.new_tokens + 1
    engine = TimedEngine(
        options,
        cache=options.caches[0],
        max_model_len=max_model_len,
        max_num_seqs=max(_CAPTURED, *options.batches),
        num_cached_tokens=max(options.batches) * max_model_len,
    )
    say_ready_and_wait()
    rows = []
    for context in options.contexts:
        for batch in options.batches:
            prefill, prompts = engine.time_prefill(batch, context)
            rows.append(row_of(context, batch, prefill, engine.time_decode(prompts)))
            print(f"{_POINT}{json.dumps(rows[-1])}", flush=True)
    options.out.write_text(json.dumps({"first_answer_s": engine.first_answer_s, "rows": rows}))


def row_of(context: int, batch: int, prefill: Timing, decode: Timing) -> Row:
    return {
        "context": context,
        "batch": batch,
        "prefill_tokens_per_s": batch * context / prefill.seconds,
        "decode_ms": 1e3 * decode.seconds,
        "prefill_call_s": asdict(prefill),
        "decode_step_s": asdict(decode),
    }


def compare(options: argparse.Namespace) -> int:
    """The parent: all runs, then the table; 1 if a ratio is below the mark."""
    gpus = visible_gpus()
    runs = [(side, cache) for cache in options.caches for side in (IN_TREE, PLUGIN)]
    with tempfile.TemporaryDirectory(prefix="engine-speed-") as folder:
        model = given_or_reduced(options.model, Path(folder))
        results = run_all(runs, gpus, model, Path(folder), options)
    for (side, cache), result in results.items():
        print(f"{side} {cache}: first answer after {result['first_answer_s']:.0f} s")
    table = table_of(options.caches, results)
    for row in table:
        print(row_text(row))
    figures = figures_of(table)
    write_results(
        options.out,
        title="Speed of the engine",
        system=local_system(REDUCED if options.model is None else model.name, engine_flags(options)),
        settings={name: getattr(options, name) for name in ("caches", *_SETTINGS)} | {"GPUs": len(gpus)},
        figures=figures,
        notes=[
            f"The pass mark, a ratio of {PASS_MARK}, is a goal of this project, no published or measured figure.",
            "Prefill and decode are of the fastest calls. The range of each is in the JSON file's details.",
        ],
        tables={
            "Both sides": table,
            "First answer, in seconds from the start of the process": [
                {"side": side, "cache": cache, "seconds": result["first_answer_s"]}
                for (side, cache), result in results.items()
            ],
        },
        details={f"{side} {cache}": result for (side, cache), result in results.items()},
    )
    return int(not passed(figures))


def run_all(
    runs: Sequence[Run], gpus: Sequence[str], model: Path, folder: Path, options: argparse.Namespace
) -> dict[Run, Any]:
    """What each child wrote; a GPU times one at a time."""
    gpu_of = {run: gpus[index % len(gpus)] for index, run in enumerate(runs)}

    def start(run: Run) -> Child:
        side, cache = run
        path = out_of(run, folder)
        command = [__file__, "--child", "--model", str(model), "--caches", cache, "--out", str(path)]
        command += as_flags(options, _SETTINGS)
        log = options.out.with_suffix(f".{path.stem}.log")
        print(f"{side} {cache}: starting; log in {log}", flush=True)
        return Child.start(f"{side} {cache}", side, gpu_of[run], command, log, options.timeout)

    # vLLM's own takes minutes to start: they all start before anything is timed.
    children = {run: start(run) for run in runs if run[0] == IN_TREE}
    for child in children.values():
        child.wait_until_ready()
    for run in runs:
        if run[0] == PLUGIN:  # one after the other: their start is timed
            children[run] = start(run)
            children[run].wait_until_ready()
    num_points = len(runs) * len(options.contexts) * len(options.batches)
    with tqdm(total=num_points, desc="timing", unit="point") as bar:
        for begin in range(0, len(runs), len(gpus)):
            at_once = [children[run] for run in runs[begin : begin + len(gpus)]]
            for child in at_once:
                child.go()
            for child in at_once:
                child.wait(lambda line: bar.update(line.startswith(_POINT)))
    return {run: json.loads(out_of(run, folder).read_text()) for run in runs}


def out_of(run: Run, folder: Path) -> Path:
    side, cache = run
    return folder / f"{side}-{cache}.json"


def table_of(caches: Sequence[str], results: Mapping[Run, Any]) -> list[Row]:
    """A row for each cache and shape, with ratios that are above 1 where the plugin is faster."""
    table = []
    for cache in caches:
        for ours, theirs in zip(results[PLUGIN, cache]["rows"], results[IN_TREE, cache]["rows"], strict=True):
            ratios = {
                "prefill ratio": ours["prefill_tokens_per_s"] / theirs["prefill_tokens_per_s"],
                "decode ratio": theirs["decode_ms"] / ours["decode_ms"],
            }
            table.append(
                {
                    "cache": cache,
                    "context": ours["context"],
                    "batch": ours["batch"],
                    "prefill tokens/s, plugin": ours["prefill_tokens_per_s"],
                    "prefill tokens/s, in-tree": theirs["prefill_tokens_per_s"],
                    "decode ms, plugin": ours["decode_ms"],
                    "decode ms, in-tree": theirs["decode_ms"],
                    **ratios,
                    "goal": "met" if min(ratios.values()) >= PASS_MARK else "missed",
                }
            )
    return table


def row_text(row: Row) -> str:
    return (
        f"{row['cache']:<5} {row['batch']:>3} x {row['context']:<6} prefill tokens/s"
        f" {row['prefill tokens/s, plugin']:>9,.0f} against {row['prefill tokens/s, in-tree']:>9,.0f}"
        f" ({row['prefill ratio']:.2f})   decode ms {row['decode ms, plugin']:.3f} against"
        f" {row['decode ms, in-tree']:.3f} ({row['decode ratio']:.2f})   {row['goal']}"
    )


def figures_of(table: Sequence[Row]) -> list[Figure]:
    """Both ratios of each row, held to the mark."""
    return [
        Figure(
            f"{phase}, {row['cache']} cache, {row['batch']} x {row['context']}: plugin against in-tree",
            row[f"{phase} ratio"],
            pass_mark=PASS_MARK,
        )
        for row in table
        for phase in ("prefill", "decode")
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=json_path, required=True, metavar="FILE.json", help="and FILE.md")
    parser.add_argument("--caches", nargs="+", default=["auto", "fp8"], help="as --kv-cache-dtype (default: both)")
    parser.add_argument("--contexts", nargs="+", type=int, default=[8192, 65536], help="(default: 8192 65536)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], help="(default: 1 16)")
    add_engine_options(parser)
    add_child_options(parser)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        measure(options)
        return 0
    return compare(options)


if __name__ == "__main__":
    sys.exit(main())
