"""Launches of the CUDA C++ kernels of ``sparse_mla`` for more than 32 heads, whole or in splits."""

import torch

from vllm_dsv32.kernels.sparse_mla_join_triton import join_splits

__all__ = ["HEADS", "KEYS", "attend_in_splits"]

HEADS = 64
"""Of a block."""
KEYS = 64
"""Of a tile."""


def attend_in_splits(
    operator: torch._ops.OpOverloadPacket,
    num_splits: int,
    q: torch.Tensor,
    cache: torch.Tensor,
    topk_slot: torch.Tensor,
    num_valid: torch.Tensor,
    scale_log2: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Write the attention of at least one token; a second launch, in Triton, joins splits.

    Args:
        operator: of the library.
        num_splits: of the keys of each token.
        q: bfloat16 ``[T, N, 576]``, contiguous.
        cache: of the operator's format, its pages at multiples of 16 bytes.
        topk_slot: int32 ``[T, K]``, contiguous.
        num_valid: int32 ``[T]``.
        scale_log2: of the scores, times log2(e).
        out: bfloat16 ``[T, N, 512]``.
        lse: float32 ``[T, N]``, natural.
    """
    if num_splits == 1:
        operator(q, cache, topk_slot, num_valid, scale_log2, 1, out, lse)
        return
    num_tokens, num_heads, _ = q.shape
    part_out = q.new_empty((num_tokens, num_splits, *out.shape[1:]), dtype=torch.float32)
    part_lse = q.new_empty((num_tokens, num_splits, num_heads), dtype=torch.float32)
    operator(q, cache, topk_slot, num_valid, scale_log2, num_splits, part_out, part_lse)
    join_splits(part_out, part_lse, num_valid, KEYS, out, lse)
