"""Operation ``sparse_mla`` in CUDA C++ for prefills with 16 heads: four tokens at a time, which share keys.

Neighbours of a prefill select much the same keys. Those of four adjacent tokens are united, by a kernel of their
own; each key of a union is then read and multiplied once, for the 64 rows that four tokens of 16 heads are, and
has no weight in rows of tokens that have not selected it. Pages of an fp8 cache that unions name are decoded
first, each once.

With an fp8 cache, groups that share too little are attended token by token. So are, with either cache, steps of few
tokens and what is left beside whole groups: by the other kernel in CUDA with fp8, and by Gluon with bfloat16.
"""

import torch

from vllm_dsv32.kernels import cuda_library, sparse_mla_cuda, sparse_mla_gluon
from vllm_dsv32.kernels.slot_union_cuda import GROUP, MAX_SLOTS, PLACED_NBYTES, Places, unite
from vllm_dsv32.layout import KV_LORA_RANK, LATENT_DIM, is_fp8_ds_mla

__all__ = ["HEADS", "MAX_TOKENS", "MIN_TOKENS", "SCRATCH_NBYTES", "sparse_mla"]

HEADS = 16
"""Of a token, so that a group has as many rows as a block."""
MIN_TOKENS = 1024
"""Of a step. Of fewer, groups would leave processors idle."""
MAX_TOKENS = 8192
"""United at once, which bounds what unions take."""
SCRATCH_NBYTES = PLACED_NBYTES + MAX_TOKENS * MAX_SLOTS * 5
"""What a call takes and gives back, at most: decoded pages, and of each slot the union's and what sees it."""

_MAX_FP8_SHARE = 9 / 16
"""Beyond, a union takes longer than its tokens one by one: 64 rows by a key take 1.6 times as long as 16."""
_LOG2_E = 1.4426950408889634


def sparse_mla(
    q: torch.Tensor,
    cache: torch.Tensor,
    topk_slot: torch.Tensor,
    num_valid: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`vllm_dsv32.kernels.sparse_mla.reference`; of united tokens, weights are rounded to bfloat16.

    So are the rows of an fp8 cache. What the results of a token are, to the last bits, depends on what its group
    has selected, and with an fp8 cache on whether pages of all groups can be decoded at once. A NaN or an infinity
    in a row makes NaN not only of tokens that have selected it, but of all that are united with them.

    Raises:
        ValueError: queries or a cache of another type, another number of heads, more slots than there may be, or
            pages that are not aligned.
        RuntimeError: the library was not built.
    """
    num_tokens, num_heads, _ = q.shape
    num_slots = topk_slot.shape[1]
    is_fp8 = is_fp8_ds_mla(cache)
    if q.dtype != torch.bfloat16 or num_heads != HEADS:
        raise ValueError(
            f"sparse_mla for unions takes queries in bfloat16 with {HEADS} heads, got {q.dtype} with {num_heads}; "
            "choose gluon"
        )
    if not is_fp8 and cache.dtype != torch.bfloat16:
        raise ValueError(
            f"sparse_mla for unions takes a cache in fp8_ds_mla or bfloat16, got {cache.dtype}; choose triton"
        )
    if num_slots > MAX_SLOTS:
        raise ValueError(
            f"sparse_mla for unions takes at most {MAX_SLOTS} slots a token, got {num_slots}; choose gluon"
        )
    page_nbytes = cache.stride(0) * cache.element_size()
    if page_nbytes % 16:
        raise ValueError(f"latent cache: expected pages at multiples of 16 bytes, got one every {page_nbytes}")
    cuda_library.require()
    attend_alone = sparse_mla_cuda.sparse_mla if is_fp8 else sparse_mla_gluon.sparse_mla
    num_grouped = 0
    if num_tokens >= MIN_TOKENS and num_slots > 0:
        # With fp8, not those of a last wave that leaves most of the GPU idle: in splits they are over sooner.
        num_grouped = sparse_mla_cuda.num_whole_tokens(q, num_slots) if is_fp8 else num_tokens
        num_grouped -= num_grouped % GROUP
    if num_grouped == 0:
        return attend_alone(q, cache, topk_slot, num_valid, scale)
    out = q.new_empty((num_tokens, num_heads, KV_LORA_RANK))
    lse = q.new_empty((num_tokens, num_heads), dtype=torch.float32)
    for begin in range(0, num_grouped, MAX_TOKENS):
        part = slice(begin, min(begin + MAX_TOKENS, num_grouped))
        _attend_groups(
            q[part].contiguous(),
            cache,
            topk_slot[part].contiguous(),
            num_valid[part].contiguous(),
            scale * _LOG2_E,
            out[part],
            lse[part],
        )
    if num_grouped < num_tokens:
        rest = slice(num_grouped, None)
        out[rest], lse[rest] = attend_alone(q[rest], cache, topk_slot[rest], num_valid[rest], scale)
    return out, lse


def _attend_groups(
    q: torch.Tensor,
    cache: torch.Tensor,
    topk_slot: torch.Tensor,
    num_valid: torch.Tensor,
    scale_log2: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    if is_fp8_ds_mla(cache):
        # The host does not know which groups share enough: each kernel passes over what is the other's.
        places = Places.for_cache(cache)
        unions = unite(topk_slot, num_valid, _MAX_FP8_SHARE, places)
        latents = q.new_empty((len(places.pages), places.block_size, LATENT_DIM))
        torch.ops.vllm_dsv32.latent_pages(
            cache, num_valid, places.table, places.pages, latents, unions.num_slots, unions.num_left
        )
        torch.ops.vllm_dsv32.sparse_mla_fp8(q, cache, topk_slot, unions.num_left, scale_log2, 1, out, lse)
    else:
        # All groups: even where nothing is shared, 64 rows by a key take little longer than Gluon's 16.
        unions, latents = unite(topk_slot, num_valid, 1.0, Places.none(q.device)), cache
    rows = (len(unions.num_slots), GROUP * HEADS)
    torch.ops.vllm_dsv32.sparse_mla_bf16_union(
        q.view(*rows, -1),
        latents,
        unions.slots,
        unions.num_slots,
        unions.seen,
        scale_log2,
        out.view(*rows, -1),
        lse.view(rows),
    )
