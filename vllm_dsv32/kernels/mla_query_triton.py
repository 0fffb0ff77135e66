"""Operation ``mla_query``: the absorbed product by cuBLAS, the rotation in Triton, both into one tensor."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from vllm_dsv32.kernels.triton_compilation import Compilation
from vllm_dsv32.kernels.triton_rope import load_cos_sin, load_pairs, rotate_pairs, store_pairs
from vllm_dsv32.layout import KV_LORA_RANK, ROPE_DIM

__all__ = ["compilations", "mla_query"]

_ROWS = 32
"""Heads, of any tokens, that a program takes: 2,048 values are two 16-byte words for each of its threads."""
_NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_rows"])
def _rope_kernel(
    q_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    q_stride_token: tl.tensor,
    q_stride_head: tl.tensor,
    NUM_HEADS: tl.constexpr,
    Q_BEGIN: tl.constexpr,
    OUT_BEGIN: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < num_rows
    token, head = row // NUM_HEADS, row % NUM_HEADS
    position = tl.load(positions_ptr + token, mask=mask, other=0)
    cos, sin = load_cos_sin(cos_sin_ptr + position * (2 * HALF), mask, HALF)
    q_pe = q_ptr + token * q_stride_token + head * q_stride_head + Q_BEGIN
    first, second = load_pairs(q_pe, mask, HALF, INTERLEAVED=True)
    first, second = rotate_pairs(first, second, cos, sin)
    out = out_ptr + row * (OUT_BEGIN + 2 * HALF) + OUT_BEGIN
    store_pairs(out, first, second, mask, HALF, INTERLEAVED=True)


def mla_query(
    q: torch.Tensor,
    w_uk_t: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
) -> torch.Tensor:
    """See :func:`vllm_dsv32.kernels.mla_query.reference`; each part is written where it belongs, without a copy."""
    num_tokens, num_heads, _ = q.shape
    _, nope_dim, latent_dim = w_uk_t.shape
    rope_dim = cos_sin_cache.shape[1]
    out = torch.empty((num_tokens, num_heads, latent_dim + rope_dim), dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    torch.bmm(q[..., :nope_dim].transpose(0, 1), w_uk_t, out=out[..., :latent_dim].transpose(0, 1))
    num_rows = num_tokens * num_heads
    _rope_kernel[(triton.cdiv(num_rows, _ROWS),)](
        q,
        positions,
        cos_sin_cache,
        out,
        num_rows,
        q.stride(0),
        q.stride(1),
        NUM_HEADS=num_heads,
        Q_BEGIN=nope_dim,
        OUT_BEGIN=latent_dim,
        HALF=rope_dim // 2,
        ROWS=_ROWS,
        num_warps=_NUM_WARPS,
        num_stages=1,
        enable_fp_fusion=False,
    )
    return out


def compilations(capability: tuple[int, int]) -> Iterator[Compilation]:
    """The rotation of 16 heads, a rank's share of 128 among eight."""
    yield Compilation(
        name="mla_query rope",
        kernel=_rope_kernel,
        signature={
            "q_ptr": "*bf16",
            "positions_ptr": "*i64",
            "cos_sin_ptr": "*fp32",
            "out_ptr": "*bf16",
            "num_rows": "i32",
            "q_stride_token": "i32",
            "q_stride_head": "i32",
        },
        constexprs={
            "NUM_HEADS": 16,
            "Q_BEGIN": 128,
            "OUT_BEGIN": KV_LORA_RANK,
            "HALF": ROPE_DIM // 2,
            "ROWS": _ROWS,
        },
        num_warps=_NUM_WARPS,
        num_stages=1,
    )
