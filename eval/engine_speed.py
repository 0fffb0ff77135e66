"""Speed of the engine with the plugin and with vLLM's own implementation of DeepSeek-V3.2.

    PYTHONPATH=eval python eval/engine_speed.py --out FILE.json [--model DIR] [--caches auto fp8]

Both sides run vLLM's LLM class on a model of the published widths with four layers, 16 heads, 32 experts and
dummy weights. A GPU times one run at a time; with several GPUs, the sides are timed at the same moment.
Prefill is tokens of fresh prompts a second, decode the time of a step once the prompts are in the prefix cache.
Of so few layers much is launches and host time, so the ratios say more than the figures.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine_runs.reduced_model import write_reduced_config
from engine_runs.sides import IN_TREE, PLUGIN, Child, say_ready_and_wait, visible_gpus

_NUM_NEW = 65
_REPEATS = 3
_CACHE_NBYTES = 8 << 30
"""Room for sixteen prompts of 64K tokens, whatever else is on the GPU."""


def measure(arguments: argparse.Namespace) -> None:
    """The child: one side, one cache."""
    begin = time.monotonic()
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(arguments.model),
        load_format="dummy",
        skip_tokenizer_init=True,
        kv_cache_dtype=arguments.caches[0],
        max_model_len=max(arguments.contexts) + 256,
        max_num_batched_tokens=8192,
        max_num_seqs=64,
        kv_cache_memory_bytes=_CACHE_NBYTES,
        gpu_memory_utilization=0.1,  # vLLM asks whether this share is free
        enable_prefix_caching=True,
        linear_backend=arguments.linear_backend,
    )
    import torch

    generator = torch.Generator().manual_seed(0)
    one, many = (
        SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False) for n in (1, _NUM_NEW)
    )

    def fresh(length: int, batch: int) -> list[dict[str, list[int]]]:
        ids = torch.randint(2, 100_000, (batch, length), generator=generator)
        return [{"prompt_token_ids": row.tolist()} for row in ids]

    def seconds(prompts: list[dict[str, list[int]]], params: SamplingParams) -> float:
        begin = time.monotonic()
        llm.generate(prompts, params, use_tqdm=False)
        return time.monotonic() - begin

    first_answer = time.monotonic() - begin + seconds(fresh(100, 1), one)
    say_ready_and_wait()
    rows = []
    for length in arguments.contexts:
        for batch in arguments.batches:
            seconds(fresh(length, batch), many)  # whatever this shape still has to compile
            prefill = min(seconds(fresh(length, batch), one) for _ in range(_REPEATS))
            prompts = fresh(length, batch)
            seconds(prompts, one)  # from here on the prefix cache holds them
            cached = min(seconds(prompts, one) for _ in range(_REPEATS))
            decode = (min(seconds(prompts, many) for _ in range(_REPEATS)) - cached) / (_NUM_NEW - 1)
            rows.append(
                {
                    "context": length,
                    "batch": batch,
                    "prefill_tokens_per_s": batch * length / prefill,
                    "decode_ms": 1e3 * decode,
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    arguments.out.write_text(json.dumps({"first_answer_s": first_answer, "rows": rows}))


def compare(arguments: argparse.Namespace) -> None:
    """The parent: all runs, then the table."""
    folder = Path(tempfile.mkdtemp(prefix="engine-speed-"))
    model = arguments.model
    if model is None:
        model = folder / "model"
        write_reduced_config(model)
    runs = [(side, cache) for cache in arguments.caches for side in (IN_TREE, PLUGIN)]
    gpus = visible_gpus()

    def start(run: tuple[str, str], gpu: str) -> Child:
        side, cache = run
        name = f"{side} {cache}"
        shape = ["--contexts", *map(str, arguments.contexts), "--batches", *map(str, arguments.batches)]
        command = [__file__, "--child", "--model", str(model), "--caches", cache, *shape]
        command += ["--linear-backend", arguments.linear_backend]
        path = folder / name.replace(" ", "-")
        return Child.start(name, side, gpu, [*command, "--out", f"{path}.json"], Path(f"{path}.log"))

    # vLLM's own takes minutes to start: they all start before anything is timed.
    gpu_of = {run: gpus[index % len(gpus)] for index, run in enumerate(runs)}
    children = {run: start(run, gpu_of[run]) for run in runs if run[0] == IN_TREE}
    for child in children.values():
        child.wait_until_ready()
    for run in runs:
        if run[0] == PLUGIN:  # one after the other: their start is timed
            children[run] = start(run, gpu_of[run])
            children[run].wait_until_ready()
    for begin in range(0, len(runs), len(gpus)):
        at_once = [children[run] for run in runs[begin : begin + len(gpus)]]
        for child in at_once:
            child.go()
        for child in at_once:
            child.wait()
    results = {run: json.loads((folder / f"{run[0]}-{run[1]}.json").read_text()) for run in runs}
    for run, result in results.items():
        print(f"{run[0]} {run[1]}: first answer after {result['first_answer_s']:.0f} s")
    table = []
    for cache in arguments.caches:
        for ours, theirs in zip(results[PLUGIN, cache]["rows"], results[IN_TREE, cache]["rows"], strict=True):
            row: dict[str, Any] = {"cache": cache, "context": ours["context"], "batch": ours["batch"]}
            row["prefill_ratio"] = ours["prefill_tokens_per_s"] / theirs["prefill_tokens_per_s"]
            row["decode_ratio"] = theirs["decode_ms"] / ours["decode_ms"]
            table.append(row | {"plugin": ours, "in-tree": theirs})
            print(
                f"{cache:<5} {row['batch']:>3} x {row['context']:<6} prefill tokens/s"
                f" {ours['prefill_tokens_per_s']:>9,.0f} against {theirs['prefill_tokens_per_s']:>9,.0f}"
                f" ({row['prefill_ratio']:.2f})   decode ms {ours['decode_ms']:.3f} against"
                f" {theirs['decode_ms']:.3f} ({row['decode_ratio']:.2f})"
            )
    starts = {f"{side} {cache}": result["first_answer_s"] for (side, cache), result in results.items()}
    values = {"num_gpus": len(gpus), "first_answer_s": starts, "rows": table}
    arguments.out.write_text(json.dumps(values, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a folder with a config.json (default: the reduced model)")
    parser.add_argument("--caches", nargs="+", default=["auto", "fp8"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[8192, 65536])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument(
        "--linear-backend", default="auto", help="vLLM's option, for both sides; some compile for minutes"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    (measure if arguments.child else compare)(arguments)


if __name__ == "__main__":
    main()
