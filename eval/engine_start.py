"""How long the plugin takes from the start of vLLM to the first answer: from empty caches, and the next time.

    python eval/engine_start.py --out FILE.json [--model DIR] [--cache fp8]    (and FILE.md, and logs)

Two starts of vLLM's LLM class, one after the other, on a model of the published widths with four layers, 16 heads,
32 experts and dummy weights, with the defaults that vLLM and the plugin choose, and CUDA graphs for the 256
sequences of the README's command. What vLLM and the libraries under it compile is kept in a folder that is empty
before the first start. Loading weights is no part of it.

Exits with 1 if a start takes longer than its mark: 120 s, and 45 s the next time.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from engine_runs.reduced_model import REDUCED, given_or_reduced
from engine_runs.sides import PLUGIN, Child, add_child_options, say_ready_and_wait, visible_gpus
from engine_runs.timed_engine import ENGINE_OPTIONS, TimedEngine, add_engine_options, as_flags, engine_flags
from results_file import Figure, json_path, local_system, passed, write_results

__all__ = ["caches_in", "figures_of"]

PASS_MARKS = {"from empty caches": 120.0, "the next time": 45.0}
"""Goals, in seconds."""
_MAX_MODEL_LEN = 8192
_MAX_NUM_SEQS = 256
_SETTINGS = ("cache", *ENGINE_OPTIONS)
_CACHE_VARIABLES = (
    "CUDA_CACHE_PATH",
    "DG_JIT_CACHE_DIR",
    "FLASHINFER_WORKSPACE_BASE",
    "TILELANG_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "VLLM_CACHE_ROOT",
    "XDG_CACHE_HOME",
)


def caches_in(folder: Path) -> dict[str, str]:
    """The environment in which all that is compiled is kept there."""
    return {name: str(folder / name.lower()) for name in _CACHE_VARIABLES}


def start(options: argparse.Namespace) -> None:
    """The child: one start."""
    engine = TimedEngine(
        options,
        cache=options.cache,
        max_model_len=_MAX_MODEL_LEN,
        max_num_seqs=_MAX_NUM_SEQS,
        num_cached_tokens=_MAX_MODEL_LEN,
    )
    options.out.write_text(json.dumps(engine.first_answer_s))
    say_ready_and_wait()


def measure(options: argparse.Namespace) -> int:
    """The parent: 1 if a start took too long."""
    gpu = visible_gpus()[0]
    seconds = {}
    with tempfile.TemporaryDirectory(prefix="engine-start-") as name:
        folder = Path(name)
        model = given_or_reduced(options.model, folder)
        for index, which in enumerate(PASS_MARKS):
            out, log = folder / f"{index}.json", options.out.with_suffix(f".{index}.log")
            command = [__file__, "--child", "--model", str(model), "--out", str(out), *as_flags(options, _SETTINGS)]
            print(f"{which}: starting; log in {log}", flush=True)
            caches = caches_in(folder / "caches")
            child = Child.start(which, PLUGIN, gpu, command, log, options.timeout, caches)
            child.wait_until_ready()
            child.go()
            child.wait()
            seconds[which] = json.loads(out.read_text())
            print(f"{which}: first answer after {seconds[which]:.1f} s", flush=True)
    figures = figures_of(seconds)
    write_results(
        options.out,
        title="From start to first answer",
        system=local_system(REDUCED if options.model is None else model.name, engine_flags(options)),
        settings={name: getattr(options, name) for name in _SETTINGS} | {"max_num_seqs": _MAX_NUM_SEQS},
        figures=figures,
        notes=["The pass marks are goals of this project."],
    )
    return int(not passed(figures))


def figures_of(seconds: dict[str, float]) -> list[Figure]:
    """Seconds by which start it was, held to the marks."""
    return [
        Figure(f"first answer, {which}", value, unit="s", pass_mark=PASS_MARKS[which], higher_is_better=False)
        for which, value in seconds.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=json_path, required=True, metavar="FILE.json", help="and FILE.md")
    parser.add_argument("--cache", default="fp8", help="as --kv-cache-dtype (default: fp8)")
    add_engine_options(parser)
    add_child_options(parser)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        start(options)
        return 0
    return measure(options)


if __name__ == "__main__":
    sys.exit(main())
