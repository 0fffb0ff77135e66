"""What a token costs by the length of its context, in prefill and in decode, with the plugin and without it.

    python eval/context_cost.py --out FILE.json [--model DIR] [--cache fp8]    (and FILE.png, FILE.md, and logs)
    python eval/context_cost.py --redraw FILE.json                             (the figure alone)

Both sides run vLLM's LLM class on one GPU; they start together, and are timed in turn. The model has the published
widths, four layers, 16 heads, 32 experts and dummy weights, unless --model names a folder with another config.json.
Of so few layers much is launches and host time, so how the curves rise and how they differ says more than their
height.

Prefill: what a prompt takes more than one of the length before, over the tokens that it has more. Short prompts are
given several at once, so that steps are full. Decode: the time of a step of --batch sequences whose prompts are in
the prefix cache, over that number; and what its kernels take of that, by a profile. Microseconds a token are GPU
seconds a million tokens, too.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from engine_runs.reduced_model import REDUCED, given_or_reduced
from engine_runs.sides import IN_TREE, PLUGIN, Child, add_child_options, say_ready_and_wait, visible_gpus
from engine_runs.timed_engine import ENGINE_OPTIONS, TimedEngine, Timing, add_engine_options, as_flags, engine_flags
from results_file import Figure, json_path, local_system, write_results
from tqdm import tqdm

__all__ = ["draw", "figures_of", "marginal", "rows_of"]

K = 1024
CONTEXTS = tuple(n * K for n in (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160))
TABLE = "Microseconds a token"
KERNELS = "decode, kernels"
_POINT = "measured "
_SETTINGS = ("contexts", "batch", "cache", *ENGINE_OPTIONS)


def measure(options: argparse.Namespace) -> None:
    """The child: one side, on stdout a line a measurement."""
    longest = max(options.contexts)
    at_once = {context: _prompts_at_once(context, options.step_tokens) for context in options.contexts}
    engine = TimedEngine(
        options,
        cache=options.cache,
        max_model_len=longest,
        max_num_seqs=max(options.batch, *at_once.values()),
        num_cached_tokens=max(options.batch * longest, *(num * context for context, num in at_once.items())),
    )
    texts = engine.fresh(options.batch, longest)

    def prefill(context: int) -> Timing:
        """A call of as many prompts as the context has."""
        return engine.time_prefill(at_once[context], context - 1)[0]

    def decode(context: int) -> Timing:
        """A step; the last one has this context."""
        return engine.time_decode([text[: context - options.new_tokens - 1] for text in texts])

    def decode_kernels(context: int) -> float:
        """Seconds of all kernels of such a step."""
        kernels = engine.profile_decode([text[: context - options.new_tokens - 1] for text in texts])
        return 1e-6 * sum(us for us, _ in kernels.values())

    say_ready_and_wait()
    measured: dict[str, Any] = {"first_answer_s": engine.first_answer_s, "prompts_at_once": [*at_once.values()]}
    for name, measurement in (("prefill_call_s", prefill), ("decode_step_s", decode)):
        measured[name] = []
        for context in options.contexts:
            measured[name].append(asdict(measurement(context)))
            print(f"{_POINT}{name} {context} {measured[name][-1]['seconds']:.6f}", flush=True)
    measured["decode_kernels_s"] = [decode_kernels(context) for context in options.contexts]
    options.out.write_text(json.dumps(measured))


def _prompts_at_once(context: int, step_tokens: int) -> int:
    """As many as fill four steps."""
    return max(1, 4 * step_tokens // context)


def marginal(contexts: Sequence[int], seconds: Sequence[float]) -> list[float]:
    """Seconds for a token more, of prompts of growing lengths: between each length and the one before."""
    points = [(0, 0.0), *zip(contexts, seconds, strict=True)]
    return [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(points)]


def compare(options: argparse.Namespace) -> None:
    """The parent: the sides in turn, then table and figure."""
    import torch

    if not _can_draw():
        print(f"no figure, as matplotlib is not installed: where it is, --redraw {options.out.name} draws it")
    gpu = visible_gpus()[0] if torch.cuda.is_available() else ""
    with tempfile.TemporaryDirectory(prefix="context-cost-") as folder:
        compare_on(gpu, Path(folder), options)


def compare_on(gpu: str, folder: Path, options: argparse.Namespace) -> None:
    """The same on a GPU, or on the CPU if that is empty; models and what children write go into ``folder``."""
    model = given_or_reduced(options.model, folder)
    system = local_system(REDUCED if options.model is None else model.name, engine_flags(options))
    raw: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for side, out, child in start_sides(gpu, model, folder, options):
        raw[side] = run_side(side, out, child, len(options.contexts))
        rows += rows_of(side, options.contexts, raw[side], options.batch)
        # After each side: if the second one fails, the first is kept.
        write_results(
            options.out,
            title="Cost of a token by the length of its context",
            system=system,
            settings={name: getattr(options, name) for name in _SETTINGS},
            figures=figures_of(rows, options.contexts),
            notes=[
                f"![cost by context]({options.out.with_suffix('.png').name})",
                "Prefill: between this length and the one before, by the fastest calls. "
                "Decode: a step's time, by the fastest calls, over the sequences in it. Kernels: such a step by "
                "a profile, that is without the host, for which four layers wait. "
                "The range of each is in the JSON file's details.",
                "No pass mark: the figure is for comparison.",
            ],
            tables={TABLE: rows},
            details=raw,
        )
        if _can_draw():
            draw(rows, f"{system.model}, {options.cache} cache; {system.device}", options.out.with_suffix(".png"))


def _can_draw() -> bool:
    return find_spec("matplotlib") is not None


def start_sides(gpu: str, model: Path, folder: Path, options: argparse.Namespace) -> list[tuple[str, Path, Child]]:
    """Each side with the file it will write and its child, which is ready: no start falls into another's times."""
    sides = []
    for side in options.sides:
        out, log = folder / f"{side}.json", options.out.with_suffix(f".{side}.log")
        command = [__file__, "--child", "--model", str(model), "--out", str(out)]
        child = Child.start(side, side, gpu, [*command, *as_flags(options, _SETTINGS)], log, options.timeout)
        print(f"{side}: starting; log in {log}", flush=True)
        sides.append((side, out, child))
    for _, _, child in sides:
        child.wait_until_ready()
    return sides


