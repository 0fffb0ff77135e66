"""The kernel of ``sparse_mla`` in CUDA C++ for more than 32 heads and a cache in bfloat16.

A block attends all keys of one token, or a split of them, for 64 heads, with products of warpgroups that read rows
as the cache has them. Splits, of steps with few tokens, are joined by a second launch, in Triton.
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
        cache: in bfloat16, its pages at multiples of 16 bytes.
        topk_slot: int32 ``[T, K]``, contiguous.
        num_valid: int32 ``[T]``.
        scale_log2: of the scores, times log2(e).
        out: bfloat16 ``[T, N, 512]``.
        lse: float32 ``[T, N]``, natural.
    """
    num_tokens, num_heads, _ = q.shape
    num_programs = num_tokens * ceil_div(num_heads, HEADS)
    num_splits = split_count(num_programs, topk_slot.shape[1], num_multiprocessors(q.device), KEYS)
    operator = torch.ops.vllm_dsv32.sparse_mla_bf16_wide
    attend_in_splits(operator, num_splits, q, cache, topk_slot, num_valid, scale_log2, out, lse)
