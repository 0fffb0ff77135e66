"""Latents into their cache, inside a Triton kernel: norm, rotation, quantisation and write."""

import triton
import triton.language as tl

from vllm_dsv32.kernels.triton_fp8 import abs_max, amax_scale, encode_e4m3
from vllm_dsv32.kernels.triton_rope import load_cos_sin, load_pairs, rotate_pairs, store_pairs
from vllm_dsv32.layout import KV_LORA_RANK, LATENT_DIM, LATENT_FP8_NBYTES, LATENT_GROUP_SIZE, ROPE_DIM

__all__ = ["insert_latents"]

_KV_LORA_RANK = tl.constexpr(KV_LORA_RANK)
_GROUP_SIZE = tl.constexpr(LATENT_GROUP_SIZE)
_NUM_GROUPS = tl.constexpr(KV_LORA_RANK // LATENT_GROUP_SIZE)
_HALF = tl.constexpr(ROPE_DIM // 2)
_FP8_ROW = tl.constexpr(LATENT_FP8_NBYTES)
_MODEL_ROW = tl.constexpr(LATENT_DIM)


@triton.jit
def insert_latents(
    program: tl.tensor,
    num_tokens: tl.tensor,
    positions_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    kv_c_ptr: tl.tensor,
    k_pe_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    norm_eps: tl.tensor,
    slots_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    kv_c_stride: tl.tensor,
    k_pe_stride: tl.tensor,
    page_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    FP8_DS_MLA: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """The program's share of :func:`vllm_dsv32.kernels.latent_insert.reference`: so many tokens."""
    token = program.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    exists = token < num_tokens
    # Nothing waits for the slots but the writes.
    slot = tl.load(slots_ptr + token, mask=exists, other=-1)
    position = tl.load(positions_ptr + token, mask=exists, other=0)

    groups = tl.arange(0, _NUM_GROUPS)[None, :, None] * _GROUP_SIZE
    dims = groups + tl.arange(0, _GROUP_SIZE)[None, None, :]
    kv_c = (kv_c_ptr + token * kv_c_stride)[:, None, None]
    # Not zeros for tokens that do not exist: their division would take the slow path, and the others wait for it.
    x = tl.load(kv_c + dims, mask=exists[:, None, None], other=1.0).to(tl.float32)
    # By each thread for its own values, as the latents are, so that none changes hands.
    norm_weight = tl.load(tl.broadcast_to(norm_weight_ptr + dims, x.shape)).to(tl.float32)
    mean_square = tl.sum(tl.sum(x * x, axis=2), axis=1) * (1.0 / _KV_LORA_RANK)
    latent = x * tl.rsqrt(mean_square + norm_eps)[:, None, None] * norm_weight

    first, second = load_pairs(k_pe_ptr + token * k_pe_stride, exists, _HALF, INTERLEAVED=True)
    cos, sin = load_cos_sin(cos_sin_ptr + position * (2 * _HALF), exists, _HALF)
    first, second = rotate_pairs(first, second, cos, sin)

    written = slot >= 0
    page = cache_ptr + (slot // BLOCK_SIZE) * page_stride
    if FP8_DS_MLA:
        row = page + (slot % BLOCK_SIZE) * _FP8_ROW
        scale = amax_scale(abs_max(latent, 2))
        code = encode_e4m3(tl.div_rn(latent, scale[:, :, None]))
        tl.store(row[:, None, None] + dims, code, mask=written[:, None, None])
        scales = (row + _KV_LORA_RANK).to(tl.pointer_type(tl.float32))
        tl.store(scales[:, None] + tl.arange(0, _NUM_GROUPS)[None, :], scale, mask=written[:, None])
        rope = (row + _KV_LORA_RANK + _NUM_GROUPS * 4).to(tl.pointer_type(tl.bfloat16))
    else:
        row = page + (slot % BLOCK_SIZE) * _MODEL_ROW
        tl.store(row[:, None, None] + dims, latent, mask=written[:, None, None])
        rope = row + _KV_LORA_RANK
    store_pairs(rope, first, second, written, _HALF, INTERLEAVED=True)
