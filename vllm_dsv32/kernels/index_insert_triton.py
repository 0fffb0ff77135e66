"""Operation ``index_insert`` in Triton: norm, rotation, quantisation and write in one launch."""

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

__all__ = ["compilations", "index_insert"]

_TOKENS = 4
"""Of a program; a warp each."""
_NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_tokens"])
def _index_insert_kernel(
    index_k_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    norm_bias_ptr: tl.tensor,
    norm_eps: tl.tensor,
    positions_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    num_tokens: tl.tensor,
    index_k_stride: tl.tensor,
    page_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slots_ptr + token, mask=token < num_tokens, other=-1)
    written = slot >= 0
    position = tl.load(positions_ptr + token, mask=written, other=0)
    cos, sin = load_cos_sin(cos_sin_ptr + position * (2 * HALF), written, HALF)

    one = tl.zeros((1,), tl.int32)
    rest_dims = 2 * HALF + tl.arange(0, HEAD_DIM - 2 * HALF)[None, :]
    index_k = index_k_ptr + token * index_k_stride
    first, second = load_pairs(index_k, written, HALF, INTERLEAVED)
    rest = tl.load(index_k[:, None] + rest_dims, mask=written[:, None], other=0.0).to(tl.float32)
    first_weight, second_weight = load_pairs(norm_weight_ptr + one, one == 0, HALF, INTERLEAVED)
    first_bias, second_bias = load_pairs(norm_bias_ptr + one, one == 0, HALF, INTERLEAVED)
    rest_weight = tl.load(norm_weight_ptr + rest_dims).to(tl.float32)
    rest_bias = tl.load(norm_bias_ptr + rest_dims).to(tl.float32)

    mean = (tl.sum(first + second, axis=1) + tl.sum(rest, axis=1)) * (1.0 / HEAD_DIM)
    first, second, rest = first - mean[:, None], second - mean[:, None], rest - mean[:, None]
    squares = tl.sum(first * first + second * second, axis=1) + tl.sum(rest * rest, axis=1)
    inverse_deviation = tl.rsqrt(squares * (1.0 / HEAD_DIM) + norm_eps)[:, None]
    first = first * inverse_deviation * first_weight + first_bias
    second = second * inverse_deviation * second_weight + second_bias
    rest = rest * inverse_deviation * rest_weight + rest_bias
    first, second = rotate_pairs(first, second, cos, sin)

    scale = ue8m0_scale(larger(abs_max(larger(first, second), 1), abs_max(rest, 1)))
    reciprocal = power_of_two_reciprocal(scale)[:, None]
    # A page holds its keys first and then its scales.
    page = cache_ptr + (slot // BLOCK_SIZE) * page_stride
    offset = slot % BLOCK_SIZE
    key = page + offset * HEAD_DIM
    store_pairs(key, encode_e4m3(first * reciprocal), encode_e4m3(second * reciprocal), written, HALF, INTERLEAVED)
    tl.store(key[:, None] + rest_dims, encode_e4m3(rest * reciprocal), mask=written[:, None])
    scales = (page + BLOCK_SIZE * HEAD_DIM).to(tl.pointer_type(tl.float32))
    tl.store(scales + offset, scale, mask=written)


def index_insert(
    index_k: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    norm_eps: float,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    rope_layout: RopeLayout,
    slots: torch.Tensor,
    cache: torch.Tensor,
) -> None:
    """See :func:`vllm_dsv32.kernels.index_insert.reference`; the norm sums in another order."""
    num_tokens, head_dim = index_k.shape
    if num_tokens == 0:
        return
    _index_insert_kernel[(triton.cdiv(num_tokens, _TOKENS),)](
        index_k,
        norm_weight,
        norm_bias,
        norm_eps,
        positions,
        cos_sin_cache,
        slots,
        cache,
        num_tokens,
        index_k.stride(0),
        cache.stride(0),
        BLOCK_SIZE=cache.shape[1],
        HEAD_DIM=head_dim,
        HALF=cos_sin_cache.shape[1] // 2,
        INTERLEAVED=rope_layout is RopeLayout.INTERLEAVED,
        TOKENS=_TOKENS,
        num_warps=_NUM_WARPS,
        num_stages=1,
        enable_fp_fusion=False,
    )


def compilations(capability: tuple[int, int]) -> Iterator[Compilation]:
    """The kernel in both layouts of the rotation."""
    for rope_layout in RopeLayout:
        yield Compilation(
            name=f"index_insert {rope_layout.value}",
            kernel=_index_insert_kernel,
            signature={
                "index_k_ptr": "*bf16",
                "norm_weight_ptr": "*fp32",
                "norm_bias_ptr": "*fp32",
                "norm_eps": "fp32",
                "positions_ptr": "*i64",
                "cos_sin_ptr": "*fp32",
                "slots_ptr": "*i64",
                "cache_ptr": "*u8",
                "num_tokens": "i32",
                "index_k_stride": "i32",
                "page_stride": "i32",
            },
            constexprs={
                "BLOCK_SIZE": 64,
                "HEAD_DIM": INDEX_HEAD_DIM,
                "HALF": ROPE_DIM // 2,
                "INTERLEAVED": rope_layout is RopeLayout.INTERLEAVED,
                "TOKENS": _TOKENS,
            },
            num_warps=_NUM_WARPS,
            num_stages=1,
        )
