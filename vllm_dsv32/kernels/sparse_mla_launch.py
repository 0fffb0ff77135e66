"""How kernels of ``sparse_mla`` are launched, in Triton and in Gluon: in splits, whose results are joined."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_dsv32.kernels import triton_device
from vllm_dsv32.kernels.sparse_mla_join_triton import join_splits, split_count
from vllm_dsv32.kernels.triton_dependent_launch import launch_options
from vllm_dsv32.kernels.triton_device import ceil_div
from vllm_dsv32.layout import KV_LORA_RANK, is_fp8_ds_mla, latent_fp8_views

__all__ = ["Launch", "launch", "row_views"]

_LOG2_E = 1.4426950408889634
_CHUNK_NBYTES = 16


@dataclass(frozen=True)
class Launch:
    """A kernel, and what of it depends on the batch."""

    kernel: Any
    """Takes queries, views of the cache, slots and how many are valid, results, and four numbers."""
    num_heads: int
    """Of a program."""
    num_keys: int
    """Of a tile."""
    programs_per_sm: int
    """That run at once."""
    constexprs: Callable[[bool], dict[str, object]]
    """Given whether keys are split."""
    options: dict[str, Any]
    """Of the compiler."""


def launch(
    how: Launch,
    q: torch.Tensor,
    cache: torch.Tensor,
    views: tuple[torch.Tensor, ...],
    topk_slot: torch.Tensor,
    num_valid: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend; see :func:`vllm_dsv32.kernels.sparse_mla.reference`.

    Args:
        how: what is launched.
        q: as of the reference, like those that follow.
        cache: the whole of it.
        views: of it, as the kernel takes them.
        topk_slot: and which rows are attended to.
        num_valid: how many of them.
        scale: of scores.

    Raises:
        ValueError: pages of the cache are not aligned.
    """
    num_tokens, num_heads, _ = q.shape
    out = part_out = q.new_empty((num_tokens, num_heads, KV_LORA_RANK))
    lse = part_lse = q.new_empty((num_tokens, num_heads), dtype=torch.float32)
    if num_tokens == 0:
        return out, lse
    page_nbytes = cache.stride(0) * cache.itemsize
    if page_nbytes % _CHUNK_NBYTES:
        raise ValueError(
            f"latent cache: expected pages at multiples of {_CHUNK_NBYTES} bytes, got one every {page_nbytes}"
        )
    num_programs = num_tokens * ceil_div(num_heads, how.num_heads)
    num_concurrent = triton_device.num_multiprocessors(q.device) * how.programs_per_sm
    num_splits = split_count(num_programs, topk_slot.shape[1], num_concurrent, how.num_keys)
    if num_splits > 1:
        part_out = q.new_empty((num_tokens, num_splits, num_heads, KV_LORA_RANK), dtype=torch.float32)
        part_lse = q.new_empty((num_tokens, num_splits, num_heads), dtype=torch.float32)
    how.kernel[(num_programs * num_splits,)](
        q.contiguous(),
        *views,
        topk_slot.contiguous(),
        num_valid,
        part_out,
        part_lse,
        scale * _LOG2_E,
        num_splits,
        topk_slot.shape[1],
        page_nbytes // _CHUNK_NBYTES,
        **how.constexprs(num_splits > 1),
        **how.options,
        **launch_options(q.device),
    )
    if num_splits > 1:
        join_splits(part_out, part_lse, num_valid, how.num_keys, out, lse)
    return out, lse


def row_views(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is not rotated (of fp8 as words), its scales, and what is rotated."""
    if not is_fp8_ds_mla(cache):
        return cache, cache, cache[..., KV_LORA_RANK:]
    views = latent_fp8_views(cache)
    return views.nope_fp8.view(torch.int32), views.nope_scale, views.rope
