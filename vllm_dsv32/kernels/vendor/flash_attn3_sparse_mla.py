"""Operation ``sparse_mla`` over the bfloat16 cache by the FlashAttention 3 that vLLM ships."""

import torch
from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

from vllm_dsv32.layout import KV_LORA_RANK

__all__ = ["sparse_mla"]


def sparse_mla(
    q: torch.Tensor,
    cache: torch.Tensor,
    topk_slot: torch.Tensor,
    num_valid: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`vllm_dsv32.kernels.sparse_mla.reference`.

    As in vLLM, a slot is a page of one row and a list of slots a request's block table.

    Raises:
        ValueError: the cache's blocks are not whole rows apart.
    """
    num_tokens, num_heads, _ = q.shape
    if num_tokens == 0:
        return q.new_empty((0, num_heads, KV_LORA_RANK)), q.new_empty((0, num_heads), dtype=torch.float32)
    rows, pages = _rows(cache, topk_slot)
    out, lse = flash_attn_varlen_func(
        q=q[..., KV_LORA_RANK:],
        k=rows[:, None, None, KV_LORA_RANK:],
        v=rows[:, None, None, :KV_LORA_RANK],
        q_v=q[..., :KV_LORA_RANK],
        max_seqlen_q=1,
        cu_seqlens_q=torch.arange(num_tokens + 1, dtype=torch.int32, device=q.device),
        max_seqlen_k=topk_slot.shape[1],
        seqused_k=num_valid,
        block_table=pages,
        softmax_scale=scale,
        causal=True,
        return_softmax_lse=True,
        fa_version=3,
    )
    empty = (num_valid == 0).unsqueeze(1)
    return out.masked_fill(empty.unsqueeze(2), 0.0), lse.T.masked_fill(empty, -torch.inf)


def _rows(cache: torch.Tensor, topk_slot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cache as ``[num_rows, 576]``, gaps between blocks included, and the rows that the slots are in it."""
    num_blocks, block_size, width = cache.shape
    if cache.stride(0) % width:
        raise ValueError(
            "sparse_mla by flash_attn3: expected a cache whose blocks are whole rows apart, "
            f"got rows of {width} and strides {cache.stride()}; use another implementation"
        )
    block_stride = cache.stride(0) // width
    rows = cache.as_strided(((num_blocks - 1) * block_stride + block_size, width), (width, 1))
    if block_stride == block_size:
        return rows, topk_slot
    return rows, topk_slot // block_size * block_stride + topk_slot % block_size
