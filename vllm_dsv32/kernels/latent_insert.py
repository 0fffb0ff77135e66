"""What a token brings to the latent cache: RMSNorm of ``kv_c`` and RoPE of ``k_pe``, written to its slot.

A part of the operation :mod:`vllm_dsv32.kernels.keys_and_queries`.
"""

from typing import NamedTuple

import torch

from vllm_dsv32.kernels.fp8 import quantise_amax
from vllm_dsv32.kernels.rope import rope_interleaved
from vllm_dsv32.layout import LATENT_GROUP_SIZE, is_fp8_ds_mla, latent_fp8_views

__all__ = ["Latents", "reference", "rms_norm"]


class Latents(NamedTuple):
    """The latents of tokens, and where they go."""

    kv_c: torch.Tensor
    """``[T, 512]``, before its norm."""
    k_pe: torch.Tensor
    """``[T, 64]``, before its rotation."""
    norm_weight: torch.Tensor
    """``[512]``."""
    norm_eps: float
    """Added to the mean square."""
    slots: torch.Tensor
    """int64 ``[T]``; tokens at -1 are padding and are not written."""
    cache: torch.Tensor
    """Written in place; a layout of :mod:`vllm_dsv32.layout`."""


def reference(latents: Latents, positions: torch.Tensor, cos_sin_cache: torch.Tensor) -> None:
    """Write ``[RMSNorm(kv_c) | rope_interleaved(k_pe)]`` of each token to its slot.

    The norm and the rotation run in float32. In a model-dtype cache both are rounded once; in an
    ``fp8_ds_mla`` cache the latent is quantised in groups of 128 with the scale ``amax / 448``.

    Args:
        latents: of the tokens, and the cache.
        positions: int64 ``[T]``.
        cos_sin_cache: float32 ``[max_position, 64]``, cosines then sines.
    """
    written = latents.slots >= 0
    slots, cache = latents.slots[written], latents.cache
    latent = rms_norm(latents.kv_c[written], latents.norm_weight, latents.norm_eps)
    rope = rope_interleaved(latents.k_pe[written], cos_sin_cache[positions[written]])
    at = (slots // cache.shape[1], slots % cache.shape[1])
    if is_fp8_ds_mla(cache):
        views = latent_fp8_views(cache)
        latent_fp8, scale = quantise_amax(latent.unflatten(-1, (-1, LATENT_GROUP_SIZE)))
        # index_put has no float8 kernel on every device; bytes are bytes.
        views.nope_fp8.view(torch.uint8)[at] = latent_fp8.flatten(-2).view(torch.uint8)
        views.nope_scale[at] = scale
        views.rope[at] = rope.to(views.rope.dtype)
    else:
        cache[at] = torch.cat((latent, rope), dim=-1).to(cache.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
