"""The kernel of ``sparse_mla`` in CUDA C++ for more than 32 heads and an fp8 cache, with products of warpgroups.

A block attends all keys of one token, or a split of them, for 64 heads. It decodes rows to float16. Two blocks that
attend the same keys are a cluster, and decode half of them each. Splits, of steps with few tokens, are joined by a
second launch, in Triton.

Latents of a row are held relative to a power of two that takes the greatest of its four scales to between 16
and 32. A scale becomes float16, and so does its product with a code: each is off by at most ``2**-11`` of
itself. Scales below ``2**-18`` of the row's greatest one, and latents below ``2**-18`` of it, have fewer
bits.
"""

import torch

from vllm_dsv32.kernels.sparse_mla_cuda_splits import HEADS, KEYS, attend_in_splits
from vllm_dsv32.kernels.sparse_mla_join_triton import split_count
from vllm_dsv32.kernels.triton_device import ceil_div, num_multiprocessors

__all__ = ["attend"]


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
        cache: in fp8_ds_mla, its pages at multiples of 16 bytes.
        topk_slot: int32 ``[T, K]``, contiguous.
        num_valid: int32 ``[T]``.
        scale_log2: of the scores, times log2(e).
        out: bfloat16 ``[T, N, 512]``.
        lse: float32 ``[T, N]``, natural.
    """
    num_tokens, num_heads, _ = q.shape
    num_head_tiles = ceil_div(num_heads, HEADS)
    num_blocks = 2 if num_head_tiles % 2 == 0 else 1  # of a cluster
    num_programs = num_tokens * num_head_tiles // num_blocks
    num_concurrent = max(1, num_multiprocessors(q.device) // num_blocks)
    num_splits = split_count(num_programs, topk_slot.shape[1], num_concurrent, KEYS)
    operator = torch.ops.vllm_dsv32.sparse_mla_fp8_wide
    attend_in_splits(operator, num_splits, q, cache, topk_slot, num_valid, scale_log2, out, lse)
