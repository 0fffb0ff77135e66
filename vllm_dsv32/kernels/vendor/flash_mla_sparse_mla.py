"""Operation ``sparse_mla`` over the fp8 cache by the FlashMLA that vLLM ships."""

import torch
from vllm.v1.attention.ops import flashmla  # noqa: F401  registers torch.ops._flashmla_C

from vllm_dsv32.layout import KV_LORA_RANK

__all__ = ["sparse_mla"]

_PAGE_SIZE = 64
_HEADS = (64, 128)


def sparse_mla(
    q: torch.Tensor,
    cache: torch.Tensor,
    topk_slot: torch.Tensor,
    num_valid: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`vllm_dsv32.kernels.sparse_mla.reference`.

    As in vLLM, all tokens are one request, fewer heads are padded to 64 or 128, and the whole list of slots is
    read whatever its length: -1 masks a slot.

    Raises:
        ValueError: the cache's blocks are no multiple of 64 tokens, or larger than that and not dense.
    """
    num_tokens, num_heads, width = q.shape
    if num_tokens == 0:
        return q.new_empty((0, num_heads, KV_LORA_RANK)), q.new_empty((0, num_heads), dtype=torch.float32)
    padded_heads = next(heads for heads in _HEADS if heads >= num_heads)
    if padded_heads != num_heads:
        padded = q.new_zeros((num_tokens, padded_heads, width))
        padded[:, :num_heads] = q
        q = padded
    valid = torch.arange(topk_slot.shape[1], device=q.device) < num_valid.unsqueeze(1)
    out, lse, *_ = torch.ops._flashmla_C.sparse_decode_fwd(
        q.unsqueeze(0),
        _pages(cache).view(torch.float8_e4m3fn),
        torch.where(valid, topk_slot, -1).unsqueeze(0),
        None,  # lengths of the lists: not taken for this format
        None,  # attention sink
        None,  # schedule: made anew, as it depends on the batch
        None,
        None,  # a second cache
        None,
        None,
        KV_LORA_RANK,
        scale,
        None,
    )
    out, lse = out[0, :, :num_heads], lse[0, :num_heads].T
    # What the kernel gives for a token without slots is not defined.
    empty = (num_valid == 0).unsqueeze(1)
    return out.masked_fill(empty.unsqueeze(2), 0.0), lse.masked_fill(empty, -torch.inf)


def _pages(cache: torch.Tensor) -> torch.Tensor:
    """The cache as ``[num_pages, 64, 1, 656]``; slots keep their numbers."""
    num_blocks, block_size, width = cache.shape
    if block_size == _PAGE_SIZE:
        return cache.unsqueeze(2)
    if block_size % _PAGE_SIZE or not cache.is_contiguous():
        raise ValueError(
            f"sparse_mla by flash_mla: expected a cache with blocks of {_PAGE_SIZE} tokens, or of a multiple of "
            f"them without gaps, got blocks of {block_size} with strides {cache.stride()}; "
            f"use --block-size {_PAGE_SIZE} or another implementation"
        )
    return cache.view(num_blocks * block_size // _PAGE_SIZE, _PAGE_SIZE, 1, width)
