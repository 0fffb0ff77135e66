"""Index keys into their cache, inside a Triton kernel: norm, rotation, quantisation and write."""

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

__all__ = ["insert_index_keys"]

_HEAD_DIM = tl.constexpr(INDEX_HEAD_DIM)
_HALF = tl.constexpr(ROPE_DIM // 2)


@triton.jit
def insert_index_keys(
    program: tl.tensor,
    num_tokens: tl.tensor,
    positions_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    index_k_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    norm_bias_ptr: tl.tensor,
    norm_eps: tl.tensor,
    slots_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    index_k_stride: tl.tensor,
    page_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """The program's share of :func:`vllm_dsv32.kernels.index_insert.reference`: so many tokens."""
    token = program.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    exists = token < num_tokens
    # Nothing waits for the slots but the writes.
    slot = tl.load(slots_ptr + token, mask=exists, other=-1)
    position = tl.load(positions_ptr + token, mask=exists, other=0)
    cos, sin = load_cos_sin(cos_sin_ptr + position * (2 * _HALF), exists, _HALF)

    one = tl.zeros((1,), tl.int32)
    rest_dims = 2 * _HALF + tl.arange(0, _HEAD_DIM - 2 * _HALF)[None, :]
    index_k = index_k_ptr + token * index_k_stride
    first, second = load_pairs(index_k, exists, _HALF, INTERLEAVED)
    rest = tl.load(index_k[:, None] + rest_dims, mask=exists[:, None], other=0.0).to(tl.float32)
    first_weight, second_weight = load_pairs(norm_weight_ptr + one, one == 0, _HALF, INTERLEAVED)
    first_bias, second_bias = load_pairs(norm_bias_ptr + one, one == 0, _HALF, INTERLEAVED)
    rest_weight = tl.load(norm_weight_ptr + rest_dims).to(tl.float32)
    rest_bias = tl.load(norm_bias_ptr + rest_dims).to(tl.float32)

    mean = (tl.sum(first + second, axis=1) + tl.sum(rest, axis=1)) * (1.0 / _HEAD_DIM)
    first, second, rest = first - mean[:, None], second - mean[:, None], rest - mean[:, None]
    squares = tl.sum(first * first + second * second, axis=1) + tl.sum(rest * rest, axis=1)
    inverse_deviation = tl.rsqrt(squares * (1.0 / _HEAD_DIM) + norm_eps)[:, None]
    first = first * inverse_deviation * first_weight + first_bias
    second = second * inverse_deviation * second_weight + second_bias
    rest = rest * inverse_deviation * rest_weight + rest_bias
    first, second = rotate_pairs(first, second, cos, sin)

    scale = ue8m0_scale(larger(abs_max(larger(first, second), 1), abs_max(rest, 1)))
    reciprocal = power_of_two_reciprocal(scale)[:, None]
    written = slot >= 0
    # A page holds its keys first and then its scales.
    page = cache_ptr + (slot // BLOCK_SIZE) * page_stride
    offset = slot % BLOCK_SIZE
    key = page + offset * _HEAD_DIM
    store_pairs(key, encode_e4m3(first * reciprocal), encode_e4m3(second * reciprocal), written, _HALF, INTERLEAVED)
    tl.store(key[:, None] + rest_dims, encode_e4m3(rest * reciprocal), mask=written[:, None])
    scales = (page + BLOCK_SIZE * _HEAD_DIM).to(tl.pointer_type(tl.float32))
    tl.store(scales + offset, scale, mask=written)
