"""Quantisation to fp8 e4m3, always with ``x = x_fp8 * x_scale``."""

import torch

from vllm_dsv32.layout import FP8_MAX

__all__ = ["AMAX_FLOOR", "quantise_amax", "quantise_ue8m0"]

AMAX_FLOOR = 1e-4
"""Rows below it are quantised as if their largest magnitude were this (DeepSeek's own floor)."""


def quantise_amax(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise along the last dimension with the scale ``amax / 448``.

    Args:
        x: ``[..., n]``.

    Returns:
        float8_e4m3fn ``[..., n]`` and the float32 scale ``[...]``.
    """
    scale = _amax(x) / FP8_MAX
    return _divide(x, scale), scale


def quantise_ue8m0(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise along the last dimension with ``amax / 448`` rounded up to a power of two.

    The scale is rounded first and the values are divided by the rounded one: the other order
    multiplies the error.

    Args:
        x: ``[..., n]``.

    Returns:
        float8_e4m3fn ``[..., n]`` and the float32 scale ``[...]``, a power of two.
    """
    # frexp is exact where ceil(log2(.)) may round a power of two up to the next one.
    mantissa, exponent = torch.frexp(_amax(x) / FP8_MAX)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    scale = torch.ldexp(torch.ones_like(mantissa), exponent)
    return _divide(x, scale), scale


def _amax(x: torch.Tensor) -> torch.Tensor:
    return x.float().abs().amax(dim=-1).clamp(min=AMAX_FLOOR)


def _divide(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    # The clamp catches the last-bit excess of amax / (amax / 448); beyond 448 e4m3 has only NaN.
    return (x.float() / scale.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
