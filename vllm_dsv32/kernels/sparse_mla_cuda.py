"""Operation ``sparse_mla`` for SM 90 in CUDA C++: bfloat16 queries, an fp8 cache or, from 33 heads on, either.

With an ``fp8_ds_mla`` cache a block attends a share of the keys of one token for 16 heads. The shares of a token
are the blocks of a cluster, which join their results in each other's shared memory: no launch for that, no
counters, the same sums every time. More heads are more blocks, each of which reads the rows; from 33 on they are
for other kernels, one for each format of the cache.
"""

from functools import cache

import torch

from vllm_dsv32.kernels import cuda_library, sparse_mla_cuda_wide
from vllm_dsv32.layout import KV_LORA_RANK, is_fp8_ds_mla

__all__ = ["HEADS", "KEYS", "MAX_HEADS", "SPLITS", "launches", "num_whole_tokens", "sparse_mla"]

HEADS = 16
"""Of a block."""
KEYS = 64
"""Of a tile."""
MAX_HEADS = 32
"""Beyond, blocks that read the same rows take longer than one that holds more heads: sparse_mla_cuda_wide."""
SPLITS = (1, 2, 3, 4, 5, 6, 8, 16)
"""Blocks of a cluster: kSplitCounts of csrc/sparse_mla_sm90.h. With powers of two alone, 16 or 32 clusters would
leave half of the processors idle. More than eight blocks need the GPU's leave, which SM 90 gives."""

_LOG2_E = 1.4426950408889634
_START_COST = 192
"""Of a block, in keys: waiting for its first slots and rows, and for its last products."""
_JOIN_COST = 64
"""Of a cluster, in keys: two barriers among its blocks, and reading each other's results."""
_LAUNCH_COST = 256
"""Of a second launch, in keys; part of it is that a last wave of few blocks takes less time than a full one."""


def sparse_mla(
    q: torch.Tensor,
    cache: torch.Tensor,
    topk_slot: torch.Tensor,
    num_valid: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`vllm_dsv32.kernels.sparse_mla.reference`.

    With a bfloat16 cache, weights are rounded to bfloat16. With an fp8 cache products are of float16, but for
    the rotary part. Queries are exact, but for those below ``2**-31`` of the greatest of their head: these are
    off by at most ``2**-39`` of it. A key's weight, times the scale of a group, is rounded to float16: to 11
    bits down to ``2**-26`` of the greatest such product of the head and the token's keys, to fewer below. With
    more than 32 heads that is its weight times a power of two near the greatest scale, and rows are rounded:
    :mod:`vllm_dsv32.kernels.sparse_mla_cuda_wide` says how. With either, an infinite query, a NaN in a row, and
    scores or scales beyond the range of float32 give NaN.

    Raises:
        ValueError: queries or a cache of another type, or a bfloat16 cache with up to 32 heads; or pages that are
            not aligned.
        RuntimeError: the library was not built.
    """
    num_tokens, num_heads, _ = q.shape
    if q.dtype != torch.bfloat16:
        raise ValueError(f"sparse_mla in CUDA takes queries in bfloat16, got {q.dtype}; choose triton")
    if not is_fp8_ds_mla(cache) and (cache.dtype != torch.bfloat16 or num_heads <= MAX_HEADS):
        raise ValueError(
            f"sparse_mla in CUDA takes a cache in fp8_ds_mla, or in bfloat16 with more than {MAX_HEADS} heads, "
            f"got {cache.dtype} with {num_heads}; choose gluon"
        )
    page_nbytes = cache.stride(0) * cache.element_size()
    if page_nbytes % 16:
        raise ValueError(f"latent cache: expected pages at multiples of 16 bytes, got one every {page_nbytes}")
    cuda_library.require()
    out = q.new_empty((num_tokens, num_heads, KV_LORA_RANK))
    lse = q.new_empty((num_tokens, num_heads), dtype=torch.float32)
    if num_tokens == 0:
        return out, lse
    q, topk_slot, scale_log2 = q.contiguous(), topk_slot.contiguous(), scale * _LOG2_E
    if num_heads > MAX_HEADS:
        sparse_mla_cuda_wide.attend(q, cache, topk_slot, num_valid, scale_log2, out, lse)
        return out, lse
    num_programs = -(-num_heads // HEADS)
    first = 0
    for count, num_splits in launches(num_tokens, num_programs, topk_slot.shape[1], _concurrency(q.device)):
        part = slice(first, first + count)
        torch.ops.vllm_dsv32.sparse_mla_fp8(
            q[part], cache, topk_slot[part], num_valid[part], scale_log2, num_splits, out[part], lse[part]
        )
        first += count
    return out, lse


def num_whole_tokens(q: torch.Tensor, num_keys: int) -> int:
    """Of queries of up to 16 heads, how many tokens are not split: the first ones. Others have another launch."""
    count, num_splits = launches(q.shape[0], 1, num_keys, _concurrency(q.device))[0]
    return count if num_splits == 1 else 0


@cache
def launches(
    num_tokens: int, num_programs: int, num_keys: int, concurrency: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """The tokens and the splits of each launch, so that all are over soonest.

    One launch, or two: as many tokens as every block can take alike, one after the other, then the rest in splits.
    In the same launch, these would keep a few blocks busy for as long as a whole token takes.

    Args:
        num_tokens: at least one.
        num_programs: of a token.
        num_keys: of a token, at most; the host knows no more.
        concurrency: clusters of each of SPLITS that the GPU runs at once; zero where it runs none.
    """
    cost, num_splits = _splits(num_tokens * num_programs, num_keys, concurrency)
    rest = num_tokens * num_programs % concurrency[0] // num_programs
    if 0 < rest < num_tokens:
        whole_cost, whole_splits = _splits((num_tokens - rest) * num_programs, num_keys, concurrency)
        rest_cost, rest_splits = _splits(rest * num_programs, num_keys, concurrency)
        if whole_cost + rest_cost + _LAUNCH_COST < cost:
            return (num_tokens - rest, whole_splits), (rest, rest_splits)
    return ((num_tokens, num_splits),)


def _splits(num_programs: int, num_keys: int, concurrency: tuple[int, ...]) -> tuple[int, int]:
    """How long a launch of so many clusters takes, in keys of a block, and into how many splits to divide each."""

    def cost(num_splits: int, num_concurrent: int) -> int:
        num_waves = -(-num_programs // num_concurrent)
        num_tiles = -(-num_keys // (num_splits * KEYS))
        if num_splits == 1:  # blocks that take one token after the other start once
            return num_waves * num_tiles * KEYS + _START_COST
        return num_waves * (num_tiles * KEYS + _START_COST + _JOIN_COST)

    return min(
        (cost(num_splits, num_concurrent), num_splits)
        for num_splits, num_concurrent in zip(SPLITS, concurrency, strict=True)
        if num_concurrent and (num_splits == 1 or num_splits * KEYS <= num_keys)
    )


@cache
def _concurrency(device: torch.device) -> tuple[int, ...]:
    """Clusters of each of SPLITS that the GPU runs at once: the processors of a cluster lie together."""
    with torch.cuda.device(device):
        return tuple(torch.ops.vllm_dsv32.sparse_mla_fp8_concurrency(splits) for splits in SPLITS)
