"""The two paged caches of a layer, as vLLM's cache manager sees them."""

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.kv_cache_interface import MLAAttentionSpec, SparseCacheRole, get_kv_quant_mode

from vllm_dsv32.attention.backend import IndexKeyBackend, SparseMlaBackend
from vllm_dsv32.attention.metadata import CacheMetadata
from vllm_dsv32.config import normalise_kv_cache_dtype
from vllm_dsv32.layout import FP8_DS_MLA, INDEX_KEY_NBYTES, LATENT_FP8_NBYTES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["IndexKeyCache", "LatentCache", "PagedCache"]


class PagedCache(torch.nn.Module, AttentionLayerBase):
    """One cache of one layer: tells vLLM its page format, and holds the memory that vLLM binds to it."""

    backend: ClassVar[type[SparseMlaBackend]]

    def __init__(self, prefix: str) -> None:
        """Args: prefix: the layer's name in vLLM, unique in the engine."""
        super().__init__()
        self.layer_name = prefix
        self.kv_cache = torch.empty(0)
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"two layers are called {prefix}")
        layers[prefix] = self

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take vLLM's ``[num_blocks, 1, block_size, width]`` as ``[num_blocks, block_size, width]``."""
        self.kv_cache = kv_cache.squeeze(1)

    def get_attn_backend(self) -> type[SparseMlaBackend]:
        """The class that vLLM asks about the metadata of this cache."""
        return self.backend

    @abstractmethod
    def get_kv_cache_spec(self, vllm_config: "VllmConfig") -> MLAAttentionSpec:
        """The page format."""

    def metadata(self) -> CacheMetadata | None:
        """The current step's; None when vLLM profiles, and in its V1 runner on idle data-parallel ranks."""
        metadata = get_forward_context().attn_metadata
        # A list holds one dict a micro-batch; vLLM narrows the context to the one that runs.
        if isinstance(metadata, list):
            metadata = metadata[0]
        return None if metadata is None else metadata[self.layer_name]


class LatentCache(PagedCache):
    """The rows that attention reads: the normalised latent and the rotated key part of every token."""

    backend = SparseMlaBackend

    def __init__(self, row_width: int, prefix: str) -> None:
        """Args: row_width: values a token, ``kv_lora_rank + qk_rope_head_dim``."""
        super().__init__(prefix)
        vllm_config = get_current_vllm_config()
        self.row_width = row_width
        # The configuration hook has normalised the target's dtype; a draft may bring its own.
        self.kv_cache_dtype = normalise_kv_cache_dtype(
            vllm_config.cache_config.cache_dtype, vllm_config.model_config.dtype
        )

    def get_kv_cache_spec(self, vllm_config: "VllmConfig") -> MLAAttentionSpec:
        """576 values of the model's dtype, or the opaque 656 bytes of ``fp8_ds_mla``."""
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            max_tp_shards=1,
            head_size=self.row_width,
            dtype=kv_cache_dtype_str_to_dtype(self.kv_cache_dtype, vllm_config.model_config),
            cache_dtype_str=self.kv_cache_dtype,
            kv_quant_mode=get_kv_quant_mode(self.kv_cache_dtype),
            state_content_bytes=LATENT_FP8_NBYTES if self.kv_cache_dtype == FP8_DS_MLA else None,
        )


class IndexKeyCache(PagedCache):
    """The quantised index key of every token."""

    backend = IndexKeyBackend

    def get_kv_cache_spec(self, vllm_config: "VllmConfig") -> MLAAttentionSpec:
        """132 bytes a token."""
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            max_tp_shards=1,
            head_size=INDEX_KEY_NBYTES,
            dtype=torch.uint8,
            cache_role=SparseCacheRole.INDEXER,
        )