def run_side(side: str, out: Path, child: Child, num_contexts: int) -> dict[str, Any]:
    """What a child measured."""
    child.go()
    with tqdm(total=2 * num_contexts, desc=side, unit="point") as bar:
        child.wait(lambda line: bar.update(line.startswith(_POINT)))
    return json.loads(out.read_text())


def rows_of(side: str, contexts: Sequence[int], raw: dict[str, Any], batch: int) -> list[dict[str, Any]]:
    """Of one side, from what its child measured with ``batch`` sequences that decode."""
    calls = zip(raw["prefill_call_s"], raw["prompts_at_once"], strict=True)
    prefills = marginal(contexts, [call["seconds"] / num for call, num in calls])
    rows = [
        {"side": side, "context": context, "prefill": 1e6 * prefill, "decode": 1e6 * step["seconds"] / batch}
        for context, prefill, step in zip(contexts, prefills, raw["decode_step_s"], strict=True)
    ]
    for row, seconds in zip(rows, raw.get("decode_kernels_s", ()), strict=False):
        if seconds > 0:  # on a GPU
            row[KERNELS] = 1e6 * seconds / batch
    return rows


def figures_of(rows: Sequence[dict[str, Any]], contexts: Sequence[int]) -> list[Figure]:
    """At the longest context: each side's cost, and how much of vLLM's own the plugin's is."""
    longest = {row["side"]: row for row in rows if row["context"] == max(contexts)}
    figures = [
        Figure(f"{phase} at {max(contexts)} tokens, {side}", row[phase], unit="us/token", higher_is_better=False)
        for phase in ("prefill", "decode", KERNELS)
        for side, row in longest.items()
        if phase in row
    ]
    if len(longest) > 1:
        figures += [
            Figure(f"{phase} at {max(contexts)} tokens, in-tree / plugin", longest[IN_TREE][phase] / ours)
            for phase, ours in longest[PLUGIN].items()
            if phase in ("prefill", "decode", KERNELS)
        ]
    return figures


def draw(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """The figure: a panel for prefill and one for decode, a curve a side; of decode also one of its kernels alone.

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
            (curve,) = axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=side)
            kernels = [(row["context"] / K, row[KERNELS]) for row in rows if row["side"] == side and KERNELS in row]
            if phase == "decode" and kernels:
                label = f"{side}, kernels alone"
                axes.plot(*zip(*kernels, strict=True), linestyle="--", color=curve.get_color(), label=label)
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument(
        "--out", type=json_path, metavar="FILE.json", help="write the results here; logs go beside it"
    )
    place.add_argument(
        "--redraw", type=json_path, metavar="FILE.json", help="draw the figure of these results again"
    )
    parser.add_argument("--sides", nargs="+", choices=(PLUGIN, IN_TREE), default=[PLUGIN, IN_TREE])
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS, help="growing (default: 1K to 160K)")
    parser.add_argument("--batch", type=int, default=16, help="sequences that decode together (default: 16)")
    parser.add_argument("--cache", default="fp8", help="as --kv-cache-dtype (default: fp8)")
    add_engine_options(parser)
    add_child_options(parser)
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
