import pytest
import torch

from kernels import naive
from kernels.inputs import CACHE_FORMATS, close, implementations, latent_cache, on_device
from vllm_dsv32.kernels import sparse_mla, sparse_mla_launch, sparse_mla_triton
from vllm_dsv32.kernels.sparse_mla_join_triton import split_count
from vllm_dsv32.layout import latent_fp8_views

VALID = {
    "no tokens": [],
    "one key": [1],
    "no keys": [0],
    "all kinds": [0, 1, 15, 16, 17, 24],
    "full": [24, 24],
    "all empty": [0, 0, 0],
}


def filled(cache_format: str, generator: torch.Generator, num_blocks: int = 4, gap_nbytes: int = 0) -> torch.Tensor:
    cache = latent_cache(num_blocks, 16, cache_format, gap_nbytes=gap_nbytes)
    if cache_format != "fp8_ds_mla":
        return cache.copy_(torch.randn(cache.shape, generator=generator))
    views = latent_fp8_views(cache)
    views.nope_fp8.copy_(torch.randn(views.nope_fp8.shape, generator=generator).to(torch.float8_e4m3fn))
    # Four scales that differ by far: one scale a row would be wrong by a factor.
    views.nope_scale.copy_(torch.tensor([0.1, 1.0, 0.03, 0.5]) * torch.rand(num_blocks, 16, 1, generator=generator))
    views.rope.copy_(torch.randn(views.rope.shape, generator=generator))
    return cache


@pytest.mark.parametrize("num_heads", [1, 3, 16])
@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
@pytest.mark.parametrize("num_valid", VALID.values(), ids=VALID)
@implementations("sparse_mla", dtype=torch.float32)
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
@implementations("sparse_mla", dtype=torch.float32)
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


@implementations("sparse_mla", dtype=torch.float32)
def test_the_order_of_slots_does_not_matter(kernel, generator):
    cache = filled("float32", generator)
    q = torch.randn(1, 4, 576, generator=generator)
    slots = torch.randperm(64, generator=generator)[:20].int().unsqueeze(0)
    count = torch.tensor([20], dtype=torch.int32)
    out, lse = kernel(q, cache, slots, count, 0.05)
    flipped, flipped_lse = kernel(q, cache, slots.flip(1), count, 0.05)
    torch.testing.assert_close(out, flipped)
    torch.testing.assert_close(lse, flipped_lse)


@implementations("sparse_mla", dtype=torch.float32)
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


@pytest.mark.parametrize(
    ("cache_format", "num_heads", "num_valid"),
    [
        ("bfloat16", 8, [1, 15, 31, 64, 70]),
        ("fp8_ds_mla", 8, [1, 15, 31, 64, 70]),
        ("bfloat16", 16, [0, 63]),
        ("fp8_ds_mla", 16, [0, 63]),
        ("bfloat16", 17, [33, 63]),
        ("bfloat16", 32, [65, 0]),
    ],
)
@implementations("sparse_mla")
def test_bfloat16_queries_lose_no_more_than_the_rounding_of_weights(
    kernel, generator, cache_format, num_heads, num_valid
):
    assert_rounded(kernel, generator, cache_format, num_heads, num_valid)


@pytest.mark.parametrize(("num_heads", "num_valid"), [(17, [33, 63]), (32, [65])])
@implementations("sparse_mla", num_heads=32, cache_format="fp8_ds_mla")
def test_many_heads_on_an_fp8_cache_lose_no_more_than_that(kernel, generator, num_heads, num_valid):
    assert_rounded(kernel, generator, "fp8_ds_mla", num_heads, num_valid)


def assert_rounded(kernel, generator, cache_format, num_heads, num_valid):
    """Scores are sums of exact products, so that lse is tight; weights and the output are rounded to 2^-9.

    The counts lie around the ends of tiles of 16 (interpreted), 32 and 64 keys.
    """
    cache = filled(cache_format, generator, num_blocks=8, gap_nbytes=128)
    q = torch.randn(len(num_valid), num_heads, 576, generator=generator).bfloat16()
    slots = torch.stack([torch.randperm(128, generator=generator)[:70] for _ in num_valid]).int()
    valid = torch.tensor(num_valid, dtype=torch.int32)
    out, lse = kernel(q, cache, slots, valid, 0.05)
    assert out.dtype == torch.bfloat16
    wanted, wanted_lse = in_float64(q, cache, slots, valid, 0.05)
    close(lse, wanted_lse, rtol=1e-5, atol=1e-5)
    # A group of 128 columns shares its scale, so that its errors are alike.
    error, wanted, cached = (
        groups(x) for x in (out.double() - wanted, wanted, sparse_mla.gather_latent(cache, slots))
    )
    assert bool((error <= 2**-8 * wanted + 2**-9 * cached.nan_to_num().amax((0, 1))).all())


