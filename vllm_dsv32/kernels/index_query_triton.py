"""Operation ``index_query`` in Triton: one launch that reads each query once and writes it once."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from vllm_dsv32.kernels.rope import RopeLayout
from vllm_dsv32.kernels.triton_compilation import Compilation
from vllm_dsv32.kernels.triton_fp8 import (
    abs_max,
    encode_e4m3,
    larger,
    power_of_two_reciprocal,
    ue8m0_scale,
)
from vllm_dsv32.kernels.triton_rope import load_cos_sin, load_pairs, rotate_pairs, store_pairs
from vllm_dsv32.layout import INDEX_HEAD_DIM, ROPE_DIM

__all__ = ["compilations", "index_query"]

_ROWS = 16
"""Heads, of any tokens, that a program takes: 2,048 values are two 16-byte words for each of its threads."""
_NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_rows"])
def _index_query_kernel(
    index_q_ptr: tl.tensor,
    head_weights_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    q_fp8_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    num_rows: tl.tensor,
    index_q_stride_token: tl.tensor,
    index_q_stride_head: tl.tensor,
    head_weights_stride: tl.tensor,
    weight_factor: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < num_rows
    token, head = row // NUM_HEADS, row % NUM_HEADS
    position = tl.load(positions_ptr + token, mask=mask, other=0)
    cos, sin = load_cos_sin(cos_sin_ptr + position * (2 * HALF), mask, HALF)

    index_q = index_q_ptr + token * index_q_stride_token + head * index_q_stride_head
    first, second = load_pairs(index_q, mask, HALF, INTERLEAVED)
    first, second = rotate_pairs(first, second, cos, sin)
    rest_dims = 2 * HALF + tl.arange(0, HEAD_DIM - 2 * HALF)
    rest = tl.load(index_q[:, None] + rest_dims[None, :], mask=mask[:, None], other=0.0).to(tl.float32)

    scale = ue8m0_scale(larger(abs_max(larger(first, second), 1), abs_max(rest, 1)))
    reciprocal = power_of_two_reciprocal(scale)[:, None]
    q_fp8 = q_fp8_ptr + row * HEAD_DIM
    store_pairs(q_fp8, encode_e4m3(first * reciprocal), encode_e4m3(second * reciprocal), mask, HALF, INTERLEAVED)
    tl.store(q_fp8[:, None] + rest_dims[None, :], encode_e4m3(rest * reciprocal), mask=mask[:, None])

    head_weight = tl.load(head_weights_ptr + token * head_weights_stride + head, mask=mask, other=0.0)
    tl.store(weights_ptr + row, head_weight.to(tl.float32) * weight_factor * scale, mask=mask)


def index_query(
    index_q: torch.Tensor,
    head_weights: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    rope_layout: RopeLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`vllm_dsv32.kernels.index_query.reference`; same bytes and scales."""
    num_tokens, num_heads, head_dim = index_q.shape
    q_fp8 = torch.empty(index_q.shape, dtype=torch.float8_e4m3fn, device=index_q.device)
    weights = torch.empty((num_tokens, num_heads), dtype=torch.float32, device=index_q.device)
    if num_tokens == 0:
        return q_fp8, weights
    num_rows = num_tokens * num_heads
    _index_query_kernel[(triton.cdiv(num_rows, _ROWS),)](
        index_q,
        head_weights,
        positions,
        cos_sin_cache,
        q_fp8.view(torch.uint8),
        weights,
        num_rows,
        index_q.stride(0),
        index_q.stride(1),
        head_weights.stride(0),
        num_heads**-0.5 * head_dim**-0.5,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        HALF=cos_sin_cache.shape[1] // 2,
        INTERLEAVED=rope_layout is RopeLayout.INTERLEAVED,
        ROWS=_ROWS,
        num_warps=_NUM_WARPS,
        num_stages=1,
        enable_fp_fusion=False,
    )
    return q_fp8, weights


def compilations(capability: tuple[int, int]) -> Iterator[Compilation]:
    """The kernel for DeepSeek-V3.2's 64 index heads, in both layouts of the rotation."""
    for rope_layout in RopeLayout:
        yield Compilation(
            name=f"index_query {rope_layout.value}",
            kernel=_index_query_kernel,
            signature={
                "index_q_ptr": "*bf16",
                "head_weights_ptr": "*fp32",
                "positions_ptr": "*i64",
                "cos_sin_ptr": "*fp32",
                "q_fp8_ptr": "*u8",
                "weights_ptr": "*fp32",
                "num_rows": "i32",
                "index_q_stride_token": "i32",
                "index_q_stride_head": "i32",
                "head_weights_stride": "i32",
                "weight_factor": "fp32",
            },
            constexprs={
                "NUM_HEADS": 64,
                "HEAD_DIM": INDEX_HEAD_DIM,
                "HALF": ROPE_DIM // 2,
                "INTERLEAVED": rope_layout is RopeLayout.INTERLEAVED,
                "ROWS": _ROWS,
            },
            num_warps=_NUM_WARPS,
            num_stages=1,
        )
