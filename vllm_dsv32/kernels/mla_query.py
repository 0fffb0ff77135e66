"""The absorbed queries of multi-head latent attention.

A part of the operation :mod:`vllm_dsv32.kernels.keys_and_queries`.
"""

from typing import NamedTuple

import torch

from vllm_dsv32.kernels.rope import rope_interleaved

__all__ = ["MlaQueries", "reference"]


class MlaQueries(NamedTuple):
    """The queries of tokens, and what takes them to the keys' space."""

    q: torch.Tensor
    """``[T, N, nope + rope]``, the nope part first."""
    w_uk_t: torch.Tensor
    """``[N, nope, 512]``."""


def reference(mla_queries: MlaQueries, positions: torch.Tensor, cos_sin_cache: torch.Tensor) -> torch.Tensor:
    """``[q_nope W_UK | rope_interleaved(q_pe)]``, so that keys are read as they lie in the latent cache.

    Multiplied and rotated in float32, rounded once.

    Args:
        mla_queries: of the tokens.
        positions: int64 ``[T]``.
        cos_sin_cache: float32 ``[max_position, rope]``, cosines then sines.

    Returns:
        ``[T, N, 512 + rope]`` in the dtype of ``q``.
    """
    q, w_uk_t = mla_queries
    nope_dim = w_uk_t.shape[1]
    # CPUs without bfloat16 units multiply in bfloat16 many times slower than in float32.
    latent = torch.bmm(q[..., :nope_dim].transpose(0, 1).float(), w_uk_t.float()).transpose(0, 1)
    rope = rope_interleaved(q[..., nope_dim:], cos_sin_cache[positions])
    return torch.cat((latent, rope), dim=-1).to(q.dtype)
