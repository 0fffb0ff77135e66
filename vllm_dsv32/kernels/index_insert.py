"""What a token brings to the index-key cache: LayerNorm, RoPE and quantisation of its key, written to its slot.

A part of the operation :mod:`vllm_dsv32.kernels.keys_and_queries`.
"""

from typing import NamedTuple

import torch

from vllm_dsv32.kernels.fp8 import quantise_ue8m0
from vllm_dsv32.kernels.rope import RopeLayout, rotate
from vllm_dsv32.layout import index_key_views

__all__ = ["IndexKeys", "reference"]


class IndexKeys(NamedTuple):
    """The index keys of tokens, and where they go."""

    index_k: torch.Tensor
    """``[T, 128]``, before its norm."""
    norm_weight: torch.Tensor
    """``[128]``."""
    norm_bias: torch.Tensor
    """``[128]``."""
    norm_eps: float
    """Added to the variance."""
    slots: torch.Tensor
    """int64 ``[T]``; tokens at -1 are padding and are not written."""
    cache: torch.Tensor
    """uint8 of nominal shape ``[num_blocks, block_size, 132]``, written in place."""


def reference(
    index_keys: IndexKeys, positions: torch.Tensor, cos_sin_cache: torch.Tensor, rope_layout: RopeLayout
) -> None:
    """Write ``quantise_ue8m0(rope(LayerNorm(index_k)))`` of each token to its slot.

    The order is fixed: norm (with bias), rotation of the **first** ``d`` dimensions, quantisation.
    Everything before the quantisation runs in float32.

    Args:
        index_keys: of the tokens, and the cache.
        positions: int64 ``[T]``.
        cos_sin_cache: float32 ``[max_position, d]``, cosines then sines.
        rope_layout: NeoX halves for DeepSeek-V3.2.
    """
    written = index_keys.slots >= 0
    slots, cache = index_keys.slots[written], index_keys.cache
    index_k = index_keys.index_k[written].float()
    weight, bias = index_keys.norm_weight.float(), index_keys.norm_bias.float()
    normed = torch.nn.functional.layer_norm(index_k, index_k.shape[-1:], weight, bias, index_keys.norm_eps)
    rope_dim = cos_sin_cache.shape[-1]
    rotated = rotate(normed[:, :rope_dim], cos_sin_cache[positions[written]], rope_layout)
    key_fp8, scale = quantise_ue8m0(torch.cat((rotated, normed[:, rope_dim:]), dim=-1))
    views = index_key_views(cache)
    at = (slots // cache.shape[1], slots % cache.shape[1])
    views.key_fp8.view(torch.uint8)[at] = key_fp8.view(torch.uint8)
    views.key_scale[at] = scale
