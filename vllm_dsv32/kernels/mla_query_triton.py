"""The queries of attention, inside a Triton kernel: rotated, and for small batches absorbed."""

import triton
import triton.language as tl

from vllm_dsv32.kernels.triton_rope import load_cos_sin, load_pairs, rotate_pairs, store_pairs
from vllm_dsv32.layout import KV_LORA_RANK, LATENT_DIM, ROPE_DIM

__all__ = ["absorb_mla_queries", "rotate_mla_queries"]

_KV_LORA_RANK = tl.constexpr(KV_LORA_RANK)
_HALF = tl.constexpr(ROPE_DIM // 2)
_MLA_ROW = tl.constexpr(LATENT_DIM)
_ABSORBED_DIMS = tl.constexpr(64)


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
    rotated = mla_q_ptr + row * _MLA_ROW + _KV_LORA_RANK
    store_pairs(rotated, first, second, exists, _HALF, INTERLEAVED=True)


@triton.jit
def absorb_mla_queries(
    program: tl.tensor,
    num_tokens: tl.tensor,
    q_ptr: tl.tensor,
    w_uk_t_ptr: tl.tensor,
    mla_q_ptr: tl.tensor,
    q_stride_token: tl.tensor,
    q_stride_head: tl.tensor,
    w_uk_t_stride_head: tl.tensor,
    w_uk_t_stride_dim: tl.tensor,
    w_uk_t_stride_column: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NOPE_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Some of the other columns of :func:`vllm_dsv32.kernels.mla_query.reference`: of a head, for so many tokens.

    Programs of the same tokens follow each other by head and columns.
    """
    column_block = program % (_KV_LORA_RANK // COLUMNS)
    head_and_tokens = program // (_KV_LORA_RANK // COLUMNS)
    head = head_and_tokens % NUM_HEADS
    token = (head_and_tokens // NUM_HEADS).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    exists = token < num_tokens
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    q = (q_ptr + token * q_stride_token + head * q_stride_head)[:, None]
    w_uk_t = (w_uk_t_ptr + head * w_uk_t_stride_head + column * w_uk_t_stride_column)[None, :]
    latent = tl.zeros((TOKENS, COLUMNS), tl.float32)
    # With so many stages all 128 dims are on their way before the first are multiplied.
    for begin in tl.range(0, NOPE_DIM, _ABSORBED_DIMS, num_stages=3):
        dim = begin + tl.arange(0, _ABSORBED_DIMS)
        weights = tl.load(w_uk_t + dim[:, None] * w_uk_t_stride_dim, mask=dim[:, None] < NOPE_DIM, other=0.0)
        q_nope = tl.load(q + dim[None, :], mask=exists[:, None] & (dim[None, :] < NOPE_DIM), other=0.0)
        latent = tl.dot(q_nope, weights, latent)
    absorbed = (mla_q_ptr + (token * NUM_HEADS + head) * _MLA_ROW)[:, None] + column[None, :]
    tl.store(absorbed, latent, mask=exists[:, None])
