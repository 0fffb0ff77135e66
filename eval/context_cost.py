"""What a token costs by the length of its context, in prefill and in decode, with the plugin and without it.

    python eval/context_cost.py --out FILE.json [--model DIR] [--cache fp8]    (and FILE.png, FILE.md)
    python eval/context_cost.py --redraw FILE.json                             (the figure alone)

Both sides run vLLM's LLM class, in turn on one GPU, by default on a model of the published widths with four layers,
16 heads, 32 experts and dummy weights; --model takes any folder with a config.json. Of so few layers much is
launches and host time, so how the curves rise and how they differ says more than their height.

Prefill: what a prompt takes more than one of the length before, over the tokens that it has more. Short prompts are
given several at once, so that steps are full. Decode: the time of a step of --batch sequences whose prompts are in
the prefix cache, over that number. Microseconds a token are GPU seconds a million tokens, too.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from engine_runs.reduced_model import write_reduced_config
from engine_runs.sides import IN_TREE, PLUGIN, Child, say_ready_and_wait, visible_gpus
from results_file import Figure, local_system, write_results
from tqdm import tqdm

__all__ = ["draw", "marginal"]

K = 1024
CONTEXTS = tuple(n * K for n in (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160))
TABLE = "Microseconds a token"
_POINT = "measured "


def measure(options: argparse.Namespace) -> None:
    """The child: one side, on stdout a line a measurement."""
    import torch
    from vllm import LLM, SamplingParams

    vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    longest = max(options.contexts)
    llm = LLM(
        str(options.model),
        load_format="dummy",
        dtype=options.dtype,
        skip_tokenizer_init=True,
        kv_cache_dtype=options.cache,
        max_model_len=longest,
        max_num_batched_tokens=options.step_tokens,
        max_num_seqs=max(options.batch, _prompts_at_once(min(options.contexts), options)),
        enable_prefix_caching=True,
    )
    generator = torch.Generator().manual_seed(0)
    num_steps = options.new_tokens
    one, many = (
        SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False) for n in (1, num_steps + 1)
    )

    def run(rows: list[list[int]], params: Any) -> tuple[float, list[Any]]:
        begin = time.monotonic()
        outputs = llm.generate([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False)
        return time.monotonic() - begin, outputs

    def fresh(num: int, length: int) -> list[list[int]]:
        return torch.randint(2, vocabulary, (num, length), generator=generator).tolist()

    def prefill(context: int) -> float:
        """Seconds a prompt; the first run compiles what this shape still needs."""
        num = _prompts_at_once(context, options)
        runs = [run(fresh(num, context - 1), one)[0] for _ in range(options.repeats + 1)]
        return min(runs[1:]) / num

    texts = fresh(options.batch, longest)

    def decode(context: int) -> float:
        """Seconds a step."""
        rows = [text[: context - num_steps - 1] for text in texts]
        run(rows, many)
        _, outputs = run(rows, one)
        _check_cached(outputs, options.step_tokens)
        cached = min(run(rows, one)[0] for _ in range(options.repeats))
        return (min(run(rows, many)[0] for _ in range(options.repeats)) - cached) / num_steps

    say_ready_and_wait()
    measured: dict[str, list[float]] = {"prefill_s": [], "decode_step_s": []}
    for name, measurement in (("prefill_s", prefill), ("decode_step_s", decode)):
        for context in options.contexts:
            measured[name].append(measurement(context))
            print(f"{_POINT}{name} {context} {measured[name][-1]:.6f}", flush=True)
    options.out.write_text(json.dumps(measured))


def _prompts_at_once(context: int, options: argparse.Namespace) -> int:
    """As many as fill four steps."""
    return max(1, 4 * options.step_tokens // context)


def _check_cached(outputs: Sequence[Any], step_tokens: int) -> None:
    """What is left of the prompts must fit one step, or some sequences would decode before others."""
    left = sum(len(output.prompt_token_ids) - (output.num_cached_tokens or 0) for output in outputs)
    if left > step_tokens:
        raise RuntimeError(
            f"the prefix cache should hold {len(outputs)} prompts of {len(outputs[0].prompt_token_ids)} tokens: "
            f"{left} are missing, and a step takes {step_tokens}. Give a smaller --batch"
        )


def marginal(contexts: Sequence[int], seconds: Sequence[float]) -> list[float]:
    """Seconds for a token more, of prompts of growing lengths: between each length and the one before."""
    points = [(0, 0.0), *zip(contexts, seconds, strict=True)]
    return [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(points)]


def compare(options: argparse.Namespace) -> None:
    """The parent: the sides in turn, then table and figure."""
    import torch

    gpu = visible_gpus()[0] if torch.cuda.is_available() else ""
    folder = Path(tempfile.mkdtemp(prefix="context-cost-"))
    model = options.model
    if model is None:
        model = folder / "model"
        write_reduced_config(model)
    settings = {name: getattr(options, name) for name in _SETTINGS}
    system = local_system("reduced, four layers" if options.model is None else model.name, "--load-format dummy")
    raw: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for side in options.sides:
        raw[side] = run_side(side, gpu, model, folder, options)
        rows += rows_of(side, options.contexts, raw[side], options.batch)
        # After each side: if the second one fails, the first is kept.
        write_results(
            options.out,
            title="Cost of a token by the length of its context",
            system=system,
            settings=settings,
            figures=figures_of(rows, options.contexts),
            notes=[
                f"![cost by context]({options.out.with_suffix('.png').name})",
                "Prefill: between this length and the one before. Decode: a step's time over the sequences in it.",
                "No pass mark: the figure is for comparison.",
            ],
            tables={TABLE: rows},
            details=raw,
        )
        draw(rows, f"{system.model}, {options.cache} cache; {system.device}", options.out.with_suffix(".png"))


def run_side(side: str, gpu: str, model: Path, folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each measurement, from a child."""
    out, log = folder / f"{side}.json", options.out.with_suffix(f".{side}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    flags = [
        flag for name in _SETTINGS for flag in (f"--{name.replace('_', '-')}", *_words(getattr(options, name)))
    ]
    child = Child.start(
        side, side, gpu, [__file__, "--child", "--model", str(model), "--out", str(out), *flags], log
    )
    print(f"{side}: starting; log in {log}", flush=True)
    child.wait_until_ready()
    child.go()
    assert child.process.stdout is not None
    with tqdm(total=2 * len(options.contexts), desc=side, unit="point") as bar:
        for line in child.process.stdout:
            bar.update(line.startswith(_POINT))
    child.wait()
    return json.loads(out.read_text())


