"""Operation ``topk_slots`` in Triton: one program a token, whose count of valid positions stays in registers."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from vllm_dsv32.kernels.triton_compilation import Compilation

__all__ = ["compilations", "topk_slots"]

_NUM_WARPS = 4


@triton.jit(do_not_specialize=["block_table_stride"], do_not_specialize_on_alignment=["request_ids_ptr"])
def _topk_slots_kernel(
    topk_pos_ptr: tl.tensor,
    request_ids_ptr: tl.tensor,
    block_table_ptr: tl.tensor,
    topk_slot_ptr: tl.tensor,
    num_valid_ptr: tl.tensor,
    topk_pos_stride: tl.tensor,
    block_table_stride: tl.tensor,
    K: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, LANES)
    pos = tl.load(topk_pos_ptr + token * topk_pos_stride + rank, mask=rank < K, other=-1)
    valid = pos >= 0
    blocks = block_table_ptr + tl.load(request_ids_ptr + token).to(tl.int64) * block_table_stride
    block = tl.load(blocks + pos // BLOCK_SIZE, mask=valid, other=0)
    slot = tl.where(valid, block * BLOCK_SIZE + pos % BLOCK_SIZE, -1)
    tl.store(topk_slot_ptr + token * K + rank, slot, mask=rank < K)
    tl.store(num_valid_ptr + token, tl.sum(valid.to(tl.int32)))


def topk_slots(
    topk_pos: torch.Tensor,
    request_ids: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`vllm_dsv32.kernels.topk_slots.reference`; the block table is read for valid positions only."""
    num_tokens, k = topk_pos.shape
    topk_slot = torch.empty((num_tokens, k), dtype=torch.int32, device=topk_pos.device)
    num_valid = torch.empty(num_tokens, dtype=torch.int32, device=topk_pos.device)
    if num_tokens == 0:
        return topk_slot, num_valid
    _topk_slots_kernel[(num_tokens,)](
        topk_pos,
        request_ids,
        block_table,
        topk_slot,
        num_valid,
        topk_pos.stride(0),
        block_table.stride(0),
        **_constexprs(k, block_size),
        num_warps=_NUM_WARPS,
    )
    return topk_slot, num_valid


def _constexprs(k: int, block_size: int) -> dict[str, object]:
    return {"K": k, "BLOCK_SIZE": block_size, "LANES": triton.next_power_of_2(k)}


def compilations(capability: tuple[int, int]) -> Iterator[Compilation]:
    """The kernel for a top-k of 2048."""
    yield Compilation(
        name="topk_slots",
        kernel=_topk_slots_kernel,
        signature={
            "topk_pos_ptr": "*i32",
            "request_ids_ptr": "*i32",
            "block_table_ptr": "*i32",
            "topk_slot_ptr": "*i32",
            "num_valid_ptr": "*i32",
            "topk_pos_stride": "i32",
            "block_table_stride": "i32",
        },
        constexprs=_constexprs(2048, 64),
        num_warps=_NUM_WARPS,
        num_stages=1,
    )
