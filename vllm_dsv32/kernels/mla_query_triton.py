"""The rotation of queries, inside a Triton kernel."""

import triton
import triton.language as tl

from vllm_dsv32.kernels.triton_rope import load_cos_sin, load_pairs, rotate_pairs, store_pairs
from vllm_dsv32.layout import KV_LORA_RANK, ROPE_DIM

__all__ = ["rotate_mla_queries"]

_LATENT_DIM = tl.constexpr(KV_LORA_RANK)
_HALF = tl.constexpr(ROPE_DIM // 2)


@triton.jit
def rotate_mla_queries(
    program: tl.tensor,
    num_tokens: tl.tensor,
    positions_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    q_ptr: tl.tensor,
    mla_q_ptr: tl.tensor,
    q_stride_token: tl.tensor,
    q_stride_head: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NOPE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """The rotated columns of :func:`vllm_dsv32.kernels.mla_query.reference`, for so many heads, of any tokens."""
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < num_tokens * NUM_HEADS
    token, head = row // NUM_HEADS, row % NUM_HEADS
    position = tl.load(positions_ptr + token, mask=exists, other=0)
    cos, sin = load_cos_sin(cos_sin_ptr + position * (2 * _HALF), exists, _HALF)
    q_pe = q_ptr + token * q_stride_token + head * q_stride_head + NOPE_DIM
    first, second = load_pairs(q_pe, exists, _HALF, INTERLEAVED=True)
    first, second = rotate_pairs(first, second, cos, sin)
    rotated = mla_q_ptr + row * (_LATENT_DIM + 2 * _HALF) + _LATENT_DIM
    store_pairs(rotated, first, second, exists, _HALF, INTERLEAVED=True)
