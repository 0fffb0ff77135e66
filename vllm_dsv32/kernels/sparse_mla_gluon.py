"""Operation ``sparse_mla`` for SM 90 in Gluon, which takes bfloat16 queries.

Four kernels: for few heads and for many, on either cache format. All split the keys of a token as the Triton kernel
does, and join the results in its second launch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch

from vllm_dsv32.kernels import (
    sparse_mla_gluon_fp8,
    sparse_mla_gluon_fp8_wide,
    sparse_mla_gluon_narrow,
    sparse_mla_gluon_wide,
)
from vllm_dsv32.kernels.sparse_mla_launch import Launch, launch, row_views
from vllm_dsv32.kernels.triton_compilation import Compilation
from vllm_dsv32.kernels.triton_dependent_launch import dependence
from vllm_dsv32.layout import is_fp8_ds_mla

__all__ = ["compilations", "sparse_mla", "takes_fp8"]

_MIN_FP8_WIDE_HEADS = 33
"""An H200 was faster in Triton with 32 heads, and slower with 48 and more."""


@dataclass(frozen=True)
class _Variant:
    kernel: Any
    num_heads: int
    """Of a program."""
    num_keys: int
    """Of a tile."""
    num_warps: int

    @classmethod
    def of(cls, kernel: Any, module: ModuleType) -> "_Variant":
        return cls(kernel, module.HEADS, module.KEYS, module.NUM_WARPS)

    def constexprs(self, num_heads: int, block_size: int, split: bool) -> dict[str, object]:
        return {
            "NUM_HEADS": num_heads,
            "BLOCK_SIZE": block_size,
            "SPLIT": split,
            "HEADS": self.num_heads,
            "KEYS": self.num_keys,
        }


_FP8 = _Variant.of(sparse_mla_gluon_fp8.sparse_mla_fp8_kernel, sparse_mla_gluon_fp8)
_FP8_WIDE = _Variant.of(sparse_mla_gluon_fp8_wide.sparse_mla_fp8_wide_kernel, sparse_mla_gluon_fp8_wide)
_NARROW = _Variant.of(sparse_mla_gluon_narrow.sparse_mla_narrow_kernel, sparse_mla_gluon_narrow)
_WIDE = _Variant.of(sparse_mla_gluon_wide.sparse_mla_wide_kernel, sparse_mla_gluon_wide)


def takes_fp8(num_heads: int) -> bool:
    """Whether there is a kernel for so many heads with an ``fp8_ds_mla`` cache."""
    return num_heads <= _FP8.num_heads or num_heads >= _MIN_FP8_WIDE_HEADS


def sparse_mla(
    q: torch.Tensor,
    cache: torch.Tensor,
    topk_slot: torch.Tensor,
    num_valid: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`vllm_dsv32.kernels.sparse_mla.reference`; weights are rounded to bfloat16.

    Raises:
        ValueError: queries or a cache of another type; a number of heads that an fp8 cache is not read for; or
            pages that are not aligned.
    """
    variant = _variant(q, cache)
    how = Launch(
        kernel=variant.kernel,
        num_heads=variant.num_heads,
        num_keys=variant.num_keys,
        programs_per_sm=1,
        constexprs=partial(variant.constexprs, q.shape[1], cache.shape[1]),
        options={"num_warps": variant.num_warps},
    )
    views = row_views(cache) if is_fp8_ds_mla(cache) else (cache,)
    return launch(how, q, cache, views, topk_slot, num_valid, scale)


def _variant(q: torch.Tensor, cache: torch.Tensor) -> _Variant:
    num_heads = q.shape[1]
    if q.dtype != torch.bfloat16:
        raise ValueError(f"sparse_mla in Gluon takes queries in bfloat16, got {q.dtype}; choose triton")
    if is_fp8_ds_mla(cache):
        if not takes_fp8(num_heads):
            raise ValueError(
                f"sparse_mla in Gluon takes up to {_FP8.num_heads} heads, or {_MIN_FP8_WIDE_HEADS} and more, "
                f"with an fp8_ds_mla cache, got {num_heads}; choose triton"
            )
        return _FP8 if num_heads <= _FP8.num_heads else _FP8_WIDE
    if cache.dtype != torch.bfloat16:
        raise ValueError(
            f"sparse_mla in Gluon takes a cache in bfloat16 or fp8_ds_mla, got {cache.dtype}; choose triton"
        )
    return _NARROW if num_heads <= _NARROW.num_heads else _WIDE


def compilations(capability: tuple[int, int]) -> Iterator[Compilation]:
    """The four kernels for DeepSeek-V3.2's 128 heads on one, eight or sixteen GPUs; none but for SM 90."""
    if capability != (9, 0):
        return
    bfloat16 = {"cache_ptr": "*bf16"}
    fp8 = {"word_ptr": "*i32", "scale_ptr": "*fp32", "rope_ptr": "*bf16"}
    for variant, cache, head_counts in (
        (_FP8, fp8, (8, 16)),
        (_FP8_WIDE, fp8, (128,)),
        (_NARROW, bfloat16, (8, 16)),
        (_WIDE, bfloat16, (128,)),
    ):
        for num_heads in head_counts:
            for split in (False, True):
                yield Compilation(
                    name=f"{variant.kernel.__name__}, {num_heads} heads, {split=}",
                    kernel=variant.kernel,
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
                    constexprs=variant.constexprs(num_heads, 64, split) | dependence(capability),
                    num_warps=variant.num_warps,
                    num_stages=1,
                )
