"""Index queries, inside a Triton kernel: each is read once and written once."""

import triton
import triton.language as tl

from vllm_dsv32.kernels.triton_fp8 import (
    abs_max,
    encode_e4m3,
    larger,
    power_of_two_reciprocal,
    ue8m0_scale,
)
from vllm_dsv32.kernels.triton_rope import load_cos_sin, load_pairs, rotate_pairs, store_pairs
from vllm_dsv32.layout import INDEX_HEAD_DIM, ROPE_DIM

__all__ = ["quantise_index_queries"]

_HEAD_DIM = tl.constexpr(INDEX_HEAD_DIM)
_HALF = tl.constexpr(ROPE_DIM // 2)


@triton.jit
def quantise_index_queries(
    program: tl.tensor,
    num_tokens: tl.tensor,
    positions_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    index_q_ptr: tl.tensor,
    head_weights_ptr: tl.tensor,
    q_fp8_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    index_q_stride_token: tl.tensor,
    index_q_stride_head: tl.tensor,
    head_weights_stride: tl.tensor,
    weight_factor: tl.tensor,
    NUM_HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """The program's share of :func:`vllm_dsv32.kernels.index_query.reference`: so many heads, of any tokens."""
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < num_tokens * NUM_HEADS
    token, head = row // NUM_HEADS, row % NUM_HEADS
    position = tl.load(positions_ptr + token, mask=exists, other=0)
    cos, sin = load_cos_sin(cos_sin_ptr + position * (2 * _HALF), exists, _HALF)

    index_q = index_q_ptr + token * index_q_stride_token + head * index_q_stride_head
    first, second = load_pairs(index_q, exists, _HALF, INTERLEAVED)
    first, second = rotate_pairs(first, second, cos, sin)
    rest_dims = 2 * _HALF + tl.arange(0, _HEAD_DIM - 2 * _HALF)
    rest = tl.load(index_q[:, None] + rest_dims[None, :], mask=exists[:, None], other=0.0).to(tl.float32)

    scale = ue8m0_scale(larger(abs_max(larger(first, second), 1), abs_max(rest, 1)))
    reciprocal = power_of_two_reciprocal(scale)[:, None]
    q_fp8 = q_fp8_ptr + row * _HEAD_DIM
    store_pairs(
        q_fp8, encode_e4m3(first * reciprocal), encode_e4m3(second * reciprocal), exists, _HALF, INTERLEAVED
    )
    tl.store(q_fp8[:, None] + rest_dims[None, :], encode_e4m3(rest * reciprocal), mask=exists[:, None])

    head_weight = tl.load(head_weights_ptr + token * head_weights_stride + head, mask=exists, other=0.0)
    tl.store(weights_ptr + row, head_weight.to(tl.float32) * weight_factor * scale, mask=exists)
