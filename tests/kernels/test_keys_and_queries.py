"""``keys_and_queries`` as a whole; test_inserts.py and test_queries.py test its parts."""

import pytest
import torch

from kernels.inputs import CACHE_FORMATS, close, cos_sin_cache, implementations, index_cache, latent_cache
from kernels.parts import EPS
from vllm_dsv32.kernels import keys_and_queries
from vllm_dsv32.kernels.index_insert import IndexKeys
from vllm_dsv32.kernels.index_query import IndexQueries
from vllm_dsv32.kernels.latent_insert import Latents
from vllm_dsv32.kernels.mla_query import MlaQueries
from vllm_dsv32.kernels.rope import RopeLayout
from vllm_dsv32.layout import index_key_views, latent_fp8_views


class Batch:
    """Arguments of the operation, twice the same from the same seed; the caches differ in blocks and slots."""

    def __init__(self, num_tokens: int, num_heads: int, num_index_heads: int, cache_format: str = "bfloat16"):
        generator = torch.Generator().manual_seed(num_tokens)
        dtype = torch.float32 if cache_format == "float32" else torch.bfloat16

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        def slots(num_slots: int, padding: int) -> torch.Tensor:
            order = torch.randperm(num_slots, generator=generator)[:num_tokens]
            return order.masked_fill(torch.arange(num_tokens) % 5 == padding, -1)

        self.positions = torch.randint(0, 300, (num_tokens,), generator=generator)
        self.latents = Latents(
            normal(num_tokens, 512).to(dtype),
            normal(num_tokens, 64).to(dtype),
            1 + 0.1 * normal(512).to(dtype),
            EPS,
            slots(64, padding=2),
            latent_cache(4, 16, cache_format),
        )
        self.index_keys = IndexKeys(
            normal(num_tokens, 128).to(dtype),
            1 + 0.1 * normal(128),
            normal(128),
            2 * EPS,
            slots(96, padding=3),
            index_cache(3, 32),
        )
        self.index_queries = IndexQueries(
            normal(num_tokens, num_index_heads, 128).to(dtype), normal(num_tokens, num_index_heads)
        )
        self.mla_queries = MlaQueries(
            normal(num_tokens, num_heads, 192).to(dtype), (normal(num_heads, 128, 512) * 128**-0.5).to(dtype)
        )

    def run(self, kernel, layout: RopeLayout = RopeLayout.NEOX) -> tuple[torch.Tensor, ...]:
        parts = (self.latents, self.index_keys, self.index_queries, self.mla_queries)
        return kernel(self.positions, cos_sin_cache(), layout, *parts)

    def caches(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.latents.cache.view(torch.uint8), self.index_keys.cache


@pytest.mark.parametrize("layout", RopeLayout)
@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_index_heads"),
    [(1, 16, 64), (1, 1, 32), (2, 128, 128), (4, 3, 64), (5, 16, 32), (9, 7, 5), (20, 3, 5), (64, 1, 3)],
)
@implementations("keys_and_queries")
def test_every_part_is_the_references(kernel, num_tokens, num_heads, num_index_heads, cache_format, layout):
    got, again, wanted = (Batch(num_tokens, num_heads, num_index_heads, cache_format) for _ in range(3))
    mla_q, q_fp8, weights = got.run(kernel, layout)
    wanted_mla_q, wanted_q_fp8, wanted_weights = wanted.run(keys_and_queries.reference, layout)
    assert (mla_q.shape, mla_q.dtype) == (wanted_mla_q.shape, wanted_mla_q.dtype)
    rtol, atol = (1e-5, 1e-5) if cache_format == "float32" else (2**-7, 1e-3)
    close(mla_q, wanted_mla_q, rtol=rtol, atol=atol)
    assert torch.equal(mla_q[..., 512:], wanted_mla_q[..., 512:])
    assert torch.equal(q_fp8.view(torch.uint8), wanted_q_fp8.view(torch.uint8))
    assert torch.equal(weights, wanted_weights)
    keys, wanted_keys = index_key_views(got.index_keys.cache), index_key_views(wanted.index_keys.cache)
    close(keys.key_scale, wanted_keys.key_scale, rtol=0, atol=0)
    close(keys.key_fp8.float(), wanted_keys.key_fp8.float(), rtol=2**-3, atol=2**-9)
    if cache_format == "fp8_ds_mla":
        rows, wanted_rows = latent_fp8_views(got.latents.cache), latent_fp8_views(wanted.latents.cache)
        close(rows.nope_scale, wanted_rows.nope_scale, rtol=1e-6, atol=0)
        close(rows.nope_fp8.float(), wanted_rows.nope_fp8.float(), rtol=2**-3, atol=2**-9)
        close(rows.rope, wanted_rows.rope, rtol=0, atol=0)
    else:
        rtol = 1e-6 if cache_format == "float32" else 2**-7
        close(got.latents.cache, wanted.latents.cache, rtol=rtol, atol=1e-6)

    repeated = again.run(kernel, layout)
    for ours, second in zip((mla_q, q_fp8, weights, *got.caches()), (*repeated, *again.caches()), strict=True):
        assert torch.equal(ours.view(torch.uint8), second.view(torch.uint8))


@implementations("keys_and_queries")
def test_an_empty_batch(kernel):
    batch = Batch(0, 4, 8)
    before = [cache.clone() for cache in batch.caches()]
    mla_q, q_fp8, weights = batch.run(kernel)
    assert (mla_q.shape, mla_q.dtype) == ((0, 4, 576), torch.bfloat16)
    assert (q_fp8.shape, q_fp8.dtype) == ((0, 8, 128), torch.float8_e4m3fn)
    assert (weights.shape, weights.dtype) == ((0, 8), torch.float32)
    assert all(map(torch.equal, batch.caches(), before))


@implementations("keys_and_queries")
def test_padding_has_queries_and_no_keys(kernel):
    batch, wanted = Batch(6, 4, 8), Batch(6, 4, 8)
    before = [cache.clone() for cache in batch.caches()]
    batch.latents.slots.fill_(-1)
    batch.index_keys.slots.fill_(-1)
    queries = batch.run(kernel)
    assert all(map(torch.equal, batch.caches(), before))
    for ours, theirs in zip(queries, wanted.run(kernel), strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
