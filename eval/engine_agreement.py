"""Whether the engine with the plugin computes what it computes with vLLM's own implementation of DeepSeek-V3.2.

    python eval/engine_agreement.py --out FILE.json [--model DIR] [--contexts 1024 8192 65536]

Writes FILE.md too, and a log of each run beside it.

Both sides load the same checkpoint (by default random weights of the published widths in the published fp8 format)
and take the same prompts. Compared are the distributions behind the last token of each prompt, and of the prompt
with one more token, which finds the rest in the prefix cache: divergence, and how often both rank the same token
first. As a yardstick, the two caches of each side are compared with each other, which differ by quantisation only.

Exits with 1 if a run failed, or where the sides differ by more than twice the larger yardstick of that context. The
factor is a goal of this project.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from engine_runs.reduced_model import write_random_checkpoint
from engine_runs.sides import IN_TREE, PLUGIN, Child, add_child_options, say_ready_and_wait, visible_gpus
from results_file import Figure, json_path, local_system, passed, write_results

__all__ = ["difference", "figures_of", "table_of"]

PASS_FACTOR = 2.0
"""A goal: mean divergence between the sides over the larger of those between each side's caches."""
_NUM_PROMPTS = {1024: 24, 8192: 12}
_NUM_LONGER_PROMPTS = 4
_CACHES = ("auto", "fp8")
_CACHE_NBYTES = 5 << 30
"""Room for the prompts, whatever else is on the GPU."""

Run = tuple[str, str, bool]
"""A side, its cache, and whether it drafts."""
RUNS: tuple[Run, ...] = tuple((s, c, d) for s in (PLUGIN, IN_TREE) for c in _CACHES for d in (False, True))


