"""Operation ``sparse_mla`` for SM 90 in Gluon, which takes bfloat16 queries.

Three kernels: for up to 16 heads on either cache format, and for more on bfloat16. All split the keys of a token as
the Triton kernel does, and join the results in its second launch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import triton

from vllm_dsv32.kernels import (
    sparse_mla_gluon_fp8,
    sparse_mla_gluon_narrow,
    sparse_mla_gluon_wide,
    triton_device,
)
from vllm_dsv32.kernels.sparse_mla_join_triton import join_splits, split_count
from vllm_dsv32.kernels.triton_compilation import Compilation
from vllm_dsv32.layout import KV_LORA_RANK, is_fp8_ds_mla, latent_fp8_views

__all__ = ["MAX_FP8_HEADS", "compilations", "sparse_mla"]

_LOG2_E = 1.4426950408889634
MAX_FP8_HEADS = sparse_mla_gluon_fp8.HEADS


@dataclass(frozen=True)
class _Launch:
    kernel: Any
    num_heads: int
    """Of a program."""
    num_keys: int
    """Of a tile."""
    num_warps: int


def _launch_of(kernel: Any, module: ModuleType) -> _Launch:
    return _Launch(kernel, module.HEADS, module.KEYS, module.NUM_WARPS)


_FP8 = _launch_of(sparse_mla_gluon_fp8.sparse_mla_fp8_kernel, sparse_mla_gluon_fp8)
_NARROW = _launch_of(sparse_mla_gluon_narrow.sparse_mla_narrow_kernel, sparse_mla_gluon_narrow)
_WIDE = _launch_of(sparse_mla_gluon_wide.sparse_mla_wide_kernel, sparse_mla_gluon_wide)


def sparse_mla(
    q: torch.Tensor,
    cache: torch.Tensor,
    topk_slot: torch.Tensor,
    num_valid: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`vllm_dsv32.kernels.sparse_mla.reference`; weights are rounded to bfloat16.

    Raises:
        ValueError: queries or a cache of another type; more heads than an fp8 cache is read for; or pages that are
            not aligned.
    """
    num_tokens, num_heads, _ = q.shape
    out = q.new_empty((num_tokens, num_heads, KV_LORA_RANK))
    lse = q.new_empty((num_tokens, num_heads), dtype=torch.float32)
    if num_tokens == 0:
        return out, lse
    launch = _launch(q, cache)
    num_programs = num_tokens * triton.cdiv(num_heads, launch.num_heads)
    num_concurrent = triton_device.num_multiprocessors(q.device)
    num_splits = split_count(num_programs, topk_slot.shape[1], num_concurrent, launch.num_keys)
    part_out, part_lse = out, lse
    if num_splits > 1:
        part_out = q.new_empty((num_tokens, num_splits, num_heads, KV_LORA_RANK), dtype=torch.float32)
        part_lse = q.new_empty((num_tokens, num_splits, num_heads), dtype=torch.float32)
    page_nbytes = cache.stride(0) * cache.itemsize
    if page_nbytes % 16:
        raise ValueError(f"latent cache: expected pages at multiples of 16 bytes, got one every {page_nbytes}")
    launch.kernel[(num_programs * num_splits,)](
        q.contiguous(),
        *_views(cache),
        topk_slot.contiguous(),
        num_valid,
        part_out,
        part_lse,
        scale * _LOG2_E,
        num_splits,
        topk_slot.shape[1],
        page_nbytes // 16,
        **_constexprs(launch, num_heads, cache.shape[1], num_splits > 1),
        num_warps=launch.num_warps,
    )
    if num_splits > 1:
        join_splits(part_out, part_lse, num_valid, launch.num_keys, out, lse)
    return out, lse


def _launch(q: torch.Tensor, cache: torch.Tensor) -> _Launch:
    num_heads = q.shape[1]
    if q.dtype != torch.bfloat16:
        raise ValueError(f"sparse_mla in Gluon takes queries in bfloat16, got {q.dtype}; choose triton")
    if is_fp8_ds_mla(cache):
        if num_heads > MAX_FP8_HEADS:
            raise ValueError(
                f"sparse_mla in Gluon takes at most {MAX_FP8_HEADS} heads with an fp8_ds_mla cache, "
                f"got {num_heads}; choose triton"
            )
        return _FP8
    if cache.dtype != torch.bfloat16:
        raise ValueError(
            f"sparse_mla in Gluon takes a cache in bfloat16 or fp8_ds_mla, got {cache.dtype}; choose triton"
        )
    return _NARROW if num_heads <= _NARROW.num_heads else _WIDE


def _views(cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rows; or of fp8, words of what is not rotated, its scales, and what is rotated."""
    if not is_fp8_ds_mla(cache):
        return (cache,)
    views = latent_fp8_views(cache)
    return views.nope_fp8.view(torch.int32), views.nope_scale, views.rope


def _constexprs(launch: _Launch, num_heads: int, block_size: int, split: bool) -> dict[str, object]:
    return {
        "NUM_HEADS": num_heads,
        "BLOCK_SIZE": block_size,
        "SPLIT": split,
        "HEADS": launch.num_heads,
        "KEYS": launch.num_keys,
    }


def compilations(capability: tuple[int, int]) -> Iterator[Compilation]:
    """The three kernels for DeepSeek-V3.2's 128 heads on one, eight or sixteen GPUs; none but for SM 90."""
    if capability != (9, 0):
        return
    bfloat16 = {"cache_ptr": "*bf16"}
    fp8 = {"word_ptr": "*i32", "scale_ptr": "*fp32", "rope_ptr": "*bf16"}
    for launch, cache, head_counts in (
        (_FP8, fp8, (8, 16)),
        (_NARROW, bfloat16, (8, 16)),
        (_WIDE, bfloat16, (128,)),
    ):
        for num_heads in head_counts:
            for split in (False, True):
                yield Compilation(
                    name=f"{launch.kernel.__name__}, {num_heads} heads, {split=}",
                    kernel=launch.kernel,
                    signature={
                        "q_ptr": "*bf16",
                        **cache,
                        "topk_slot_ptr": "*i32",
                        "num_valid_ptr": "*i32",
                        "out_ptr": "*fp32" if split else "*bf16",
                        "lse_ptr": "*fp32",
                        "scale_log2": "fp32",
                        "num_splits": "i32",
                        "num_slots": "i32",
                        "page_chunks": "i32",
                    },
                    constexprs=_constexprs(launch, num_heads, 64, split),
                    num_warps=launch.num_warps,
                    num_stages=1,
                )