def _words(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, (list, tuple)) else [str(value)]


def rows_of(side: str, contexts: Sequence[int], raw: dict[str, list[float]], batch: int) -> list[dict[str, Any]]:
    prefills = marginal(contexts, raw["prefill_s"])
    return [
        {"side": side, "context": context, "prefill": 1e6 * prefill, "decode": 1e6 * step / batch}
        for context, prefill, step in zip(contexts, prefills, raw["decode_step_s"], strict=True)
    ]


def figures_of(rows: Sequence[dict[str, Any]], contexts: Sequence[int]) -> list[Figure]:
    """At the longest context: each side's cost, and how much of vLLM's own the plugin's is."""
    longest = {row["side"]: row for row in rows if row["context"] == max(contexts)}
    figures = [
        Figure(f"{phase} at {max(contexts)} tokens, {side}", row[phase], unit="us/token", higher_is_better=False)
        for phase in ("prefill", "decode")
        for side, row in longest.items()
    ]
    if len(longest) > 1:
        figures += [
            Figure(f"{phase} at {max(contexts)} tokens, in-tree / plugin", longest[IN_TREE][phase] / ours)
            for phase, ours in longest[PLUGIN].items()
            if phase in ("prefill", "decode")
        ]
    return figures


def draw(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """The figure: a panel for prefill and one for decode, a curve a side.

    Args:
        rows: as the table of the results has them.
        title: what was measured.
        path: of the PNG.
    """
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5))
    for phase, axes in zip(("prefill", "decode"), panels, strict=True):
        for side in dict.fromkeys(row["side"] for row in rows):
            points = [(row["context"] / K, row[phase]) for row in rows if row["side"] == side]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=side)
        axes.set(title=phase, xlabel="context (1024 tokens)", ylabel="µs a token", xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def redraw(path: Path) -> None:
    """The figure of a result file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    system, settings = content["system"], content["settings"]
    title = f"{system['model']}, {settings['cache']} cache; {system['device']}"
    draw(content["tables"][TABLE], title, path.with_suffix(".png"))


_SETTINGS = ("contexts", "batch", "cache", "dtype", "step_tokens", "new_tokens", "repeats")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", type=Path, metavar="FILE.json", help="write the results here; logs go beside it")
    place.add_argument("--redraw", type=Path, metavar="FILE.json", help="draw the figure of these results again")
    parser.add_argument("--model", type=Path, help="a folder with a config.json (default: the reduced model)")
    parser.add_argument("--sides", nargs="+", choices=(PLUGIN, IN_TREE), default=[PLUGIN, IN_TREE])
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS, help="growing (default: 1K to 160K)")
    parser.add_argument("--batch", type=int, default=16, help="sequences that decode together (default: 16)")
    parser.add_argument("--cache", default="fp8", help="as --kv-cache-dtype (default: fp8)")
    parser.add_argument("--dtype", default="auto", help="as vLLM's --dtype")
    parser.add_argument("--step-tokens", type=int, default=8 * K, help="of a prefill step (default: 8192)")
    parser.add_argument("--new-tokens", type=int, default=64, help="decode steps of a measurement (default: 64)")
    parser.add_argument("--repeats", type=int, default=3, help="of which the best counts (default: 3)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.redraw:
        redraw(options.redraw)
        return
    if list(options.contexts) != sorted(set(options.contexts)) or options.contexts[0] <= options.new_tokens + 1:
        parser.error(f"--contexts must grow, from more than {options.new_tokens + 1}, got {options.contexts}")
    (measure if options.child else compare)(options)


if __name__ == "__main__":
    sys.exit(main())
