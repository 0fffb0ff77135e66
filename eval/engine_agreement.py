"""Whether the engine with the plugin computes what it computes with vLLM's own implementation of DeepSeek-V3.2.

    PYTHONPATH=eval python eval/engine_agreement.py --out FILE.json [--model DIR] [--contexts 1024 8192 65536]

Both sides load the same checkpoint (by default random weights of the published widths in the published fp8 format)
and take the same prompts. Compared are the distributions behind the last token of each prompt, and of the prompt
with one more token, which finds the rest in the prefix cache: divergence, and how often both rank the same token
first. As a yardstick, the two caches of each side are compared with each other, which differ by quantisation only.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from engine_runs.reduced_model import write_random_checkpoint
from engine_runs.sides import IN_TREE, PLUGIN, Child, say_ready_and_wait, visible_gpus

_NUM_PROMPTS = {1024: 24, 8192: 12}
_NUM_LONGER_PROMPTS = 4
_CACHES = ("auto", "fp8")
_CACHE_NBYTES = 5 << 30
"""Room for the prompts, whatever else is on the GPU."""


def record(arguments: argparse.Namespace) -> int:
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
    torch.save(recorded, arguments.out)
    return 0


def difference(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """How ``[n, vocabulary]`` log-probabilities differ."""
    divergence = (a.exp() * (a - b).nan_to_num()).sum(-1)
    return {
        "mean_kl": divergence.mean().item(),
        "worst_kl": divergence.max().item(),
        "median_logprob_difference": statistics.median((a - b).abs().nan_to_num().flatten().tolist()),
        "top1_agreement": (a.argmax(-1) == b.argmax(-1)).double().mean().item(),
    }


def compare(arguments: argparse.Namespace) -> int:
    """The parent: all runs, then the table of those that did not fail; 1 if one did."""
    folder = Path(tempfile.mkdtemp(prefix="engine-agreement-"))
    model = arguments.model
    if model is None:
        model = folder / "model"
        write_random_checkpoint(model)
    runs = [(side, cache, drafts) for side in (PLUGIN, IN_TREE) for cache in _CACHES for drafts in (False, True)]
    gpus = visible_gpus()
    results: dict[tuple[str, str, bool], dict[int, torch.Tensor]] = {}
    for begin in range(0, len(runs), len(gpus)):
        children = []
        for gpu, run in zip(gpus, runs[begin : begin + len(gpus)], strict=False):
            side, cache, drafts = run
            path = folder / f"{side}-{cache}{'-mtp' if drafts else ''}"
            command = [__file__, "--child", "--model", str(model), "--cache", cache, "--out", f"{path}.pt"]
            command += ["--contexts", *map(str, arguments.contexts), *(["--drafts"] if drafts else [])]
            children.append((run, path, Child.start(path.name, side, gpu, command, Path(f"{path}.log"))))
        for run, path, child in children:
            try:
                child.wait_until_ready()
                child.go()
                child.wait()
                results[run] = torch.load(f"{path}.pt")
            except RuntimeError as error:
                print(error, f"({path}.log)")
    table: list[dict[str, Any]] = []
    pairs = [((PLUGIN, c, d), (IN_TREE, c, d)) for c in _CACHES for d in (False, True)]
    pairs += [
        ((PLUGIN, "auto", False), (PLUGIN, "fp8", False)),
        ((IN_TREE, "auto", False), (IN_TREE, "fp8", False)),
    ]
    for one, other in pairs:
        for length in arguments.contexts if one in results and other in results else ():
            found = difference(results[one][length], results[other][length])
            names = [f"{side} {cache}{' mtp' if drafts else ''}" for side, cache, drafts in (one, other)]
            table.append({"sides": names, "context": length, **found})
            print(
                f"{names[0]:<16} {names[1]:<16} {length:>6}  KL {found['mean_kl']:.1e}, at worst"
                f" {found['worst_kl']:.1e}; logprobs differ by {found['median_logprob_difference']:.1e};"
                f" same first token {found['top1_agreement']:.1%}"
            )
    arguments.out.write_text(json.dumps(table, indent=1))
    return int(len(results) < len(runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a checkpoint (default: one with random weights is written)")
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192, 65536])
    for name in ("--child", "--drafts"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cache", default="auto", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.exit((record if arguments.child else compare)(arguments))


if __name__ == "__main__":
    main()