def groups(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each group of 128 of the first 512 columns."""
    return x[..., :512].double().unflatten(-1, (4, 128)).abs().amax(-1)


def in_float64(q, cache, slots, num_valid, scale):
    """`naive.sparse_mla` for many heads, which are taken at once."""
    outs, lses = [], []
    for query, row, count in zip(q.double(), slots.tolist(), num_valid.tolist(), strict=True):
        rows = torch.tensor([naive.latent_row(cache, slot) for slot in row[:count]], dtype=torch.float64).view(
            -1, 576
        )
        scores = query @ rows.T * scale
        outs.append(scores.softmax(-1) @ rows[:, :512])
        lses.append(scores.logsumexp(-1))
    return torch.stack(outs), torch.stack(lses)


@implementations("sparse_mla")
def test_every_code_is_exact_at_its_column(kernel):
    """A single key has weight one, and a query of a single one reads a single value; some are subnormal."""
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    cache = latent_cache(2, 16, "fp8_ds_mla")
    views = latent_fp8_views(cache)
    nope_fp8, scale = codes.repeat(3)[:512].view(torch.float8_e4m3fn), torch.tensor([2.0**-7, 1.0, 2.0**5, 0.25])
    views.nope_fp8.view(torch.uint8)[1, 3] = nope_fp8.view(torch.uint8)
    views.nope_scale[1, 3] = scale
    views.rope[1, 3] = 0.0
    value = nope_fp8.float() * scale.repeat_interleave(128)
    q = torch.eye(512, 576).view(32, 16, 576).bfloat16()
    out, lse = kernel(q, cache, torch.full((32, 3), 19, dtype=torch.int32), torch.ones(32, dtype=torch.int32), 1.0)
    assert torch.equal(out.float(), value.expand(32, 16, 512))
    torch.testing.assert_close(lse.flatten(), value, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("cache_format", ["bfloat16", "fp8_ds_mla"])
@pytest.mark.parametrize(
    ("capability", "num_heads", "num_tokens"),
    [((8, 0), 16, 1), ((9, 0), 16, 1), ((9, 0), 16, 4096), ((9, 0), 32, 1), ((9, 0), 64, 1)],
)
def test_the_tiles_of_each_gpu(generator, monkeypatch, cache_format, capability, num_heads, num_tokens):
    """The order in which fp8 rows are decoded depends on the tiles, and the interpreter has tiles of its own."""
    tiles = sparse_mla_triton.tiling(
        capability, num_heads, cache_format == "fp8_ds_mla", torch.bfloat16, num_tokens
    )
    monkeypatch.setattr(sparse_mla_triton, "tiling", lambda *_: tiles)
    cache = filled(cache_format, generator, num_blocks=9)
    q = torch.randn(1, num_heads, 576, generator=generator).bfloat16()
    slots = torch.randperm(144, generator=generator).int().unsqueeze(0)
    valid = torch.tensor([139], dtype=torch.int32)
    out, lse = on_device(sparse_mla_triton.sparse_mla)(q, cache, slots, valid, 0.05)
    wanted, wanted_lse = in_float64(q, cache, slots, valid, 0.05)
    close(lse, wanted_lse, rtol=1e-5, atol=1e-5)
    close(out, wanted, rtol=2**-7, atol=2**-7 * float(wanted.abs().max()))


@implementations("sparse_mla")
def test_offsets_beyond_32_bits(kernel, generator):
    page_nbytes = 2**32 + 16 * 576 * 2
    memory = torch.empty(page_nbytes + 16 * 576 * 2, dtype=torch.uint8)
    cache = memory.view(torch.bfloat16).as_strided((2, 16, 576), (page_nbytes // 2, 576, 1))
    cache.copy_(torch.randn(2, 16, 576, generator=generator))
    q = torch.randn(1, 8, 576, generator=generator).bfloat16()
    slots = torch.tensor([[17, 3, 30]], dtype=torch.int32)
    valid = torch.tensor([3], dtype=torch.int32)
    _, lse = kernel(q, cache, slots, valid, 0.05)
    close(lse, in_float64(q, cache, slots, valid, 0.05)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("cache_format", "num_splits"), [("float32", 2), ("float32", 3), ("float32", 32), ("fp8_ds_mla", 5)]
)
def test_splits_join_to_the_whole(generator, monkeypatch, cache_format, num_splits):
    kernel = on_device(sparse_mla_triton.sparse_mla)
    cache = filled(cache_format, generator, num_blocks=5)
    num_valid = [0, 1, 17, 70]
    q = torch.randn(4, 3, 576, generator=generator)
    slots = torch.stack([torch.randperm(80, generator=generator)[:70] for _ in num_valid]).int()
    valid = torch.tensor(num_valid, dtype=torch.int32)
    whole = sparse_mla.reference(q, cache, slots, valid, 0.05)
    monkeypatch.setattr(sparse_mla_launch, "split_count", lambda *_: num_splits)
    # Memory that nothing has written is NaN: empty splits must not be read.
    torch.use_deterministic_algorithms(True)
    try:
        parts = kernel(q, cache, slots, valid, 0.05)
        again = kernel(q, cache, slots, valid, 0.05)
    finally:
        torch.use_deterministic_algorithms(False)
    close(parts[1], whole[1], rtol=1e-5, atol=1e-5)
    close(parts[0], whole[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(parts[0], again[0])
    assert torch.equal(parts[1], again[1])


def test_pages_that_are_not_aligned_are_refused(generator):
    cache = torch.randn(1, 2 * 16 * 576 + 8, generator=generator).bfloat16()
    cache = cache.as_strided((2, 16, 576), (16 * 576 + 4, 576, 1))
    q, slots = torch.randn(1, 8, 576).bfloat16(), torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="expected pages at multiples of 16 bytes, got one every 18440"):
        sparse_mla_triton.sparse_mla(q, cache, slots, torch.ones(1, dtype=torch.int32), 0.05)


def test_splits_fill_the_gpu_and_no_more():
    assert split_count(num_programs=4096, num_keys=2048, num_concurrent=396, tile_size=64) == 1
    assert split_count(num_programs=64, num_keys=2048, num_concurrent=396, tile_size=64) == 6
    assert split_count(num_programs=1, num_keys=2048, num_concurrent=396, tile_size=64) == 32
    assert split_count(num_programs=1, num_keys=40, num_concurrent=396, tile_size=64) == 1
    assert split_count(num_programs=1, num_keys=0, num_concurrent=396, tile_size=64) == 1
    for num_programs in range(1, 700):
        num_splits = split_count(num_programs, 2048, 396, 64)
        assert num_splits == 1 or num_splits * num_programs <= 2 * 396
