"""vLLM's engine in this process, over small checkpoints, with raw logits out."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


@dataclass
class Completion:
    """What the engine made of one prompt."""

    prompt: list[int]
    generated: list[int]
    prompt_logits: torch.Tensor | None
    """``[len(prompt) - 1, vocabulary]``: after each token of the prompt but the last."""
    generated_logits: torch.Tensor
    """``[len(generated), vocabulary]``: those that each generated token was taken from."""

    @property
    def token_ids(self) -> list[int]:
        return self.prompt + self.generated

    def logits(self) -> torch.Tensor:
        """After each token but the last, ``[len(token_ids) - 1, vocabulary]``."""
        parts = [] if self.prompt_logits is None else [self.prompt_logits]
        return torch.cat([*parts, self.generated_logits])


@contextmanager
def engine(path: Path, **options) -> Iterator[LLM]:
    """An in-process engine whose logprobs are raw logits of the whole vocabulary."""
    defaults = dict(
        dtype="float32",
        max_model_len=512,
        max_num_batched_tokens=512,
        max_num_seqs=16,
        skip_tokenizer_init=True,
        enforce_eager=True,
        logprobs_mode="raw_logits",
        max_logprobs=-1,
        disable_log_stats=True,
    )
    llm = LLM(str(path), **(defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def complete(
    llm: LLM, prompts: list[list[int]], num_tokens: int, *, prompt_logits: bool = True
) -> list[Completion]:
    """Greedy completions of token-id prompts, in one batch, with the logits behind them."""
    params = SamplingParams(
        max_tokens=num_tokens,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        logprobs=-1,
        prompt_logprobs=-1 if prompt_logits else None,
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [
        Completion(
            prompt=prompt,
            generated=list(output.outputs[0].token_ids),
            prompt_logits=_table(output.prompt_logprobs[1:]) if output.prompt_logprobs else None,
            generated_logits=_table(output.outputs[0].logprobs),
        )
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def _table(rows) -> torch.Tensor:
    table = torch.full((len(rows), max((max(row) for row in rows), default=0) + 1), torch.nan)
    for index, row in enumerate(rows):
        for token, entry in row.items():
            table[index, token] = entry.logprob
    return table
