"""The kernel of ``sparse_mla`` in CUDA C++ for more than 32 heads, with products of warpgroups.

A block attends all keys of one token, or a split of them, for 64 heads. It decodes rows to float16, without their
scales. Splits, of steps with few tokens, are joined by a second launch, in Triton.
"""

import torch

from vllm_dsv32.kernels import triton_device
from vllm_dsv32.kernels.sparse_mla_join_triton import join_splits, split_count

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
        cache: in fp8_ds_mla, its pages at multiples of 16 bytes.
        topk_slot: int32 ``[T, K]``, contiguous.
        num_valid: int32 ``[T]``.
        scale_log2: of the scores, times log2(e).
        out: bfloat16 ``[T, N, 512]``.
        lse: float32 ``[T, N]``, natural.
    """
    num_tokens, num_heads, _ = q.shape
    num_programs = num_tokens * -(-num_heads // HEADS)
    num_splits = split_count(num_programs, topk_slot.shape[1], triton_device.num_multiprocessors(q.device), KEYS)
    part_out, part_lse = out, lse
    if num_splits > 1:
        part_out = q.new_empty((num_tokens, num_splits, *out.shape[1:]), dtype=torch.float32)
        part_lse = q.new_empty((num_tokens, num_splits, num_heads), dtype=torch.float32)
    torch.ops.vllm_dsv32.sparse_mla_fp8_wide(
        q, cache, topk_slot, num_valid, scale_log2, num_splits, part_out, part_lse
    )
    if num_splits > 1:
        join_splits(part_out, part_lse, num_valid, KEYS, out, lse)
