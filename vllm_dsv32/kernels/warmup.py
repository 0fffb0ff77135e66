"""Compiling, before the first request, what a batch's shape decides on."""

from collections.abc import Iterator, Sequence
from functools import cache

import torch

from vllm_dsv32.kernels.dispatch import KernelSet, Problem, select_kernels
from vllm_dsv32.kernels.index_insert import IndexKeys
from vllm_dsv32.kernels.index_query import IndexQueries
from vllm_dsv32.kernels.latent_insert import Latents
from vllm_dsv32.kernels.mla_query import MlaQueries
from vllm_dsv32.kernels.rope import RopeLayout
from vllm_dsv32.kernels.selection import LOGITS_NBYTES, select
from vllm_dsv32.layout import FP8_DS_MLA, INDEX_KEY_NBYTES, LATENT_FP8_NBYTES

__all__ = ["warm_up"]

_FEW_KEYS = 8
_SPLIT_TOKENS = 1024
"""From so many tokens on, attention fills any GPU without splits."""


@cache
def warm_up(
    problem: Problem,
    overrides: tuple[tuple[str, str], ...],
    block_size: int,
    max_num_keys: int,
    max_num_tokens: int,
    max_num_requests: int,
    nope_dim: int,
    index_rope_layout: RopeLayout,
) -> None:
    """Run what a batch's shape decides on once in each class of batch, on a page of zeros; once a process.

    The other operations are compiled by any step. Nothing is to be compiled off CUDA.

    Args:
        problem: of the layers.
        overrides: operation and name of an implementation, as the user insists on.
        block_size: of both caches.
        max_num_keys: of a token.
        max_num_tokens: of a step.
        max_num_requests: of a step.
        nope_dim: of queries, what is not rotated.
        index_rope_layout: of index keys and queries.
    """
    if problem.device_type != "cuda":
        return
    kernels = select_kernels(problem, dict(overrides))
    _describe(kernels, problem)
    for num_tokens in _doubling(max_num_tokens):
        _prepare(kernels, problem, block_size, num_tokens, nope_dim, index_rope_layout)
    for num_requests, num_tokens in _batches(max_num_tokens, max_num_requests):
        # Logits that fit the registers are held there, in sizes of a power of two; of other rows the longest
        # may have a kernel of their own.
        for width in sorted({min(max_num_keys, n * problem.topk) for n in (2, 4, 8)} | {max_num_keys}):
            num_rows = min(num_tokens, LOGITS_NBYTES // (4 * width) or 1)
            _select(kernels, problem, block_size, num_requests, num_rows, width)
    # Into how many splits keys are divided depends on the GPU and goes up and down with the tokens: try all.
    _attend(kernels, problem, block_size, [*range(1, min(max_num_tokens, _SPLIT_TOKENS) + 1), max_num_tokens])


def _batches(max_num_tokens: int, max_num_requests: int) -> Iterator[tuple[int, int]]:
    """Requests and tokens: decode, and prefill or speculative decode."""
    for num_tokens in _doubling(max_num_tokens):
        if num_tokens <= max_num_requests:
            yield num_tokens, num_tokens
        yield 1, num_tokens


def _doubling(end: int) -> Iterator[int]:
    """1, 2, 4, ... and ``end``."""
    number = 1
    while number < end:
        yield number
        number *= 2
    yield end


def _describe(kernels: KernelSet, problem: Problem) -> None:
    """Of one request; any batch has the same kernel."""
    device = torch.device(problem.device_type)
    request = torch.ones(1, dtype=torch.int32, device=device)
    # As in a batch's buffer, each begins at a multiple of 16 bytes.
    per_token = torch.empty((4, 4), dtype=torch.int32, device=device)[:, :1]
    kernels.token_keys(torch.arange(2, dtype=torch.int32, device=device), request, problem.topk, *per_token)


def _prepare(
    kernels: KernelSet,
    problem: Problem,
    block_size: int,
    num_tokens: int,
    nope_dim: int,
    index_rope_layout: RopeLayout,
) -> None:
    """Of padding, which is written to neither cache."""
    device = torch.device(problem.device_type)

    def zeros(*shape: int, dtype: torch.dtype = problem.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def float32(*shape: int) -> torch.Tensor:
        return zeros(*shape, dtype=torch.float32)

    padding = torch.full((num_tokens,), -1, dtype=torch.int64, device=device)
    rank, rope, index_dim = problem.kv_lora_rank, problem.rope_dim, problem.index_head_dim
    kernels.keys_and_queries(
        torch.zeros_like(padding),
        float32(1, rope),
        index_rope_layout,
        Latents(
            zeros(num_tokens, rank),
            zeros(num_tokens, rope),
            zeros(rank),
            1.0,
            padding,
            _latent_page(problem, block_size),
        ),
        IndexKeys(
            float32(num_tokens, index_dim),
            float32(index_dim),
            float32(index_dim),
            1.0,
            padding,
            _index_page(block_size, device),
        ),
        IndexQueries(
            zeros(num_tokens, problem.num_index_heads, index_dim), float32(num_tokens, problem.num_index_heads)
        ),
        MlaQueries(zeros(num_tokens, problem.num_heads, nope_dim + rope), zeros(problem.num_heads, nope_dim, rank)),
    )


def _select(
    kernels: KernelSet, problem: Problem, block_size: int, num_requests: int, num_tokens: int, width: int
) -> None:
    device = torch.device(problem.device_type)
    scored = min(width, problem.topk + 1)
    per_token = torch.full((num_tokens,), scored, dtype=torch.int32, device=device)
    block_table = torch.zeros((num_requests, -(-width // block_size)), dtype=torch.int32, device=device)
    select(
        kernels,
        torch.zeros((num_tokens, problem.num_index_heads, problem.index_head_dim), device=device).to(
            torch.float8_e4m3fn
        ),
        # vLLM loads models with their dtype as the default.
        torch.zeros((num_tokens, problem.num_index_heads), dtype=torch.float32, device=device),
        _index_page(block_size, device),
        block_table,
        torch.zeros_like(per_token),
        per_token,
        per_token,
        width,
        block_table,
        block_size,
        torch.empty((num_tokens, problem.topk), dtype=torch.int32, device=device),
    )


def _attend(kernels: KernelSet, problem: Problem, block_size: int, batches: Sequence[int]) -> None:
    """Once for each number of tokens."""
    device = torch.device(problem.device_type)
    most = max(batches)
    row = problem.kv_lora_rank + problem.rope_dim
    q = torch.zeros((most, problem.num_heads, row), dtype=problem.dtype, device=device)
    cache = _latent_page(problem, block_size)
    topk_slot = torch.zeros((most, problem.topk), dtype=torch.int32, device=device)
    num_valid = torch.full((most,), _FEW_KEYS, dtype=torch.int32, device=device)
    for num_tokens in batches:
        tokens = slice(num_tokens)
        kernels.sparse_mla(q[tokens], cache, topk_slot[tokens], num_valid[tokens], 1.0)


def _latent_page(problem: Problem, block_size: int) -> torch.Tensor:
    fp8 = problem.cache_format == FP8_DS_MLA
    row = LATENT_FP8_NBYTES if fp8 else problem.kv_lora_rank + problem.rope_dim
    dtype = torch.uint8 if fp8 else problem.dtype
    return torch.zeros((1, block_size, row), dtype=dtype, device=problem.device_type)


def _index_page(block_size: int, device: torch.device) -> torch.Tensor:
    return torch.zeros((1, block_size, INDEX_KEY_NBYTES), dtype=torch.uint8, device=device)
