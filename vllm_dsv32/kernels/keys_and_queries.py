"""Operation ``keys_and_queries``: each token's keys into both caches, and its queries as they are multiplied."""

import torch

from vllm_dsv32.kernels import index_insert, index_query, latent_insert, mla_query
from vllm_dsv32.kernels.index_insert import IndexKeys
from vllm_dsv32.kernels.index_query import IndexQueries
from vllm_dsv32.kernels.latent_insert import Latents
from vllm_dsv32.kernels.mla_query import MlaQueries
from vllm_dsv32.kernels.rope import RopeLayout

__all__ = ["reference"]


def reference(
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    index_rope_layout: RopeLayout,
    latents: Latents,
    index_keys: IndexKeys,
    index_queries: IndexQueries,
    mla_queries: MlaQueries,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Write both keys of each token to their slots, and return its queries; no part depends on another.

    The parts have their equations and shapes in their modules. The slots of a token in the two caches may
    differ, and so may the sizes of blocks.

    Args:
        positions: int64 ``[T]``, within the table for padding too, as its queries are computed.
        cos_sin_cache: float32 ``[max_position, 64]``, cosines then sines.
        index_rope_layout: of index keys and queries: NeoX halves for DeepSeek-V3.2. Attention interleaves.
        latents: see :func:`vllm_dsv32.kernels.latent_insert.reference`.
        index_keys: see :func:`vllm_dsv32.kernels.index_insert.reference`.
        index_queries: see :func:`vllm_dsv32.kernels.index_query.reference`.
        mla_queries: see :func:`vllm_dsv32.kernels.mla_query.reference`.

    Returns:
        ``mla_q``, ``[T, N, 576]`` in the dtype of ``q``; ``q_fp8``, float8_e4m3fn ``[T, H, 128]``; and
        ``weights``, float32 ``[T, H]``.
    """
    latent_insert.reference(latents, positions, cos_sin_cache)
    index_insert.reference(index_keys, positions, cos_sin_cache, index_rope_layout)
    q_fp8, weights = index_query.reference(index_queries, positions, cos_sin_cache, index_rope_layout)
    return mla_query.reference(mla_queries, positions, cos_sin_cache), q_fp8, weights
