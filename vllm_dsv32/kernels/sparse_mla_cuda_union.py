"""Operation ``sparse_mla`` in CUDA C++ for prefills with 16 heads and a bfloat16 cache: four tokens at a time.

Neighbours of a prefill select much the same keys. Those of four adjacent tokens are united, by a kernel of their
own; each key of a union is then read and multiplied once, for the 64 rows that four tokens of 16 heads are, and has
no weight in rows of tokens that have not selected it. Steps of few tokens, and up to three tokens that are left,
are for Gluon.
"""

import torch

from vllm_dsv32.kernels import cuda_library, sparse_mla_gluon
from vllm_dsv32.kernels.triton_device import ceil_div
from vllm_dsv32.layout import KV_LORA_RANK, is_fp8_ds_mla

__all__ = ["GROUP", "HEADS", "MAX_SLOTS", "MIN_TOKENS", "sparse_mla", "unite"]

HEADS = 16
"""Of a token, so that a group has as many rows as a block."""
GROUP = 4
"""Adjacent tokens that are attended together."""
MIN_TOKENS = 512
"""Of a step. Of fewer, groups would leave processors idle."""
MAX_SLOTS = 2048
"""Of a token: kMaxUnionSlots of csrc/slot_union_sm90.h."""

_KEYS = 64
"""Of a tile."""
_LOG2_E = 1.4426950408889634


def sparse_mla(
    q: torch.Tensor,
    cache: torch.Tensor,
    topk_slot: torch.Tensor,
    num_valid: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`vllm_dsv32.kernels.sparse_mla.reference`; weights are rounded to bfloat16.

    A NaN or an infinity in a row makes NaN not only of tokens that have selected it, but of all in their group of
    four. What the results of a token are, to the last bits, depends on what its group has selected.

    Raises:
        ValueError: queries or a cache of another type, another number of heads, more slots than there may be, or
            pages that are not aligned.
        RuntimeError: the library was not built.
    """
    num_tokens, num_heads, _ = q.shape
    num_slots = topk_slot.shape[1]
    if q.dtype != torch.bfloat16 or num_heads != HEADS:
        raise ValueError(
            f"sparse_mla for unions takes queries in bfloat16 with {HEADS} heads, got {q.dtype} with {num_heads}; "
            "choose gluon"
        )
    if is_fp8_ds_mla(cache) or cache.dtype != torch.bfloat16:
        raise ValueError(f"sparse_mla for unions takes a cache in bfloat16, got {cache.dtype}; choose gluon")
    if num_slots > MAX_SLOTS:
        raise ValueError(
            f"sparse_mla for unions takes at most {MAX_SLOTS} slots a token, got {num_slots}; choose gluon"
        )
    page_nbytes = cache.stride(0) * cache.element_size()
    if page_nbytes % 16:
        raise ValueError(f"latent cache: expected pages at multiples of 16 bytes, got one every {page_nbytes}")
    cuda_library.require()
    if num_tokens < MIN_TOKENS or num_slots == 0:
        return sparse_mla_gluon.sparse_mla(q, cache, topk_slot, num_valid, scale)
    num_groups = num_tokens // GROUP
    grouped = slice(num_groups * GROUP)
    out = q.new_empty((num_tokens, num_heads, KV_LORA_RANK))
    lse = q.new_empty((num_tokens, num_heads), dtype=torch.float32)
    rows = (num_groups, GROUP * HEADS)
    torch.ops.vllm_dsv32.sparse_mla_bf16_union(
        q[grouped].contiguous().view(*rows, -1),
        cache,
        *unite(topk_slot[grouped], num_valid[grouped]),
        scale * _LOG2_E,
        out[grouped].view(*rows, -1),
        lse[grouped].view(rows),
    )
    if num_tokens % GROUP:
        rest = slice(num_groups * GROUP, None)
        out[rest], lse[rest] = sparse_mla_gluon.sparse_mla(q[rest], cache, topk_slot[rest], num_valid[rest], scale)
    return out, lse


def unite(topk_slot: torch.Tensor, num_valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the tokens of each group have selected between them.

    A slot that some tokens have is in the union once, and as often again as some token has it again: what a token
    has again is its own. Slots are in the order of the tokens, then of theirs.

    Args:
        topk_slot: int32 ``[4 G, K]``, K up to 2048; slots past ``num_valid`` are not read.
        num_valid: int32 ``[4 G]``, 0 to K.

    Returns:
        ``union_slot``, int32 ``[G, 4 K]``; ``num_union``, int32 ``[G]``, how many of these are valid; and ``seen``,
        int64 ``[G, ceil(4 K / 64), 4]``: of each token, which of 64 slots it has. Of these, bit ``16 t + b`` is of
        slot ``8 (b // 2) + 2 t + b % 2``, and past ``num_union`` zero. Tiles past that are not written.
    """
    num_groups, num_slots = topk_slot.shape[0] // GROUP, topk_slot.shape[1] * GROUP
    union_slot = topk_slot.new_empty((num_groups, num_slots))
    num_union = topk_slot.new_empty(num_groups)
    seen = topk_slot.new_empty((num_groups, ceil_div(num_slots, _KEYS), GROUP), dtype=torch.int64)
    torch.ops.vllm_dsv32.slot_union(topk_slot.contiguous(), num_valid.contiguous(), union_slot, num_union, seen)
    return union_slot, num_union, seen