def record(arguments: argparse.Namespace) -> None:
    """The child: log-probabilities of one side with one cache, ``{context: [2 * prompts, vocabulary]}``."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(arguments.model),
        skip_tokenizer_init=True,
        kv_cache_dtype=arguments.cache,
        max_model_len=max(arguments.contexts) + 64,
        max_num_batched_tokens=8192,
        max_num_seqs=64,
        kv_cache_memory_bytes=_CACHE_NBYTES,
        gpu_memory_utilization=0.1,  # vLLM asks whether this share is free
        enable_prefix_caching=True,
        max_logprobs=-1,
        linear_backend="cutlass",  # the same GEMMs on both sides
        speculative_config={"method": "mtp", "num_speculative_tokens": 1} if arguments.drafts else None,
    )
    vocabulary = json.loads((arguments.model / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, detokenize=False, logprobs=-1)
    say_ready_and_wait()

    def distributions(prompts: list[list[int]]) -> list[torch.Tensor]:
        rows = []
        for output in llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False):
            first = output.outputs[0].logprobs[0]
            row = torch.full((vocabulary,), -torch.inf)
            row[list(first)] = torch.tensor([entry.logprob for entry in first.values()])
            rows.append(row)
        return rows

    recorded = {}
    for length in arguments.contexts:
        num_prompts = _NUM_PROMPTS.get(length, _NUM_LONGER_PROMPTS)
        ids = torch.randint(2, vocabulary, (num_prompts, length + 1), generator=generator).tolist()
        whole = distributions([row[:-1] for row in ids])
        recorded[length] = torch.stack(whole + distributions(ids))
    torch.save(recorded, arguments.record)


def difference(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """How ``[n, vocabulary]`` log-probabilities differ."""
    gap = (a - b).masked_fill(a.isneginf(), 0.0)
    divergence = (a.exp() * gap).sum(-1)
    return {
        "mean_kl": divergence.mean().item(),
        "worst_kl": divergence.max().item(),
        "median_logprob_difference": statistics.median(gap.abs().flatten().tolist()),
        "top1_agreement": (a.argmax(-1) == b.argmax(-1)).double().mean().item(),
    }


def compare(arguments: argparse.Namespace) -> int:
    """The parent: all runs, then the table of those that did not fail; 1 if one did or a mark is missed."""
    gpus = visible_gpus()
    with tempfile.TemporaryDirectory(prefix="engine-agreement-") as folder:
        model = arguments.model
        if model is None:
            model = Path(folder) / "model"
            write_random_checkpoint(model)
        results = run_all(gpus, model, Path(folder), arguments)
    table = table_of(results, arguments.contexts)
    for row in table:
        print(
            f"{row['one']:<16} {row['other']:<16} {row['context']:>6}  KL {row['mean_kl']:.1e}, at worst"
            f" {row['worst_kl']:.1e}; logprobs differ by {row['median_logprob_difference']:.1e};"
            f" same first token {row['top1_agreement']:.1%}"
        )
    figures = figures_of(table, num_failed=len(RUNS) - len(results))
    for figure in figures:
        if figure.passed is False:
            print(f"{figure.name}: {figure.value:.1e} misses the mark of {figure.pass_mark:.1e}")
    write_results(
        arguments.out,
        title="Agreement of the engine with vLLM's own implementation",
        system=local_system(
            "random weights, three layers" if arguments.model is None else arguments.model.name,
            "--linear-backend cutlass",
        ),
        settings={"contexts": arguments.contexts, "caches": _CACHES},
        figures=figures,
        notes=[
            f"The pass mark is a goal of this project, no published figure: {PASS_FACTOR} times the larger of what "
            "the two caches of one side differ by, of either side, at the same context.",
            "mtp: with drafts of one token. KL is in nats, from the first to the other.",
        ],
        tables={"Differences": table},
    )
    return int(not passed(figures))


def run_all(
    gpus: Sequence[str], model: Path, folder: Path, arguments: argparse.Namespace
) -> dict[Run, dict[int, torch.Tensor]]:
    """What the children recorded, of those that did not fail."""

    def record_of(run: Run) -> Path:
        side, cache, drafts = run
        return folder / f"{side}-{cache}{'-mtp' if drafts else ''}.pt"

    def start(run: Run, gpu: str) -> Child:
        side, cache, drafts = run
        command = [__file__, "--model", str(model), "--cache", cache, "--record", str(record_of(run))]
        command += ["--contexts", *map(str, arguments.contexts), *(["--drafts"] if drafts else [])]
        name = record_of(run).stem
        log = arguments.out.with_suffix(f".{name}.log")
        print(f"{name}: starting; log in {log}", flush=True)
        return Child.start(name, side, gpu, command, log, arguments.timeout)

    results: dict[Run, dict[int, torch.Tensor]] = {}
    for begin in range(0, len(RUNS), len(gpus)):
        at_once = zip(gpus, RUNS[begin : begin + len(gpus)], strict=False)
        children = {run: start(run, gpu) for gpu, run in at_once}
        # Each goes as soon as it can, and is waited for when all do.
        going = {}
        for run, child in children.items():
            try:
                child.wait_until_ready()
            except RuntimeError as error:
                print(error, flush=True)
            else:
                child.go()
                going[run] = child
        for run, child in going.items():
            try:
                child.wait()
            except RuntimeError as error:
                print(error, flush=True)
            else:
                results[run] = torch.load(record_of(run))
    return results


def table_of(results: Mapping[Run, Mapping[int, torch.Tensor]], contexts: Sequence[int]) -> list[dict[str, Any]]:
    """The sides with each other, then each side's caches; of runs that did not fail."""
    pairs = [((PLUGIN, c, d), (IN_TREE, c, d)) for c in _CACHES for d in (False, True)]
    pairs += [((side, "auto", False), (side, "fp8", False)) for side in (PLUGIN, IN_TREE)]
    return [
        {
            "one": name_of(one),
            "other": name_of(other),
            "context": context,
            **difference(results[one][context], results[other][context]),
        }
        for one, other in pairs
        if one in results and other in results
        for context in contexts
    ]


def name_of(run: Run) -> str:
    side, cache, drafts = run
    return f"{side} {cache}{' mtp' if drafts else ''}"


def figures_of(table: Sequence[Mapping[str, Any]], num_failed: int) -> list[Figure]:
    """Mean divergence of each pair at each context; between the sides it has a mark where there is a yardstick."""

    def is_yardstick(row: Mapping[str, Any]) -> bool:
        return row["one"].split()[0] == row["other"].split()[0]

    yardsticks: dict[int, list[float]] = {}
    for row in filter(is_yardstick, table):
        yardsticks.setdefault(row["context"], []).append(row["mean_kl"])
    figures = [Figure("failed runs", num_failed, samples=len(RUNS), pass_mark=0, higher_is_better=False)]
    for row in table:
        known = [] if is_yardstick(row) else yardsticks.get(row["context"], [])
        figures.append(
            Figure(
                f"mean KL, {row['one']} and {row['other']}, {row['context']} tokens",
                row["mean_kl"],
                unit="nats",
                pass_mark=PASS_FACTOR * max(known) if known else None,
                higher_is_better=False,
            )
        )
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", type=json_path, metavar="FILE.json", help="and FILE.md")
    place.add_argument("--record", type=Path, help=argparse.SUPPRESS)  # what a child writes
    parser.add_argument("--model", type=Path, help="a checkpoint (default: one with random weights is written)")
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192, 65536])
    add_child_options(parser)
    parser.add_argument("--drafts", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cache", default="auto", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.record:
        record(options)
        return 0
    return compare(options)


if __name__ == "__main__":
    sys.exit(main())
