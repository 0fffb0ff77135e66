"""Operation ``index_insert``: LayerNorm, RoPE and quantisation of the index key, write to its cache."""

import torch

from vllm_dsv32.kernels.fp8 import quantise_ue8m0
from vllm_dsv32.kernels.rope import RopeLayout, rotate
from vllm_dsv32.layout import index_key_views

__all__ = ["reference"]


def reference(
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
    """Write ``quantise_ue8m0(rope(LayerNorm(index_k)))`` of each token to its slot.

    The order is fixed: norm (with bias), rotation of the **first** ``d`` dimensions, quantisation.
    Everything before the quantisation runs in float32.

    Args:
        index_k: ``[T, 128]``, before its norm.
        norm_weight: ``[128]``.
        norm_bias: ``[128]``.
        norm_eps: added to the variance.
        positions: int64 ``[T]``.
        cos_sin_cache: float32 ``[max_position, d]``, cosines then sines.
        rope_layout: NeoX halves for DeepSeek-V3.2.
        slots: int64 ``[T]``; tokens at -1 are padding and are not written.
        cache: uint8 of nominal shape ``[num_blocks, block_size, 132]``, written in place.
    """
    written = slots >= 0
    slots, positions, index_k = slots[written], positions[written], index_k[written]
    normed = torch.nn.functional.layer_norm(
        index_k.float(), index_k.shape[-1:], norm_weight.float(), norm_bias.float(), norm_eps
    )
    rope_dim = cos_sin_cache.shape[-1]
    rotated = rotate(normed[:, :rope_dim], cos_sin_cache[positions], rope_layout)
    key_fp8, scale = quantise_ue8m0(torch.cat((rotated, normed[:, rope_dim:]), dim=-1))
    views = index_key_views(cache)
    at = (slots // cache.shape[1], slots % cache.shape[1])
    views.key_fp8.view(torch.uint8)[at] = key_fp8.view(torch.uint8)
    views.key_scale[at] = scale
