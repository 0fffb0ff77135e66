"""The kernels of ``sparse_mla`` in CUDA C++ for more than 32 heads, with products of warpgroups.

A block attends all keys of one token, or a split of them, for 64 heads. Splits, of steps with few tokens, are
joined by a second launch, in Triton. Rows of a bfloat16 cache are multiplied as they are. Those of an fp8 cache
are decoded to float16 first: two blocks that attend the same keys are a cluster, and decode half of them each.

Latents of an fp8 row are held relative to a power of two that takes the greatest of its four scales to between 16
and 32. A scale becomes float16, and so does its product with a code: each is off by at most ``2**-11`` of
itself. Scales below ``2**-18`` of the row's greatest one, and latents below ``2**-18`` of it, have fewer
bits.
"""

import torch

from vllm_dsv32.kernels.sparse_mla_join_triton import join_splits, split_count
from vllm_dsv32.kernels.triton_device import ceil_div, num_multiprocessors
from vllm_dsv32.layout import is_fp8_ds_mla

__all__ = ["HEADS", "KEYS", "attend"]

HEADS = 64
"""Of a block."""
KEYS = 64
"""Of a tile."""


def attend(
    q: torch.Tensor,
    cache: torch.Tensor,
    topk_slot: torch.Tensor,
    num_valid: torch.Tensor,
    scale_log2: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Write the attention of at least one token.

    Args:
        q: bfloat16 ``[T, N, 576]``, contiguous.
        cache: in fp8_ds_mla or in bfloat16, its pages at multiples of 16 bytes.
        topk_slot: int32 ``[T, K]``, contiguous.
        num_valid: int32 ``[T]``.
        scale_log2: of the scores, times log2(e).
        out: bfloat16 ``[T, N, 512]``.
        lse: float32 ``[T, N]``, natural.
    """
    num_tokens, num_heads, _ = q.shape
    is_fp8 = is_fp8_ds_mla(cache)
    operator = torch.ops.vllm_dsv32.sparse_mla_fp8_wide if is_fp8 else torch.ops.vllm_dsv32.sparse_mla_bf16_wide
    num_head_tiles = ceil_div(num_heads, HEADS)
    num_blocks = 2 if is_fp8 and num_head_tiles % 2 == 0 else 1  # of a cluster
    num_programs = num_tokens * num_head_tiles // num_blocks
    num_concurrent = max(1, num_multiprocessors(q.device) // num_blocks)
    num_splits = split_count(num_programs, topk_slot.shape[1], num_concurrent, KEYS)
    part_out, part_lse = out, lse
    if num_splits > 1:
        part_out = q.new_empty((num_tokens, num_splits, *out.shape[1:]), dtype=torch.float32)
        part_lse = q.new_empty((num_tokens, num_splits, num_heads), dtype=torch.float32)
    operator(q, cache, topk_slot, num_valid, scale_log2, num_splits, part_out, part_lse)
    if num_splits > 1:
        join_splits(part_out, part_lse, num_valid, KEYS, out, lse)
