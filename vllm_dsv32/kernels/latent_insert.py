"""Operation ``latent_insert``: RMSNorm of ``kv_c``, RoPE of ``k_pe``, write to the latent cache."""

import torch

from vllm_dsv32.kernels.fp8 import quantise_amax
from vllm_dsv32.kernels.rope import rope_interleaved
from vllm_dsv32.layout import LATENT_GROUP_SIZE, is_fp8_ds_mla, latent_fp8_views

__all__ = ["reference", "rms_norm"]


def reference(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    slots: torch.Tensor,
    cache: torch.Tensor,
) -> None:
    """Write ``[RMSNorm(kv_c) | rope_interleaved(k_pe)]`` of each token to its slot.

    The norm and the rotation run in float32. In a model-dtype cache both are rounded once; in an
    ``fp8_ds_mla`` cache the latent is quantised in groups of 128 with the scale ``amax / 448``.

    Args:
        kv_c: ``[T, 512]``, before its norm.
        k_pe: ``[T, 64]``, before its rotation.
        norm_weight: ``[512]``.
        norm_eps: added to the mean square.
        positions: int64 ``[T]``.
        cos_sin_cache: float32 ``[max_position, 64]``, cosines then sines.
        slots: int64 ``[T]``; tokens at -1 are padding and are not written.
        cache: written in place; a layout of :mod:`vllm_dsv32.layout`.
    """
    written = slots >= 0
    slots, positions = slots[written], positions[written]
    latent = rms_norm(kv_c[written], norm_weight, norm_eps)
    rope = rope_interleaved(k_pe[written], cos_sin_cache[positions])
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
