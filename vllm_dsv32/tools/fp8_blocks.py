"""Weights in DeepSeek's fp8 block format: e4m3 values, one power-of-two scale per 128x128 block."""

import math
from typing import Final

import torch

__all__ = ["BLOCK_SIZE", "dequantize_blocks", "quantize_blocks"]

BLOCK_SIZE: Final = 128
"""Rows and columns of a block."""

E4M3_MAX: Final = 448.0


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a matrix block by block.

    ``scale = 2 ** ceil(log2(amax / 448))`` and ``weight_fp8 = round(weight / scale)``: the scale is rounded
    up to a power of two (ue8m0) *before* it divides, so that no value exceeds e4m3's range.

    Args:
        weight: float ``[rows, cols]``; neither has to be a multiple of 128.

    Returns:
        ``weight_fp8``, float8_e4m3fn ``[rows, cols]``, and ``weight_scale``, float32
        ``[ceil(rows / 128), ceil(cols / 128)]``, which checkpoints call ``weight_scale_inv``;
        ``weight = weight_fp8 * weight_scale`` up to e4m3's rounding. A block of zeros has scale 1.
    """
    rows, cols = weight.shape
    blocks = (math.ceil(rows / BLOCK_SIZE), math.ceil(cols / BLOCK_SIZE))
    padded = weight.new_zeros(blocks[0] * BLOCK_SIZE, blocks[1] * BLOCK_SIZE, dtype=torch.float32)
    padded[:rows, :cols] = weight
    tiles = padded.view(blocks[0], BLOCK_SIZE, blocks[1], BLOCK_SIZE)
    amax = tiles.abs().amax(dim=(1, 3))
    exponent = torch.ceil(torch.log2(amax / E4M3_MAX))
    scale = torch.where(amax > 0, torch.exp2(exponent), 1.0)
    values = (tiles / scale[:, None, :, None]).view_as(padded)[:rows, :cols]
    return values.to(torch.float8_e4m3fn).contiguous(), scale


def dequantize_blocks(weight_fp8: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """Undo :func:`quantize_blocks`.

    Args:
        weight_fp8: float8_e4m3fn ``[rows, cols]``.
        weight_scale: float32 ``[ceil(rows / 128), ceil(cols / 128)]``.

    Returns:
        float32 ``[rows, cols]``. With power-of-two scales every value is exact in bfloat16 too: e4m3 has four
        significant bits, bfloat16 eight.
    """
    rows, cols = weight_fp8.shape
    scale = weight_scale.repeat_interleave(BLOCK_SIZE, dim=0).repeat_interleave(BLOCK_SIZE, dim=1)
    return weight_fp8.float() * scale[:rows, :cols]
