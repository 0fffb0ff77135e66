"""vLLM's engine with dummy weights, and how long prefill and decode take in it.

A child process makes one ``TimedEngine``, in which each script times its own shapes.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

__all__ = [
    "ENGINE_OPTIONS",
    "Rows",
    "TimedEngine",
    "Timing",
    "add_engine_options",
    "as_flags",
    "check_cached",
    "engine_flags",
    "num_calls",
]

Rows = list[list[int]]
"""Token ids of the prompts of one call."""

_NBYTES_A_TOKEN = 2048
"""Of a layer's two caches, with room to spare: bfloat16 takes 1284, fp8 788. In float32 it is twice as much."""
_PROFILED_STEPS = 32
"""Of decode: reading a profile takes longer than the steps."""
_ENOUGH_TOKENS = 400_000
"""Of all timed prefill calls of one shape."""

ENGINE_OPTIONS = ("dtype", "step_tokens", "new_tokens", "repeats", "linear_backend")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add what every script that times an engine takes: --model and :data:`ENGINE_OPTIONS`."""
    group = parser.add_argument_group("the engine, on both sides")
    group.add_argument("--model", type=Path, help="a folder with a config.json (default: the reduced model)")
    group.add_argument("--dtype", default="auto", help="as vLLM's --dtype")
    group.add_argument("--step-tokens", type=_positive, default=8192, help="of a prefill step (default: 8192)")
    group.add_argument("--new-tokens", type=_positive, default=256, help="decode steps of a call (default: 256)")
    group.add_argument(
        "--repeats", type=_positive, default=5, help="timed calls, of long prefills fewer, down to 2 (default: 5)"
    )
    group.add_argument("--linear-backend", default="auto", help="as vLLM's; some compile for minutes")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {number}")
    return number


def as_flags(options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Options as a command line for a child."""
    flags = []
    for name in names:
        value = getattr(options, name)
        flags += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return flags


