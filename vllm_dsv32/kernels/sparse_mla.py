"""Operation ``sparse_mla``: attention of each token over its own list of slots of the latent cache."""

import torch

from vllm_dsv32.layout import KV_LORA_RANK, is_fp8_ds_mla, latent_fp8_views

__all__ = ["gather_latent", "reference"]

_WORKSPACE_NBYTES = 64 << 20
"""Bound on the gathered rows that the reference holds at once."""


def reference(
    q: torch.Tensor,
    cache: torch.Tensor,
    topk_slot: torch.Tensor,
    num_valid: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``softmax(scale * q . row) . row[:512]`` over the first ``num_valid`` slots of each token.

    Args:
        q: ``[T, N, 576]``, ``mla_q`` of ``keys_and_queries``.
        cache: the latent cache, in a layout of :mod:`vllm_dsv32.layout`.
        topk_slot: int32 ``[T, K]``; slots past ``num_valid`` are not read.
        num_valid: int32 ``[T]``, 0 to K.
        scale: of the scores, before the softmax.

    Returns:
        ``out``, ``[T, N, 512]`` in the dtype of ``q``, and ``lse``, float32 ``[T, N]``: the natural
        logarithm of the softmax's denominator. A token without slots gives zeros and -inf.
    """
    num_tokens, num_heads, _ = q.shape
    out = q.new_zeros((num_tokens, num_heads, KV_LORA_RANK))
    lse = q.new_full((num_tokens, num_heads), -torch.inf, dtype=torch.float32)
    widest = int(num_valid.max()) if num_tokens else 0
    if widest == 0:
        return out, lse
    step = max(1, _WORKSPACE_NBYTES // (4 * widest * q.shape[-1]))
    for begin in range(0, num_tokens, step):
        rows = slice(begin, begin + step)
        valid = torch.arange(widest, device=q.device) < num_valid[rows].unsqueeze(-1)
        # Tokens share most of their slots: each is dequantised once. What is not valid may name any row, and a
        # row may hold anything, NaN included; zero times NaN is not zero.
        slots, inverse = topk_slot[rows, :widest].masked_fill(~valid, -1).unique(return_inverse=True)
        distinct = gather_latent(cache, slots.clamp(min=0)).masked_fill((slots < 0).unsqueeze(-1), 0.0)
        latent = distinct[inverse]
        scores = torch.einsum("tnd,tkd->tnk", q[rows].float(), latent) * scale
        scores = scores.masked_fill(~valid.unsqueeze(1), -torch.inf)
        lse[rows] = torch.logsumexp(scores, dim=-1)
        # exp(-inf - -inf) is NaN; a token without slots has no weights at all.
        weights = torch.exp(scores - lse[rows].unsqueeze(-1)).masked_fill(~valid.unsqueeze(1), 0.0)
        out[rows] = torch.einsum("tnk,tkd->tnd", weights, latent[..., :KV_LORA_RANK]).to(q.dtype)
    return out, lse


def gather_latent(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Rows of the cache as float32 ``[..., 576]``, dequantised; ``slots`` are valid, of any shape."""
    slots = slots.long()
    at = (slots // cache.shape[1], slots % cache.shape[1])
    if not is_fp8_ds_mla(cache):
        return cache[at].float()
    views = latent_fp8_views(cache)
    nope = views.nope_fp8.view(torch.uint8)[at].view(torch.float8_e4m3fn).float()
    scale = views.nope_scale[at]
    nope = (nope.unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)).flatten(-2)
    return torch.cat((nope, views.rope[at].float()), dim=-1)
