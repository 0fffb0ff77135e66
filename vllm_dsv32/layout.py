"""Byte layouts of the two paged caches, in vLLM's exact format. Their only home.

A cache is a tensor ``[num_blocks, block_size, width]``; the block stride may exceed the page
(vLLM can interleave the pages of several layers), the inner strides are dense. A token lives at
``slot = block * block_size + offset``; -1 is the only sentinel.

Latent cache, one row a token:

* model dtype (bfloat16 or float32), width 576: 512 normalised ``kv_c`` | 64 rotated ``k_pe``.
* ``fp8_ds_mla``, uint8, width 656: 512 e4m3 | 4 float32 scales, one per 128 values, plain amax/448 |
  64 bfloat16 rotated ``k_pe``, unquantised.

Index-key cache, uint8, nominal width 132, but planar within a block: first ``block_size x 128`` e4m3
keys, then ``block_size`` float32 scales (powers of two), one a token. Indexing the nominal shape as
rows is wrong for every offset but zero; go through :func:`index_key_views`.

Always ``x = x_fp8 * x_scale``.
"""

from typing import NamedTuple

import torch

__all__ = [
    "FP8_DS_MLA",
    "FP8_MAX",
    "INDEX_HEAD_DIM",
    "INDEX_KEY_NBYTES",
    "KV_LORA_RANK",
    "LATENT_DIM",
    "LATENT_FP8_NBYTES",
    "LATENT_GROUP_SIZE",
    "ROPE_DIM",
    "IndexKeyViews",
    "LatentFp8Views",
    "index_key_views",
    "is_fp8_ds_mla",
    "latent_fp8_views",
]

FP8_DS_MLA = "fp8_ds_mla"
FP8_MAX = 448.0  # largest finite e4m3 value

KV_LORA_RANK = 512
ROPE_DIM = 64
LATENT_DIM = KV_LORA_RANK + ROPE_DIM
LATENT_GROUP_SIZE = 128
_SCALES_NBYTES = KV_LORA_RANK // LATENT_GROUP_SIZE * 4
LATENT_FP8_NBYTES = KV_LORA_RANK + _SCALES_NBYTES + ROPE_DIM * 2

INDEX_HEAD_DIM = 128
INDEX_KEY_NBYTES = INDEX_HEAD_DIM + 4


class LatentFp8Views(NamedTuple):
    """Typed views of an ``fp8_ds_mla`` cache; writing to them writes to the cache."""

    nope_fp8: torch.Tensor
    """float8_e4m3fn ``[num_blocks, block_size, 512]``"""
    nope_scale: torch.Tensor
    """float32 ``[num_blocks, block_size, 4]``"""
    rope: torch.Tensor
    """bfloat16 ``[num_blocks, block_size, 64]``"""


class IndexKeyViews(NamedTuple):
    """Typed views of an index-key cache; writing to them writes to the cache."""

    key_fp8: torch.Tensor
    """float8_e4m3fn ``[num_blocks, block_size, 128]``"""
    key_scale: torch.Tensor
    """float32 ``[num_blocks, block_size]``, powers of two"""


def is_fp8_ds_mla(cache: torch.Tensor) -> bool:
    """Whether a latent cache has the 656-byte format (else it holds the model's dtype)."""
    return cache.dtype == torch.uint8


def latent_fp8_views(cache: torch.Tensor) -> LatentFp8Views:
    """Split a uint8 cache ``[num_blocks, block_size, 656]`` into its typed parts.

    Raises:
        ValueError: the tensor is not such a cache.
    """
    _require_cache(cache, LATENT_FP8_NBYTES, "fp8_ds_mla latent cache")
    rope_begin = KV_LORA_RANK + _SCALES_NBYTES
    return LatentFp8Views(
        nope_fp8=cache[..., :KV_LORA_RANK].view(torch.float8_e4m3fn),
        nope_scale=cache[..., KV_LORA_RANK:rope_begin].view(torch.float32),
        rope=cache[..., rope_begin:].view(torch.bfloat16),
    )


def index_key_views(cache: torch.Tensor) -> IndexKeyViews:
    """Split a uint8 cache of nominal shape ``[num_blocks, block_size, 132]`` into its two planes.

    Raises:
        ValueError: the tensor is not such a cache.
    """
    _require_cache(cache, INDEX_KEY_NBYTES, "index-key cache")
    num_blocks, block_size, _ = cache.shape
    page = cache.as_strided(
        (num_blocks, block_size * INDEX_KEY_NBYTES), (cache.stride(0), 1), cache.storage_offset()
    )
    keys_nbytes = block_size * INDEX_HEAD_DIM
    return IndexKeyViews(
        key_fp8=page[:, :keys_nbytes].view(torch.float8_e4m3fn).unflatten(1, (block_size, INDEX_HEAD_DIM)),
        key_scale=page[:, keys_nbytes:].view(torch.float32),
    )


def _require_cache(cache: torch.Tensor, width: int, what: str) -> None:
    dense = cache.dim() == 3 and cache.stride(2) == 1 and cache.stride(1) == width
    if cache.dtype != torch.uint8 or cache.dim() != 3 or cache.shape[2] != width or not dense:
        raise ValueError(
            f"{what}: expected uint8 [num_blocks, block_size, {width}] with dense rows, "
            f"got {cache.dtype} {tuple(cache.shape)} with strides {cache.stride()}"
        )
