"""Rotary position embedding, in the two layouts that DeepSeek-V3.2 uses side by side.

The main attention rotates neighbouring pairs (interleaved); the indexer rotates halves (NeoX).
Mixing them up leaves the text coherent and silently lowers its quality, so the two are two functions,
and where a contract has to name one it takes a :class:`RopeLayout`.
"""

from enum import Enum

import torch

__all__ = ["RopeLayout", "rope_interleaved", "rope_neox", "rotate"]


class RopeLayout(Enum):
    """Which dimensions form the plane that a frequency rotates."""

    INTERLEAVED = "interleaved"
    """(0, 1), (2, 3), ..."""
    NEOX = "neox"
    """(0, d/2), (1, d/2 + 1), ..."""


def rope_interleaved(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs ``(x[2i], x[2i+1])``.

    Args:
        x: ``[T, ..., d]``.
        cos_sin: float32 ``[T, d]``, the rows of the tokens' positions: ``d/2`` cosines, then ``d/2`` sines.

    Returns:
        float32, the shape and order of ``x``.
    """
    cos, sin = _broadcast(cos_sin, x)
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def rope_neox(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs ``(x[i], x[i + d/2])``; arguments and result as in :func:`rope_interleaved`."""
    cos, sin = _broadcast(cos_sin, x)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate(x: torch.Tensor, cos_sin: torch.Tensor, layout: RopeLayout) -> torch.Tensor:
    """Apply the layout's function."""
    return _FUNCTIONS[layout](x, cos_sin)


_FUNCTIONS = {RopeLayout.INTERLEAVED: rope_interleaved, RopeLayout.NEOX: rope_neox}


def _broadcast(cos_sin: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = cos_sin.float().view(cos_sin.shape[0], *(1,) * (x.dim() - 2), cos_sin.shape[1])
    cos, sin = rows.chunk(2, dim=-1)
    return cos, sin
