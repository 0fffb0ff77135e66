"""vLLM's engine in this process, over small checkpoints, with raw logits out."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from vllm import SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

from vllm_dsv32.attention.sparse_attention import SparseAttention

CUDA_GRAPHS = False
"""Set by the option --cuda-graphs."""


@dataclass
class Completion:
    """What the engine made of one prompt."""

    prompt: list[int]
    generated: list[int]
    num_cached_tokens: int
    """Of the prompt, found in the prefix cache."""
    prompt_logits: torch.Tensor | None
    """``[len(prompt) - 1, vocabulary]``: after each token of the prompt but the last."""
    generated_logits: torch.Tensor
    """``[len(generated), vocabulary]``: those that each generated token was taken from."""

    @property
    def token_ids(self) -> list[int]:
        return self.prompt + self.generated

    def logits(self) -> torch.Tensor:
        """The logits after each token but the last; only after those behind the prompt, if that is all there is."""
        parts = [] if self.prompt_logits is None else [self.prompt_logits]
        return torch.cat([*parts, self.generated_logits])


@contextmanager
def engine(
    path: Path, *, chunked: bool = True, prefix_caching: bool = False, block_size: int | None = None, **options
) -> Iterator[LLMEngine]:
    """An engine whose logprobs are the raw logits of the whole vocabulary.

    With the option --cuda-graphs it captures graphs, unless the test asks for ``enforce_eager``.

    On a CPU without AMX, vLLM turns chunked prefill and prefix caching off and forces blocks of 16 for every
    model with a latent cache, because its own attention for them asks for that. Ours does not, so what the
    test wants is set again here: scheduler, cache manager and layers are the same everywhere.
    """
    defaults = {
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 16,
        "skip_tokenizer_init": True,
        "enforce_eager": not CUDA_GRAPHS,
        "logprobs_mode": "raw_logits",
        "max_logprobs": -1,
        "disable_log_stats": True,
    }
    if torch.cuda.is_available():  # several fit a GPU: vLLM takes so much, and asks whether the share is free
        defaults |= {"kv_cache_memory_bytes": 256 << 20, "gpu_memory_utilization": 0.01}
    arguments = EngineArgs(model=str(path), **(defaults | options))
    config = arguments.create_engine_config()
    config.scheduler_config.enable_chunked_prefill = chunked
    config.cache_config.enable_prefix_caching = prefix_caching
    config.cache_config.block_size = block_size or (64 if torch.cuda.is_available() else 16)
    config.cache_config.user_specified_block_size = True
    llm = None
    try:
        llm = LLMEngine.from_vllm_config(config, disable_log_stats=arguments.disable_log_stats)
        yield llm
    finally:
        if llm is not None:
            llm.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def complete(
    llm: LLMEngine, prompts: list[list[int]], num_tokens: int, *, prompt_logits: bool = True
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
    for index, prompt in enumerate(prompts):
        llm.add_request(str(index), {"prompt_token_ids": prompt}, params)
    outputs = {}
    while llm.has_unfinished_requests():
        outputs |= {output.request_id: output for output in llm.step() if output.finished}
    return [_completion(prompt, outputs[str(index)]) for index, prompt in enumerate(prompts)]


def _completion(prompt: list[int], output) -> Completion:
    return Completion(
        prompt=prompt,
        generated=list(output.outputs[0].token_ids),
        num_cached_tokens=output.num_cached_tokens or 0,
        prompt_logits=_table(output.prompt_logprobs[1:]) if output.prompt_logprobs else None,
        generated_logits=_table(output.outputs[0].logprobs),
    )


def _table(rows) -> torch.Tensor:
    """Rows of {token: Logprob} as a dense matrix."""
    vocabulary = max(max(row) for row in rows) + 1 if rows else 0
    table = torch.full((len(rows), vocabulary), torch.nan)
    for index, row in enumerate(rows):
        tokens = torch.tensor(list(row))
        table[index, tokens] = torch.tensor([entry.logprob for entry in row.values()])
    return table


def attention_layers(llm: LLMEngine) -> list[SparseAttention]:
    """The sparse-attention layers of the main model."""

    def collect(model: torch.nn.Module) -> list[SparseAttention]:
        return [module for module in model.modules() if isinstance(module, SparseAttention)]

    (layers,) = llm.apply_model(collect)
    return layers


@contextmanager
def kernels_replaced(llm: LLMEngine, **replacements: Callable) -> Iterator[None]:
    """Other implementations of some operations, in every layer: ``name=lambda original: replacement``."""
    attention = attention_layers(llm)
    originals = [layer.kernels for layer in attention]
    for layer in attention:
        changed = {name: make(getattr(layer.kernels, name)) for name, make in replacements.items()}
        layer.kernels = replace(layer.kernels, **changed)
    try:
        yield
    finally:
        for layer, original in zip(attention, originals, strict=True):
            layer.kernels = original
