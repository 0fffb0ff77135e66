"""The two backend classes that vLLM asks about the caches' pages and metadata."""

from typing import NoReturn

from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_dsv32.attention.metadata import CacheMetadataBuilder, DsaMetadataBuilder

__all__ = ["GPU_BLOCK_SIZE", "IndexKeyBackend", "SparseMlaBackend"]

GPU_BLOCK_SIZE = 64
"""Tokens a page on GPUs, unless the user names a multiple of it."""


class SparseMlaBackend(AttentionBackend):
    """Of the latent cache.

    The layers name it themselves (:meth:`get_attn_backend`), so vLLM's selector, which refuses sparse
    attention on several platforms, is not asked.
    """

    @staticmethod
    def get_name() -> str:
        """As vLLM logs it."""
        return "DSV32_SPARSE_MLA"

    @staticmethod
    def get_builder_cls() -> type[CacheMetadataBuilder]:
        """The builder of a step's metadata."""
        return DsaMetadataBuilder

    @staticmethod
    def get_impl_cls() -> NoReturn:
        """There is none: vLLM's MLAAttention, which would use it, is not part of these layers."""
        raise NotImplementedError("the sparse attention layer calls the kernels itself")

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        """What a program on a GPU reads at once; 16 is forced on CPUs without AMX."""
        return [MultipleOf(GPU_BLOCK_SIZE if current_platform.is_cuda() else 16)]

    @classmethod
    def is_mla(cls) -> bool:
        """One latent row a token."""
        return True

    @classmethod
    def is_sparse(cls) -> bool:
        """Attends to selected rows only."""
        return True

    @classmethod
    def supports_pcp(cls) -> bool:
        """Prefill context parallelism is refused by the configuration hook."""
        return False

    @classmethod
    def supports_dcp(cls) -> bool:
        """Decode context parallelism is refused by the configuration hook."""
        return False


class IndexKeyBackend(SparseMlaBackend):
    """Of the index-key cache: the same blocks; what its tokens see is in the latent cache's metadata."""

    @staticmethod
    def get_name() -> str:
        """As vLLM logs it."""
        return "DSV32_INDEX_KEYS"

    @staticmethod
    def get_builder_cls() -> type[CacheMetadataBuilder]:
        """The builder of a step's metadata."""
        return CacheMetadataBuilder
