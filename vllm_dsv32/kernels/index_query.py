"""RoPE and quantisation of the index queries, their scales folded into the weights of the heads.

A part of the operation :mod:`vllm_dsv32.kernels.keys_and_queries`.
"""

from typing import NamedTuple

import torch

from vllm_dsv32.kernels.fp8 import quantise_ue8m0
from vllm_dsv32.kernels.rope import RopeLayout, rotate

__all__ = ["IndexQueries", "reference"]


class IndexQueries(NamedTuple):
    """The index queries of tokens."""

    index_q: torch.Tensor
    """``[T, H, D]``; the **first** ``d`` of the D dimensions are rotary."""
    head_weights: torch.Tensor
    """float32 ``[T, H]``, the output of ``weights_proj``."""


def reference(
    index_queries: IndexQueries, positions: torch.Tensor, cos_sin_cache: torch.Tensor, rope_layout: RopeLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise ``rope(index_q)`` per row, and fold everything constant per head into its weight.

    ``I[t, s] = sum_h w[t, h] * relu(q[t, h] . k[s])`` with ``w = head_weights * H^-0.5 * D^-0.5``; a
    row's scale is positive, so it moves out of the ReLU into ``w``.

    Args:
        index_queries: of the tokens.
        positions: int64 ``[T]``.
        cos_sin_cache: float32 ``[max_position, d]``, cosines then sines.
        rope_layout: NeoX halves for DeepSeek-V3.2.

    Returns:
        ``q_fp8``, float8_e4m3fn ``[T, H, D]``, and ``weights``, float32 ``[T, H]``.
    """
    index_q, head_weights = index_queries
    num_heads, head_dim = index_q.shape[1:]
    rope_dim = cos_sin_cache.shape[-1]
    rotated = rotate(index_q[..., :rope_dim], cos_sin_cache[positions], rope_layout)
    q_fp8, q_scale = quantise_ue8m0(torch.cat((rotated, index_q[..., rope_dim:].float()), dim=-1))
    weights = head_weights.float() * (num_heads**-0.5 * head_dim**-0.5) * q_scale
    return q_fp8, weights
