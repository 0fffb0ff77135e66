"""Operation ``latent_insert`` in Triton: norm, rotation, quantisation and write in one launch."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from vllm_dsv32.kernels.triton_compilation import Compilation
from vllm_dsv32.kernels.triton_fp8 import abs_max, amax_scale, encode_e4m3
from vllm_dsv32.kernels.triton_rope import load_cos_sin, load_pairs, rotate_pairs, store_pairs
from vllm_dsv32.layout import KV_LORA_RANK, LATENT_FP8_NBYTES, LATENT_GROUP_SIZE, ROPE_DIM, is_fp8_ds_mla

__all__ = ["compilations", "latent_insert"]

_NUM_WARPS = 1
"""A token is little work, and a warp reduces its 512 values without a barrier."""


@triton.jit
def _latent_insert_kernel(
    kv_c_ptr: tl.tensor,
    k_pe_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    norm_eps: tl.tensor,
    positions_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    kv_c_stride: tl.tensor,
    k_pe_stride: tl.tensor,
    page_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    FP8_DS_MLA: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    LATENT_DIM: tl.constexpr = NUM_GROUPS * GROUP_SIZE
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    row_ptr = cache_ptr + (slot // BLOCK_SIZE) * page_stride + (slot % BLOCK_SIZE) * ROW_STRIDE
    one = tl.zeros((1,), tl.int32)
    exists = one == 0

    dims = tl.arange(0, NUM_GROUPS)[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
    x = tl.load(kv_c_ptr + token * kv_c_stride + dims).to(tl.float32)
    norm_weight = tl.load(norm_weight_ptr + dims).to(tl.float32)
    mean_square = tl.sum(tl.sum(x * x, axis=1), axis=0) * (1.0 / LATENT_DIM)
    latent = x * tl.rsqrt(mean_square + norm_eps) * norm_weight

    position = tl.load(positions_ptr + token)
    first, second = load_pairs(k_pe_ptr + token * k_pe_stride + one, exists, HALF, INTERLEAVED=True)
    cos, sin = load_cos_sin(cos_sin_ptr + position * (2 * HALF) + one, exists, HALF)
    first, second = rotate_pairs(first, second, cos, sin)

    if FP8_DS_MLA:
        scale = amax_scale(abs_max(latent, 1))
        tl.store(row_ptr + dims, encode_e4m3(tl.div_rn(latent, scale[:, None])))
        scale_ptr = (row_ptr + LATENT_DIM).to(tl.pointer_type(tl.float32))
        tl.store(scale_ptr + tl.arange(0, NUM_GROUPS), scale)
        rope_ptr = (row_ptr + LATENT_DIM + NUM_GROUPS * 4).to(tl.pointer_type(tl.bfloat16))
    else:
        tl.store(row_ptr + dims, latent)
        rope_ptr = row_ptr + LATENT_DIM
    store_pairs(rope_ptr + one, first, second, exists, HALF, INTERLEAVED=True)


def latent_insert(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    slots: torch.Tensor,
    cache: torch.Tensor,
) -> None:
    """See :func:`vllm_dsv32.kernels.latent_insert.reference`; the norm sums its squares in another order."""
    if kv_c.shape[0] == 0:
        return
    _latent_insert_kernel[(kv_c.shape[0],)](
        kv_c,
        k_pe,
        norm_weight,
        norm_eps,
        positions,
        cos_sin_cache,
        slots,
        cache,
        kv_c.stride(0),
        k_pe.stride(0),
        cache.stride(0),
        BLOCK_SIZE=cache.shape[1],
        **_shape(is_fp8_ds_mla(cache)),
        num_warps=_NUM_WARPS,
        num_stages=1,
        enable_fp_fusion=False,
    )


def _shape(fp8_ds_mla: bool) -> dict[str, object]:
    return {
        "ROW_STRIDE": LATENT_FP8_NBYTES if fp8_ds_mla else KV_LORA_RANK + ROPE_DIM,
        "FP8_DS_MLA": fp8_ds_mla,
        "NUM_GROUPS": KV_LORA_RANK // LATENT_GROUP_SIZE,
        "GROUP_SIZE": LATENT_GROUP_SIZE,
        "HALF": ROPE_DIM // 2,
    }


def compilations(capability: tuple[int, int]) -> Iterator[Compilation]:
    """The kernel for a bfloat16 model with each kind of cache."""
    for cache_format, cache_type in (("bfloat16", "*bf16"), ("fp8_ds_mla", "*u8")):
        yield Compilation(
            name=f"latent_insert {cache_format}",
            kernel=_latent_insert_kernel,
            signature={
                "kv_c_ptr": "*bf16",
                "k_pe_ptr": "*bf16",
                "norm_weight_ptr": "*bf16",
                "norm_eps": "fp32",
                "positions_ptr": "*i64",
                "cos_sin_ptr": "*fp32",
                "slots_ptr": "*i64",
                "cache_ptr": cache_type,
                "kv_c_stride": "i32",
                "k_pe_stride": "i32",
                "page_stride": "i32",
            },
            constexprs={"BLOCK_SIZE": 64, **_shape(cache_type == "*u8")},
            num_warps=_NUM_WARPS,
            num_stages=1,
        )
