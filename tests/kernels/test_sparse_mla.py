import pytest
import torch

from kernels import naive
from kernels.inputs import CACHE_FORMATS, close, implementations, latent_cache
from vllm_dsv32.kernels import sparse_mla
from vllm_dsv32.layout import latent_fp8_views

VALID = {
    "no tokens": [],
    "one key": [1],
    "no keys": [0],
    "all kinds": [0, 1, 15, 16, 17, 24],
    "full": [24, 24],
    "all empty": [0, 0, 0],
}


def filled(cache_format: str, generator: torch.Generator, num_blocks: int = 4) -> torch.Tensor:
    cache = latent_cache(num_blocks, 16, cache_format)
    if cache_format != "fp8_ds_mla":
        return cache.copy_(torch.randn(cache.shape, generator=generator))
    views = latent_fp8_views(cache)
    views.nope_fp8.copy_(torch.randn(views.nope_fp8.shape, generator=generator).to(torch.float8_e4m3fn))
    # Four scales that differ by far: one scale a row would be wrong by a factor.
    views.nope_scale.copy_(torch.tensor([0.1, 1.0, 0.03, 0.5]) * torch.rand(4, 16, 1, generator=generator))
    views.rope.copy_(torch.randn(views.rope.shape, generator=generator))
    return cache


@pytest.mark.parametrize("num_heads", [1, 3, 16])
@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
@pytest.mark.parametrize("num_valid", VALID.values(), ids=VALID)
@implementations("sparse_mla")
def test_output_and_lse(kernel, generator, num_valid, cache_format, num_heads):
    cache = filled(cache_format, generator)
    q = torch.randn(len(num_valid), num_heads, 576, generator=generator)
    slots = (
        torch.stack(
            [torch.randperm(64, generator=generator)[:24] for _ in num_valid] or [torch.empty(0, dtype=torch.long)]
        )
        .reshape(len(num_valid), 24)
        .int()
    )
    valid = torch.tensor(num_valid, dtype=torch.int32)
    for row, seen in enumerate(num_valid):
        slots[row, seen:] = -1
    out, lse = kernel(q, cache, slots, valid, 0.05)
    wanted_out, wanted_lse = naive.sparse_mla(q, cache, slots, valid, 0.05)
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
    close(lse, wanted_lse, rtol=1e-5, atol=1e-5)
    close(out, wanted_out, rtol=1e-4, atol=1e-5)
    again = kernel(q, cache, slots, valid, 0.05)
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])


@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
@implementations("sparse_mla")
def test_rows_past_the_count_are_not_read(kernel, generator, cache_format):
    """Unwritten rows are NaN, and stale slots behind the count point out of the cache."""
    cache = filled(cache_format, generator)
    poison = latent_cache(4, 16, cache_format)
    cache[1:] = poison[1:]
    q = torch.randn(2, 2, 576, generator=generator)
    slots = torch.tensor([[3, 7, 40, 2**30], [5, 40, 41, 42]], dtype=torch.int32)
    out, lse = kernel(q, cache, slots, torch.tensor([2, 1], dtype=torch.int32), 0.05)
    assert bool(out.isfinite().all())
    assert bool(lse.isfinite().all())


@implementations("sparse_mla")
def test_the_order_of_slots_does_not_matter(kernel, generator):
    cache = filled("float32", generator)
    q = torch.randn(1, 4, 576, generator=generator)
    slots = torch.randperm(64, generator=generator)[:20].int().unsqueeze(0)
    count = torch.tensor([20], dtype=torch.int32)
    out, lse = kernel(q, cache, slots, count, 0.05)
    flipped, flipped_lse = kernel(q, cache, slots.flip(1), count, 0.05)
    torch.testing.assert_close(out, flipped)
    torch.testing.assert_close(lse, flipped_lse)


@implementations("sparse_mla")
def test_large_scores_do_not_overflow(kernel, generator):
    cache = filled("float32", generator)
    q = 1e4 * torch.randn(1, 2, 576, generator=generator)
    slots = torch.arange(24, dtype=torch.int32).unsqueeze(0)
    out, lse = kernel(q, cache, slots, torch.tensor([24], dtype=torch.int32), 1.0)
    assert bool(out.isfinite().all())
    assert bool(lse.isfinite().all())


def test_chunks_of_tokens_give_the_same(generator, monkeypatch):
    cache = filled("float32", generator)
    q = torch.randn(5, 2, 576, generator=generator)
    slots = torch.randint(0, 64, (5, 24), generator=generator).int()
    count = torch.tensor([24, 3, 0, 17, 24], dtype=torch.int32)
    whole = sparse_mla.reference(q, cache, slots, count, 0.05)
    monkeypatch.setattr(sparse_mla, "_WORKSPACE_NBYTES", 1)
    chunked = sparse_mla.reference(q, cache, slots, count, 0.05)
    torch.testing.assert_close(whole, chunked)