def engine_flags(options: argparse.Namespace) -> str:
    """What was set on the engine, as flags of vLLM's; for the results."""
    return (
        f"--load-format dummy --dtype {options.dtype} --linear-backend {options.linear_backend} "
        f"--max-num-batched-tokens {options.step_tokens} --enable-prefix-caching"
    )


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of the same work."""

    seconds: float
    """The one that counts."""
    lowest: float
    highest: float
    num_calls: int

    @classmethod
    def of(cls, counts: float, measured: Sequence[float]) -> "Timing":
        """What counts, and the range of what was measured."""
        return cls(counts, min(measured), max(measured), len(measured))


def num_calls(num_tokens: int, repeats: int) -> int:
    """How often a prefill of so many tokens is timed: ``repeats`` times, but not for long; at least twice."""
    return min(repeats, max(2, _ENOUGH_TOKENS // num_tokens))


class TimedEngine:
    """vLLM's LLM class in this process, ready: it has answered once.

    Args:
        options: of ``add_engine_options``.
        cache: as --kv-cache-dtype.
        max_model_len: the longest prompt and its answer.
        max_num_seqs: prompts at once, at most.
        num_cached_tokens: that the cache must hold at once.
    """

    first_answer_s: float
    """From before the import of vLLM to the first token."""

    def __init__(
        self,
        options: argparse.Namespace,
        *,
        cache: str,
        max_model_len: int,
        max_num_seqs: int,
        num_cached_tokens: int,
    ) -> None:
        begin = time.monotonic()
        import torch
        from vllm import LLM, SamplingParams

        config = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
        nbytes = config["num_hidden_layers"] * (num_cached_tokens + max_model_len) * _NBYTES_A_TOKEN
        nbytes *= 2 if options.dtype == "float32" else 1
        self._llm = LLM(
            str(options.model),
            load_format="dummy",
            dtype=options.dtype,
            skip_tokenizer_init=True,
            kv_cache_dtype=cache,
            max_model_len=max_model_len,
            max_num_batched_tokens=options.step_tokens,
            max_num_seqs=max_num_seqs,
            # In bytes, whatever else is on the GPU; vLLM still asks whether the share is free.
            kv_cache_memory_bytes=nbytes,
            gpu_memory_utilization=0.1,
            enable_prefix_caching=True,
            linear_backend=options.linear_backend,
        )
        self._step_tokens, self._num_steps = options.step_tokens, options.new_tokens
        self._repeats = options.repeats
        self._vocabulary = config["vocab_size"]
        self._generator = torch.Generator().manual_seed(0)
        self._params = partial(SamplingParams, temperature=0, ignore_eos=True, detokenize=False)
        self._one, self._many = (self._params(max_tokens=num) for num in (1, self._num_steps + 1))
        self._seconds(self.fresh(1, min(100, max_model_len - 1)), self._one)
        self.first_answer_s = time.monotonic() - begin

    def fresh(self, num: int, length: int) -> Rows:
        """Prompts of random tokens, which the prefix cache cannot know."""
        import torch

        return torch.randint(2, self._vocabulary, (num, length), generator=self._generator).tolist()

    def time_prefill(self, num: int, length: int) -> tuple[Timing, Rows]:
        """Seconds of a call that takes fresh prompts and answers with a token each; the lowest counts.

        A call that is not timed comes first, for what this shape still compiles. Where calls are long there is
        none: of two that are timed, the second finds everything compiled.

        Returns:
            Also the prompts of the last call, which the prefix cache holds now.
        """
        if num * length <= _ENOUGH_TOKENS:
            self._seconds(self.fresh(num, length), self._one)
        times = []
        for _ in range(num_calls(num * length, self._repeats)):
            rows = self.fresh(num, length)
            times.append(self._seconds(rows, self._one))
        return Timing.of(min(times), times), rows

    def time_decode(self, rows: Rows) -> Timing:
        """Seconds of a step in which each prompt gets a token; the fastest calls count.

        Prompts that the prefix cache holds are answered with many tokens, then with one: the difference is the time
        of the steps. Of either kind the fastest call is taken, as in prefill: what else a host does adds time to
        some calls, up to half of it was seen, and takes it from none.

        Raises:
            RuntimeError: the prefix cache does not hold the prompts.
        """
        self._run(rows, self._many)
        check_cached(self._run(rows, self._one), self._step_tokens)
        pairs = [(self._seconds(rows, self._many), self._seconds(rows, self._one)) for _ in range(self._repeats)]
        fastest = min(many for many, _ in pairs) - min(one for _, one in pairs)
        return Timing.of(fastest / self._num_steps, [(many - one) / self._num_steps for many, one in pairs])

    def profile_decode(self, rows: Rows) -> dict[str, tuple[float, float]]:
        """By kernel, microseconds on the GPU and launches of a step in which each prompt gets a token.

        Profiled are a call with some steps and one without: the difference is theirs. On a CPU there is nothing.

        Raises:
            RuntimeError: the prefix cache does not hold the prompts.
        """
        from gpu_profile import launches_of

        self._run(rows, self._many)
        check_cached(self._run(rows, self._one), self._step_tokens)
        some = self._params(max_tokens=_PROFILED_STEPS + 1)
        sums: dict[str, list[float]] = {}
        for params, sign in ((some, 1), (self._one, -1)):
            for name, us in launches_of(partial(self._run, rows, params)):
                of_kernel = sums.setdefault(name, [0.0, 0.0])
                of_kernel[0] += sign * us / _PROFILED_STEPS
                of_kernel[1] += sign / _PROFILED_STEPS
        return {name: (us, count) for name, (us, count) in sums.items()}

    def _seconds(self, rows: Rows, params: Any) -> float:
        prompts = [{"prompt_token_ids": row} for row in rows]
        begin = time.monotonic()
        self._llm.generate(prompts, params, use_tqdm=False)
        return time.monotonic() - begin

    def _run(self, rows: Rows, params: Any) -> list[Any]:
        return self._llm.generate([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False)


def check_cached(outputs: Sequence[Any], step_tokens: int) -> None:
    """What is left of the prompts must fit one step, or some sequences would decode before others.

    Args:
        outputs: vLLM's, of prompts that the prefix cache should hold.
        step_tokens: that a step takes.

    Raises:
        RuntimeError: it holds too little of them.
    """
    left = sum(len(output.prompt_token_ids) - (output.num_cached_tokens or 0) for output in outputs)
    if left > step_tokens:
        raise RuntimeError(
            f"the prefix cache should hold {len(outputs)} prompts of {len(outputs[0].prompt_token_ids)} tokens: "
            f"{left} are missing, and a step takes {step_tokens}. Give fewer sequences"
        )
